"""A private Slurm for the tests in this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from cluster import Cluster, missing_programs
from running import check_ledgers, make_run, run_agent

from latentwire.run.directory import Run


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes of four fake GPUs, for each of the processes that run tests; ended whatever happens."""
    missing = missing_programs()
    if missing and os.environ.get("LATENTWIRE_REQUIRE_SLURM") == "1":
        pytest.fail(f"LATENTWIRE_REQUIRE_SLURM=1 and a private Slurm lacks {', '.join(missing)}")
    if missing:
        pytest.skip(f"no private Slurm: {', '.join(missing)} missing (apt-get install slurm-wlm munge, as root)")
    private = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    try:
        private.up()
        yield private
    finally:
        private.down()


@pytest.fixture(scope="session", autouse=True)
def ledgers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whatever the tests did to their runs, in the end no second is missing from their accounts."""
    yield
    check_ledgers(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The toy run that nobody disturbed, on this machine without Slurm."""
    run = make_run(tmp_path_factory.mktemp("calm"))
    assert run_agent(run) == "finished"
    return run
