"""Fixtures of the unit tests. Nothing here imports torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from checkpoint_parts import Events, open_manager
from cli_parts import Agents, read_line
from hypothesis import settings
from run_parts import Start

from latentwire.checkpoint.manager import CheckpointManager
from latentwire.run.directory import Run
from latentwire.run.process import ProcessIdentity

_AGENT = """
import signal, sys
from pathlib import Path
from typing import Any
from latentwire.checkpoint.manager import CheckpointManager
from latentwire.run.directory import Run
told = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT}
signal.pthread_sigmask(signal.SIG_BLOCK, told)
print(Run(Path(sys.argv[1])).claim_attempt("4711", sys.argv[2]).number, flush=True)
print(signal.sigwait(told).name, flush=True)
"""

settings.register_profile("latentwire", deadline=None, database=None, print_blob=True)
settings.load_profile("latentwire")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def manager(folder: Path, events: Events) -> Iterator[CheckpointManager]:
    manager = open_manager(folder, event=events)
    yield manager
    manager.close()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The directory of a run, with no attempt yet and nothing in its config."""
    run = Run(tmp_path / "runs" / "experiment_test")
    run.path.mkdir(parents=True)
    run.config_path.touch()
    return run


@pytest.fixture
def small_disk(mount_disk: Callable[[str], Path]) -> Path:
    """A file system of 1 MiB."""
    return mount_disk("1m")


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts Python programs that talk on their standard input and output; ends what still runs."""
    started: list[subprocess.Popen[str]] = []

    def start(program: str, environ: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        command, env, pipe = [sys.executable, "-c", program], {**os.environ, **(environ or {})}, subprocess.PIPE
        started.append(subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def dead() -> ProcessIdentity:
    """A process of this host that has ended."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = ProcessIdentity.of(process.pid)
    process.communicate()
    return identity


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where the program is started: beside a folder ``runs``."""
    (tmp_path / "runs").mkdir()
    return tmp_path


@pytest.fixture
def agents() -> Iterator[Agents]:
    """Starts real processes that claim an attempt, and then print the name of the first signal that they get."""
    started: list[subprocess.Popen[str]] = []

    def start(run: Run, scheduler: str = "local") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _AGENT, str(run.path), scheduler]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert read_line(started[-1]).strip().isdigit()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def scancel(tmp_path: Path) -> Path:
    """A folder with a ``scancel`` that writes its arguments beside itself."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "scancel"
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/said\n')
    program.chmod(0o755)
    return folder
