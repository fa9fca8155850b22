"""The failing disk, built once."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from latentwire.run.directory import Run


@pytest.fixture(scope="session")
def faulty_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of faulty_disk.c, for LD_PRELOAD."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        lacks = "no C compiler: apt-get install gcc libc6-dev, as root"
        if os.environ.get("LATENTWIRE_REQUIRE_SLURM") == "1":  # CI: nothing is skipped
            pytest.fail(lacks)
        pytest.skip(lacks)
    library = tmp_path_factory.mktemp("faulty") / "faulty_disk.so"
    source = Path(__file__).with_name("faulty_disk.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The empty directory of a run."""
    run = Run(tmp_path / "experiment_faults")
    run.path.mkdir()
    return run
