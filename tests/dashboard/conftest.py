"""A browser for the tests of a module, and servers that end with their test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright
from serving_parts import Serve, Server


@pytest.fixture(scope="module")  # while it is there, its event loop keeps other tests from having one
def browser() -> Iterator[Browser]:
    """Debian's Chromium without a window."""
    chromium = shutil.which("chromium")
    if chromium is None and os.environ.get("LATENTWIRE_REQUIRE_CHROMIUM") == "1":
        pytest.fail("LATENTWIRE_REQUIRE_CHROMIUM=1 and there is no chromium")
    if chromium is None:
        pytest.skip("no chromium (apt-get install chromium, as root)")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts a dashboard over ``tmp_path``."""
    servers: list[Server] = []

    def start(*options: str, token: str | None = None) -> Server:
        servers.append(Server(tmp_path, *options, token=token))
        return servers[-1]

    yield start
    for server in servers:
        server.end()
