"""Options of the whole suite."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from fault_matrix import Matrix

_MATRIX = pytest.StashKey[Matrix]()


def pytest_configure(config: pytest.Config) -> None:
    """Under nohup and the like INT is ignored, and every child would inherit that: ours must hear it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[_MATRIX] = Matrix()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills",
        type=int,
        default=200,
        help="kill a save at least so many times; what exceeds the number of write points is killed at random",
    )
    parser.addoption("--kill-seed", type=int, default=None, help="repeat the random kills of an earlier run")
    parser.addoption("--matrix", type=Path, help="write what the tests of this session counted into this file")


@pytest.fixture(scope="session")
def matrix(pytestconfig: pytest.Config) -> Matrix:
    """Where tests count the faults that they survived."""
    return pytestconfig.stash[_MATRIX]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the matrix's total; with ``--matrix`` write the rows, where nothing failed."""
    matrix, path = config.stash[_MATRIX], config.getoption("--matrix")
    if matrix.num_faults:
        terminalreporter.write_line(f"**{matrix.num_faults} faults, {matrix.num_lost} lost commits**")
    if path is not None and not terminalreporter.stats.keys() & {"failed", "error"}:
        matrix.write(path, f"{len(terminalreporter.stats['passed'])} tests, none failed")
