"""Who may ask: the token, the names under which this server is known, and what a browser is told to forbid."""

from __future__ import annotations

import dataclasses
import hmac
import ipaddress
import re
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_OPEN_PATHS = ("/static/", "/runs/")
_HOST = re.compile(r"(\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9.-]+))(:[0-9]+)?")
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Whether a name or address, without a port, means this machine to itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclasses.dataclass(frozen=True)
class Guard:
    """Lets requests through, or answers why not. Around the whole application.

    Attributes:
        app: what is guarded.
        token: everything but the empty pages and their scripts needs it; None: anybody on this machine may read.
        only_loopback: the server listens on this machine alone; then no other name for it is taken, so that a web
            page elsewhere cannot make its own name mean this machine and read what is here.
    """

    app: ASGIApp
    token: str | None
    only_loopback: bool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self.app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        headers = Headers(scope=scope)
        if self.only_loopback and not is_loopback(_host_of(headers)):
            return PlainTextResponse("this server answers to localhost and 127.0.0.1 only", 421)
        if scope["method"] not in ("GET", "HEAD") and not _is_own_page(headers):
            return PlainTextResponse("this request comes from another site's page", 403)
        if self.token is not None and _is_data(scope["path"]) and not _has(headers, self.token):
            return PlainTextResponse("a token is needed", 401, {"WWW-Authenticate": "Bearer"})
        return None


def _is_data(path: str) -> bool:
    return path != "/" and not path.startswith(_OPEN_PATHS)


def _has(headers: Headers, token: str) -> bool:
    given = headers.get("authorization", "").removeprefix("Bearer ")
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())


def _is_own_page(headers: Headers) -> bool:
    """A browser names the page that asks; a program names none."""
    origin = headers.get("origin")
    same_site = headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")
    return same_site and (origin is None or urlsplit(origin).netloc == headers.get("host"))


def _host_of(headers: Headers) -> str:
    """The name by which the server was asked, without the port; empty where it is no name."""
    found = _HOST.fullmatch(headers.get("host", ""))
    return (found["address"] or found["name"]) if found else ""
