"""What Slurm does to a job, one test a row: each run ends with the bits of an undisturbed one, or stays cancelled."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from cluster import Cluster
from running import OFTEN_SAVED, PATIENCE_S, SLOW_ENOUGH, events, make_run, trained_steps, wait_for, wait_for_steps

from latentwire.checklist.drill import final_digests
from latentwire.run.budget import committed_step, verdict_of
from latentwire.run.directory import Attempt, Run
from latentwire.run.status import run_status

pytestmark = pytest.mark.slurm


class Orchestrated:
    """A toy run on the private cluster, with its orchestrator as a program."""

    def __init__(self, cluster: Cluster, run: Run) -> None:
        self.cluster, self.run = cluster, run
        command = [sys.executable, "-m", "latentwire.orchestrate", "--resume", "--runs-dir", str(run.path.parent)]
        self._output = run.path.parent / "orchestrator.txt"
        with open(self._output, "wb") as output:
            self._process = subprocess.Popen(command, env=cluster.environ, stdout=output, stderr=output)

    def trained(self, number: int) -> Attempt:
        """The newest attempt, once it has trained so many steps."""
        attempt = wait_for(lambda: (self.run.attempts() or [None])[-1], "an attempt")
        wait_for_steps(attempt, number)
        return attempt

    def job_id(self) -> str:
        """Of the newest attempt."""
        return str(self.run.attempts()[-1].record()["job_id"])

    def finish(self) -> int:
        """Wait for the orchestrator; its exit code."""
        return self._process.wait(PATIENCE_S)

    def end(self) -> None:
        """Leave nothing behind."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self.cluster.run("scancel", "--me")

    def said(self) -> str:
        """What the orchestrator printed."""
        return self._output.read_text()


@contextmanager
def orchestrated(cluster: Cluster, folder: Path, partition: str) -> Iterator[Orchestrated]:
    """A run in a partition, with its orchestrator, until the block is left."""
    scheduler = {"kind": "slurm", "partition": partition, "gpus": 1, "cpus": 2, "time_min": 10}
    run = make_run(folder / "runs", scheduler=scheduler, checkpoint=OFTEN_SAVED, **SLOW_ENOUGH)
    program = Orchestrated(cluster, run)
    try:
        yield program
    finally:
        program.end()


@contextmanager
def everything_taken(cluster: Cluster) -> Iterator[None]:
    """A job of the partition ``high`` wants both nodes for itself."""
    options = ["-p", "high", "-N", "2", "--exclusive", "--time=5", "--output=/dev/null"]
    job = cluster.run("sbatch", "--parsable", *options, "--wrap", "srun sleep 300").strip()
    try:
        yield
    finally:
        cluster.run("scancel", job)


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
            wait_for(lambda: not psutil.pid_exists(agent.pid), "the attempt's end")
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
