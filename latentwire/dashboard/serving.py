"""Starting the server: where it listens, and with which token."""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path

import uvicorn

from latentwire.dashboard.app import Dashboard
from latentwire.dashboard.guard import Guard, is_loopback
from latentwire.errors import LatentWireError

TOKEN_VARIABLE = "LATENTWIRE_DASHBOARD_TOKEN"
_SHORTEST_TOKEN = 16


def serve_forever(runs_dir: Path, host: str, port: int, allow_actions: bool) -> None:
    """Listen until Ctrl-C or SIGTERM. Prints the address first, with a token that was made for this time.

    Raises:
        LatentWireError: a token is missing or too short, or nothing can listen there.
    """
    given = os.environ.get(TOKEN_VARIABLE) or None
    only_loopback = is_loopback(host)
    _refuse_without_token(given, host, only_loopback)
    token = given or (secrets.token_urlsafe(24) if allow_actions else None)
    listening = _listen(host, port)
    shown = host if ":" not in host else f"[{host}]"
    address = f"http://{shown}:{listening.getsockname()[1]}/"
    print(address + (f"#token={token}" if token is not None and given is None else ""), flush=True)
    dashboard = Dashboard(runs_dir, allow_actions)
    guarded = Guard(dashboard.app(), token, only_loopback)
    config = uvicorn.Config(guarded, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
    with listening:
        _Server(config, dashboard).run([listening])


class _Server(uvicorn.Server):
    """Ends the streams before it waits for them."""

    def __init__(self, config: uvicorn.Config, dashboard: Dashboard) -> None:
        super().__init__(config)
        self._dashboard = dashboard

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._dashboard.end_streams()
        await super().shutdown(sockets)


def _refuse_without_token(token: str | None, host: str, only_loopback: bool) -> None:
    if token is not None and len(token) < _SHORTEST_TOKEN:
        raise LatentWireError(
            f"{TOKEN_VARIABLE} has {len(token)} characters, which can be guessed; take {_SHORTEST_TOKEN} or more, "
            f"such as: export {TOKEN_VARIABLE}=$(openssl rand -hex 16)"
        )
    if token is None and not only_loopback:
        raise LatentWireError(
            f"whoever reaches {host} could read all runs: set a token, "
            f"export {TOKEN_VARIABLE}=$(openssl rand -hex 16), "
            "or listen on 127.0.0.1 and come through ssh -L 8050:localhost:8050"
        )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise LatentWireError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); another --port may be free, 0 takes any"
        ) from None
