"""The time limit: what comes before it, and what it does."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from orchestrated import assert_lost_nothing, job_ids, orchestrated, stderr_of_jobs
from running import events, wait_for, wait_for_event

from latentwire.checklist.drill import final_digests
from latentwire.run.budget import committed_step, verdict_of
from latentwire.run.directory import Run

pytestmark = pytest.mark.slurm

SOON: dict[str, Any] = {"scheduler": {"time_min": 2}, "preemption": {"grace_s": 5}}


def warned(cluster: Cluster, folder: Path) -> Run:
    """It leaves when Slurm warns it, up to a minute early."""
    with orchestrated(cluster, folder, "preempt", **SOON) as program:
        program.go_on_after_notice(program.standing())
        program.finish()
        return program.run


def ended(cluster: Cluster, folder: Path) -> Run:
    """Its step is longer than all that it is given: the limit comes over it."""
    with orchestrated(cluster, folder, "preempt", **SOON) as program:
        wait_for_event(program.standing(), "notice", "agent")
        wait_for(lambda: "DUE TO TIME LIMIT" in stderr_of_jobs(program.run), "the time limit")
        program.go_on()
        program.finish()
        return program.run


@pytest.fixture(scope="module")
def limited(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Both at once: Slurm counts in minutes and looks twice a minute."""
    lives: tuple[Callable[[Cluster, Path], Run], ...] = (warned, ended)
    with ThreadPoolExecutor() as pool:
        begun = {life.__name__: pool.submit(life, cluster, tmp_path_factory.mktemp(life.__name__)) for life in lives}
    return {name: life.result() for name, life in begun.items()}


def test_a_warned_job_requeues_itself(limited: dict[str, Run], calm: Run) -> None:
    run = limited["warned"]
    assert_lost_nothing(run, calm)
    assert len(set(job_ids(run))) == 1


def test_a_job_at_its_limit_is_submitted_again(limited: dict[str, Run], calm: Run) -> None:
    """Slurm requeues no job at its limit; nor is that a cancel."""
    run = limited["ended"]
    first, second = run.attempts()
    assert events(first, "requeue", "agent")[0]["reason"] == "JobState is COMPLETING"
    assert events(second, "restored")[0]["step"] == committed_step(first) >= 3
    assert verdict_of(second).outcome == "finished"
    assert len(set(job_ids(run))) == 2
    assert not run.cancel_path.exists()
    assert final_digests(run) == final_digests(calm)
