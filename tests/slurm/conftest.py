"""A private Slurm for the tests in this folder."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import time_limit
from cluster import Cluster, missing_programs
from orchestrated import Orchestrated
from running import make_run, run_agent

from latentwire.run.directory import Run


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes of four fake GPUs; ended whatever happens."""
    with private_cluster(tmp_path_factory) as private:
        yield private


@pytest.fixture(scope="session", autouse=True)
def time_limits(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Orchestrated]]]:
    """Runs that reach their time limit, on a Slurm of their own, begun before the first test if one asks for them."""
    functions = [item.function for item in request.session.items if isinstance(item, pytest.Function)]
    if not any("time_limits" in inspect.signature(function).parameters for function in functions):
        yield {}
        return
    with private_cluster(tmp_path_factory) as private, ThreadPoolExecutor() as pool:
        yield {
            row.__name__: pool.submit(row, private, tmp_path_factory.mktemp(row.__name__))
            for row in (time_limit.warned, time_limit.ended)
        }


@contextmanager
def private_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of the test session, where that can be."""
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


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The toy run that nobody disturbed, on this machine without Slurm."""
    run = make_run(tmp_path_factory.mktemp("calm"))
    assert run_agent(run) == "finished"
    return run
