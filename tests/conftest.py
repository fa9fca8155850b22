"""Options of the whole suite."""

from __future__ import annotations

import signal

import pytest


def pytest_configure() -> None:
    """Under nohup and the like INT is ignored, and every child would inherit that: ours must hear it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills",
        type=int,
        default=200,
        help="kill a save at least so many times; what exceeds the number of write points is killed at random",
    )
    parser.addoption("--kill-seed", type=int, default=None, help="repeat the random kills of an earlier run")
