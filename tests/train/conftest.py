"""Fixtures of the training tests: what several of them compare with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from running import KILL, check_ledgers, make_run, run_agent

from latentwire.run.directory import Run


@pytest.fixture(scope="session", autouse=True)
def ledgers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whatever the tests did to their runs, in the end no second is missing from their accounts."""
    yield
    check_ledgers(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The toy run that nobody disturbed."""
    run = make_run(tmp_path_factory.mktemp("calm"))
    assert run_agent(run) == "finished"
    return run


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A working folder; jobs that a failed test leaves in it are ended."""
    yield tmp_path
    for path in (tmp_path / "runs").glob("experiment_*"):
        for holding in path.glob("hold-submission-*"):
            with suppress(FileNotFoundError, ProcessLookupError):
                os.kill(int((path / f"{holding.name.removeprefix('hold-')}.pid").read_text()), KILL)
        for attempt in Run(path).attempts():
            agent = attempt.agent()
            if agent is not None:
                agent.send(KILL)
