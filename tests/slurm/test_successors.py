"""Jobs that wait for one another: a run that goes on with no orchestrator alive."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import Cluster
from orchestrated import everything_taken, orchestrated
from running import wait_for, wait_for_event

from latentwire.checklist.drill import final_digests
from latentwire.run.budget import verdict_of
from latentwire.run.directory import Run
from latentwire.run.status import run_status
from latentwire.scheduler.jobs import list_jobs

pytestmark = pytest.mark.slurm


def test_a_successor_goes_on_where_a_job_cannot_requeue_itself(cluster: Cluster, tmp_path: Path, calm: Run) -> None:
    scheduler = {"requeue": False, "successors": 2}
    with orchestrated(cluster, tmp_path, "preempt", scheduler=scheduler) as program:
        attempt = program.standing()
        program.kill()
        first, second, third = [job.job_id for job in list_jobs(program.run)]
        with everything_taken(cluster):
            program.go_on_after_notice(attempt)
            assert not wait_for_event(attempt, "requeue", "agent")["done"]
        cluster.wait_until(lambda: program.field(third, "JobState") == "COMPLETED")
        assert [verdict_of(a).outcome for a in program.run.attempts()] == ["preempted", "finished"]
        assert [a.record()["job_id"] for a in program.run.attempts()] == [first, second], "the third was not needed"
        assert final_digests(program.run) == final_digests(calm)


def test_a_successor_of_a_cancelled_job_trains_no_more(cluster: Cluster, tmp_path: Path) -> None:
    with (
        everything_taken(cluster) as other,
        orchestrated(cluster, tmp_path, "preempt", scheduler={"successors": 1}) as program,
    ):
        wait_for(lambda: len(list_jobs(program.run)) == 2, "both jobs")
        program.kill()
        first, second = [job.job_id for job in list_jobs(program.run)]
        assert program.field(first, "JobState") == "PENDING"
        cluster.run("scancel", first)
        cluster.run("scancel", other)
        cluster.wait_until(lambda: program.field(second, "JobState") == "COMPLETED")
        assert program.run.attempts() == []
        assert run_status(program.run).state == "CANCELLED"
