"""Fixtures of the training tests: what several of them compare with."""

from __future__ import annotations

import pytest
from running import make_run, run_agent

from latentwire.run.directory import Run


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The toy run that nobody disturbed."""
    run = make_run(tmp_path_factory.mktemp("calm"))
    assert run_agent(run) == "finished"
    return run
