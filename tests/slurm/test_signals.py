"""What Slurm does to a job, one test a row: each run ends with the bits of an undisturbed one, or stays cancelled."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import Cluster
from orchestrated import Orchestrated, everything_taken, orchestrated
from running import events, trained_steps, wait_for

from latentwire.checklist.drill import final_digests
from latentwire.run.budget import committed_step, verdict_of
from latentwire.run.directory import Run
from latentwire.run.status import run_status

pytestmark = pytest.mark.slurm


def assert_lost_nothing(program: Orchestrated, calm: Run) -> None:
    """The first attempt was preempted and requeued under its own id; the second went on where it stood."""
    first, second = program.run.attempts()
    assert [verdict_of(a).outcome for a in (first, second)] == ["preempted", "finished"], program.said()
    assert first.record()["job_id"] == second.record()["job_id"]
    assert events(second, "restored")[0]["step"] == trained_steps(first)[-1]["step"]
    assert final_digests(program.run) == final_digests(calm)


@pytest.mark.parametrize("partition", ["preempt", "cancel"])
def test_preemption_with_grace(cluster: Cluster, tmp_path: Path, calm: Run, partition: str) -> None:
    with orchestrated(cluster, tmp_path, partition) as program:
        attempt = program.trained(3)
        with everything_taken(cluster):
            (requeue,) = wait_for(lambda: events(attempt, "requeue", "agent"), "the requeue")
        assert requeue["done"]
        assert 0 < requeue["given_back_s"] <= 20
        assert program.finish() == 0
        assert_lost_nothing(program, calm)


def test_preemption_without_grace(cluster: Cluster, tmp_path: Path, calm: Run) -> None:
    with orchestrated(cluster, tmp_path, "nograce") as program:
        attempt = program.trained(5)
        agent = attempt.agent()
        assert agent is not None
        with everything_taken(cluster):
            wait_for(lambda: not agent.is_alive(), "the attempt's end")
        assert program.finish() == 0
        second = program.run.attempts()[-1]
        assert events(second, "restored")[0]["step"] == committed_step(attempt) > 0
        assert final_digests(program.run) == final_digests(calm)


def test_scancel_with_a_signal(cluster: Cluster, tmp_path: Path, calm: Run) -> None:
    with orchestrated(cluster, tmp_path, "preempt") as program:
        program.trained(3)
        cluster.run("scancel", "-s", "TERM", program.job_id())
        assert program.finish() == 0
        assert_lost_nothing(program, calm)


def test_plain_scancel_saves_and_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    with orchestrated(cluster, tmp_path, "preempt") as program:
        attempt = program.trained(3)
        job = program.job_id()
        cluster.run("scancel", job)
        assert program.finish() == 1
        assert run_status(program.run).state == "CANCELLED"
        assert committed_step(attempt) == trained_steps(attempt)[-1]["step"]
        assert len(program.run.attempts()) == 1
        assert cluster.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip() == "CANCELLED"
