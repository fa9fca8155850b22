"""Fixtures of the unit tests. Nothing here imports torch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from latentwire.run.directory import Run

settings.register_profile("latentwire", deadline=None, database=None, print_blob=True)
settings.load_profile("latentwire")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The empty directory of a run."""
    run = Run(tmp_path / "runs" / "experiment_test")
    run.path.mkdir(parents=True)
    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount the small file system that this test fills")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)
