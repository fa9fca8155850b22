"""A webhook on loopback: a real HTTP server that keeps what it was sent, or misbehaves."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Webhook:
    """What was posted, in order.

    Args:
        answer: with this status; 0: never.
    """

    def __init__(self, answer: int = 204) -> None:
        self.messages: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.released = threading.Event()
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.headers["Content-Type"] == "application/json"
                webhook.paths.append(self.path)
                webhook.messages.append(json.loads(body))
                if not answer:
                    webhook.released.wait(60)
                    return
                self.send_response(answer)
                self.send_header("Location", "/elsewhere")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        """With a part that is nobody else's business."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/a-secret-path"

    def of(self, name: str) -> list[dict[str, Any]]:
        """The messages about one alert."""
        return [message for message in self.messages if message["alert"] == name]

    @contextmanager
    def open(self) -> Iterator[Webhook]:
        """Listen until the block is left."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            self.released.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()
