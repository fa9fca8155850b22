"""A dashboard in a process of its own, asked as programs and browsers ask it."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page
from running import wait_for

TOKEN = "a-token-of-more-than-sixteen"


class Server:
    """``latentwire dashboard`` on a port that is free."""

    def __init__(self, runs_dir: Path, *options: str, token: str | None = None) -> None:
        environ = {name: value for name, value in os.environ.items() if name != "LATENTWIRE_DASHBOARD_TOKEN"}
        command = [
            sys.executable,
            "-m",
            "latentwire",
            "dashboard",
            "--port",
            "0",
            "--runs-dir",
            str(runs_dir),
            *options,
        ]
        self._process = subprocess.Popen(
            command,
            env=environ | ({"LATENTWIRE_DASHBOARD_TOKEN": token} if token else {}),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.printed = self._process.stdout.readline().strip()
        self.address = self.printed.partition("#")[0]
        self.port = urlsplit(self.address).port or 0

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, str, Mapping[str, str]]:
        """Status, body and headers of an answer; of a stream the first message."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, headers={name.replace("_", "-"): text for name, text in headers.items()})
            response = connection.getresponse()
            is_stream = response.headers.get_content_type() == "text/event-stream"
            body = response.readline() if is_stream else response.read()
            return response.status, body.decode(), dict(response.headers)
        finally:
            connection.close()

    def data(self, path: str, **headers: str) -> dict[str, Any]:
        """The first message of a stream."""
        status, body, _ = self.ask(path, **headers)
        assert status == 200, body
        message: dict[str, Any] = json.loads(body.removeprefix("data: "))
        return message

    def end(self) -> None:
        """Leave nothing behind."""
        self._process.terminate()
        self._process.communicate(timeout=30)


Serve = Callable[..., Server]


class Tab:
    """A page that must give no error."""

    def __init__(self, browser: Browser, width: int = 1280, height: int = 1000, scheme: Any = "light") -> None:
        self._context: BrowserContext = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        self.page: Page = self._context.new_page()
        self.errors: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def open(self, address: str) -> None:
        """Go there; does not wait for what the page shows."""
        self.page.goto(address)

    def wait_for_text(self, text: str) -> None:
        """Wait until it stands anywhere on the page."""
        wait_for(lambda: text in self.text(), f"{text!r} on the page, which shows: {self.text()[:2000]}")

    def reach(self, name: str) -> None:
        """Press the Tab key until what is called so has the focus."""
        passed = []
        while self.focused() != name:
            assert len(passed) < 30, f"{name!r} is not among what the Tab key reaches: {passed}"
            self.page.keyboard.press("Tab")
            passed.append(self.focused())

    def focused(self) -> str:
        """What the element that the keyboard acts on says."""
        return str(self.page.evaluate("document.activeElement.textContent"))

    def text(self) -> str:
        """All that the page says."""
        time.sleep(0.05)
        return str(self.page.inner_text("body"))

    def close(self) -> None:
        """The tab's end; it must have gone without an error."""
        self._context.close()
        assert self.errors == []

    def _note(self, message: ConsoleMessage) -> None:
        # plotly offers a style sheet for maps, which the page's policy refuses: no map is drawn here
        is_map_style = "plotly.min.js" in str(message.location) and "inline style" in message.text
        if message.type == "error" and not is_map_style:
            self.errors.append(f"{message.text} {message.location}")
