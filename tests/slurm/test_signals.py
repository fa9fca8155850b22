"""What Slurm does to a job, one test a row: each run ends with the bits of an undisturbed one, or stays cancelled."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
from cluster import Cluster
from orchestrated import assert_lost_nothing, everything_taken, job_ids, orchestrated, stderr_of_jobs
from running import HERE, events, trained_steps, wait_for, wait_for_event

from latentwire.checklist.drill import final_digests
from latentwire.run.atomic import read_json
from latentwire.run.budget import committed_step
from latentwire.run.directory import Run
from latentwire.run.status import run_status
from latentwire.scheduler.jobs import list_jobs

pytestmark = pytest.mark.slurm

SLOW_PYTHON = HERE.parent / "slurm" / "slow_python"


@pytest.mark.parametrize("partition", ["preempt", pytest.param("cancel", marks=pytest.mark.slow)])
def test_preemption_with_grace(cluster: Cluster, tmp_path: Path, calm: Run, partition: str) -> None:
    with orchestrated(cluster, tmp_path, partition) as program:
        attempt = program.standing()
        with everything_taken(cluster):
            program.go_on_after_notice(attempt)
            requeue = wait_for_event(attempt, "requeue", "agent")
        assert requeue["done"]
        assert 0 < requeue["given_back_s"] <= 20
        assert program.finish() == 0
        assert_lost_nothing(program.run, calm)
        assert len(set(job_ids(program.run))) == 1


def test_preemption_without_grace(cluster: Cluster, tmp_path: Path, calm: Run) -> None:
    with orchestrated(cluster, tmp_path, "nograce") as program:
        attempt = program.standing()
        agent = attempt.agent()
        assert agent is not None
        with everything_taken(cluster):
            wait_for(lambda: not psutil.pid_exists(agent.pid), "the attempt's end")
        program.go_on()
        assert program.finish() == 0
        second = program.run.attempts()[-1]
        assert events(second, "restored")[0]["step"] == committed_step(attempt) == 3
        assert final_digests(program.run) == final_digests(calm)


def test_scancel_with_a_signal(cluster: Cluster, tmp_path: Path, calm: Run) -> None:
    with orchestrated(cluster, tmp_path, "preempt") as program:
        attempt = program.standing()
        cluster.run("scancel", "-s", "TERM", program.job_id())
        program.go_on_after_notice(attempt)
        assert program.finish() == 0
        assert_lost_nothing(program.run, calm)
        assert len(set(job_ids(program.run))) == 1


def test_a_requeue_by_hand_is_no_cancel_and_happens_once(cluster: Cluster, tmp_path: Path, calm: Run) -> None:
    with orchestrated(cluster, tmp_path, "preempt") as program:
        attempt = program.standing()
        job = program.job_id()
        cluster.run("scontrol", "requeue", job)
        program.go_on_after_notice(attempt)
        requeue = wait_for_event(attempt, "requeue", "agent")
        assert requeue["done"]
        assert 0 < requeue["given_back_s"] <= 10  # KillWait
        assert program.finish() == 0
        assert_lost_nothing(program.run, calm)
        assert job_ids(program.run) == [job, job]
        assert program.field(job, "Restarts") == "1"
        assert not program.run.cancel_path.exists()


@pytest.mark.parametrize("partition", ["preempt", pytest.param("nograce", marks=pytest.mark.slow)])
def test_a_job_that_may_not_be_requeued_is_submitted_again(
    cluster: Cluster, tmp_path: Path, calm: Run, partition: str
) -> None:
    """Slurm cancels such a job to preempt it: with grace after it, without at once; neither is a person's scancel."""
    with orchestrated(cluster, tmp_path, partition, scheduler={"requeue": False}) as program:
        attempt = program.standing()
        with everything_taken(cluster):
            program.go_on_after_notice(attempt)
            assert not wait_for_event(attempt, "requeue", "agent")["done"]
        assert program.finish() == 0
        assert_lost_nothing(program.run, calm)
        assert len(set(job_ids(program.run))) == 2
        assert not program.run.cancel_path.exists()


