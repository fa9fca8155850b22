"""The time limit: what comes before it, and what it does."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
from orchestrated import Orchestrated, assert_lost_nothing, job_ids
from running import events

from latentwire.checklist.drill import final_digests
from latentwire.run.budget import committed_step, verdict_of
from latentwire.run.directory import Run

pytestmark = pytest.mark.slurm


def test_a_warned_job_requeues_itself(time_limits: dict[str, Future[Orchestrated]], calm: Run) -> None:
    run = time_limits["warned"].result().run
    assert_lost_nothing(run, calm)
    assert len(set(job_ids(run))) == 1


def test_a_job_at_its_limit_is_submitted_again(time_limits: dict[str, Future[Orchestrated]], calm: Run) -> None:
    """Slurm requeues no job at its limit; nor is that a cancel."""
    run = time_limits["ended"].result().run
    first, second = run.attempts()
    assert events(first, "requeue", "agent")[0]["reason"] == "JobState is COMPLETING"
    assert events(second, "restored")[0]["step"] == committed_step(first) >= 3
    assert verdict_of(second).outcome == "finished"
    assert len(set(job_ids(run))) == 2
    assert not run.cancel_path.exists()
    assert final_digests(run) == final_digests(calm)
