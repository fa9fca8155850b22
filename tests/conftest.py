"""Options of the whole suite."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
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


@pytest.fixture
def mount_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of a size (``1m``), to be filled."""
    disks: list[Path] = []

    def mount(size: str) -> Path:
        if os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("only root, and with a mount command, can make the small file system that this test fills")
        disk = tmp_path / f"disk-{len(disks)}"
        disk.mkdir()
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], capture_output=True, text=True
        )
        if made.returncode != 0:
            pytest.skip(f"a tmpfs cannot be mounted here: {made.stderr.strip()}")
        disks.append(disk)
        return disk

    yield mount
    for disk in disks:
        subprocess.run(["umount", "-l", disk], check=True)


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