def test_no_scontrol_on_the_nodes(cluster: Cluster, tmp_path: Path, calm: Run) -> None:
    path = folder_of_programs(tmp_path / "bin", without="scontrol")
    with orchestrated(cluster, tmp_path, "cancel", environ={"PATH": path}) as program:
        attempt = program.standing()
        with everything_taken(cluster):
            program.go_on_after_notice(attempt)
            requeue = wait_for_event(attempt, "requeue", "agent")
        assert "No such file or directory: 'scontrol'" in requeue["reason"]
        assert program.finish() == 0
        assert_lost_nothing(program.run, calm)
        assert len(set(job_ids(program.run))) == 2


def test_plain_scancel_saves_and_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    """The job itself remembers it, so it needs no orchestrator; a later job of the run trains no more."""
    with orchestrated(cluster, tmp_path, "preempt") as program:
        attempt = program.standing()
        program.kill()
        job = program.job_id()
        cluster.run("scancel", job)
        program.go_on_after_notice(attempt)
        wait_for(program.run.cancel_path.exists, "cancel.json")
        assert read_json(program.run.cancel_path)["by"] == f"scancel of job {job}"
        assert committed_step(attempt) == trained_steps(attempt)[-1]["step"]
        later = program.submit_once_more()
        cluster.wait_until(lambda: program.field(later, "JobState") == "COMPLETED")
        assert program.field(job, "JobState") == "CANCELLED"
        assert len(program.run.attempts()) == 1
        assert run_status(program.run).state == "CANCELLED"


def test_scancel_of_a_pending_job_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    with everything_taken(cluster) as job_of_another, orchestrated(cluster, tmp_path, "preempt") as program:
        job = program.job_id()
        cluster.wait_until(lambda: program.field(job_of_another, "JobState") == "RUNNING")
        assert program.field(job, "JobState") == "PENDING"
        cluster.run("scancel", job)
        assert program.finish() == 1
        assert run_status(program.run).state == "CANCELLED"
        assert len(list_jobs(program.run)) == 1
        assert program.run.attempts() == []


def test_a_signal_before_python_listens_ends_no_job(cluster: Cluster, tmp_path: Path, calm: Run) -> None:
    with orchestrated(cluster, tmp_path, "preempt", environ=slow_python(tmp_path)) as program:
        wait_for((tmp_path / "holding").exists, "Python in the job")
        cluster.run("scancel", "-s", "TERM", program.job_id())
        wait_for(lambda: "CANCELLED AT" in stderr_of_jobs(program.run), "the signal")
        (tmp_path / "hold").unlink()
        program.go_on()
        assert program.finish() == 0
        assert len(program.run.attempts()) == len(list_jobs(program.run)) == 1
        assert final_digests(program.run) == final_digests(calm)


def test_a_preemption_before_python_listens_is_found_out(cluster: Cluster, tmp_path: Path, calm: Run) -> None:
    with orchestrated(cluster, tmp_path, "preempt", environ=slow_python(tmp_path)) as program:
        wait_for((tmp_path / "holding").exists, "Python in the job")
        with everything_taken(cluster):
            wait_for(lambda: "CANCELLED AT" in stderr_of_jobs(program.run), "the notice")
            (tmp_path / "hold").unlink()
            cluster.wait_until(lambda: program.field(program.job_id(), "Restarts") == "1")
        assert program.run.attempts() == []
        program.go_on()
        assert program.finish() == 0
        assert len(program.run.attempts()) == len(list_jobs(program.run)) == 1
        assert final_digests(program.run) == final_digests(calm)


def slow_python(folder: Path) -> dict[str, str]:
    """An environment in which a job's Python does not start while the folder has a file ``hold``."""
    (folder / "hold").touch()
    paths = [str(SLOW_PYTHON), os.environ.get("PYTHONPATH", "")]
    return {"SLOW_PYTHON": str(folder), "PYTHONPATH": os.pathsep.join(paths)}


def folder_of_programs(folder: Path, without: str) -> str:
    """A PATH with links to all programs there are, but one."""
    folder.mkdir()
    for path in Cluster(folder).environ["PATH"].split(os.pathsep):
        for program in Path(path).glob("*"):
            if program.name != without and not (folder / program.name).is_symlink():
                (folder / program.name).symlink_to(program)
    return str(folder)
