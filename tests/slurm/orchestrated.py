"""Runs on the private cluster with their orchestrator as a program, and what may happen to them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster import Cluster
from running import (
    NEVER,
    OFTEN_SAVED,
    PATIENCE_S,
    events,
    hold,
    make_run,
    trained_steps,
    wait_for,
    wait_for_event,
    wait_for_steps,
)

from latentwire.checklist.drill import final_digests
from latentwire.run.budget import verdict_of
from latentwire.run.directory import Attempt, Run
from latentwire.scheduler.jobs import list_jobs

SMALL: dict[str, Any] = {"kind": "slurm", "gpus": 1, "cpus": 2, "time_min": 10}
"""What a toy run asks for; its partition is missing."""
VISITS_A_STEP = 8
"""The toy's micro-batches."""


def stand_after(steps: int, micro_batch: int = 0) -> int:
    """The toy's visit with which that micro-batch begins, in an attempt that has trained so many steps."""
    return 1 + steps * VISITS_A_STEP + micro_batch  # the first visit is the warm-up's


class Orchestrator:
    """The orchestrator as a program, writing into ``orchestrator.txt`` in the folder of the runs."""

    def __init__(self, cluster: Cluster, runs: Path, *words: str | Path, environ: Mapping[str, str] | None = None):
        self.cluster = cluster
        self.environ = {**cluster.environ, **(environ or {})}
        self._output = runs / "orchestrator.txt"
        command = [sys.executable, "-m", "latentwire.orchestrate", *words, "--runs-dir", str(runs)]
        with open(self._output, "ab") as output:
            self._process = subprocess.Popen(command, env=self.environ, stdout=output, stderr=output)

    def finish(self) -> int:
        """Wait for its end; its exit code."""
        return self._process.wait(PATIENCE_S)

    def kill(self) -> None:
        """It goes, as with its login node."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def said(self) -> str:
        """What it printed, and any before it in the same folder."""
        return self._output.read_text()


class Orchestrated(Orchestrator):
    """One toy run and its orchestrator.

    Each attempt stands still in a step until ``go_on``: it is disturbed where the test wants it, and ends no sooner.
    """

    def __init__(self, cluster: Cluster, run: Run, environ: Mapping[str, str]) -> None:
        super().__init__(cluster, run.path.parent, "--resume", environ=environ)
        self.run = run

    def attempt(self, number: int) -> Attempt:
        """The run's attempt of that number, once it is there."""
        wait_for(lambda: self.run.newest_number() >= number, f"attempt {number}: {self.said()}")
        return Attempt(self.run, number)

    def standing(self, number: int = 1) -> Attempt:
        """The attempt of that number, once it stands."""
        attempt = self.attempt(number)
        wait_for_event(attempt, "holding")
        return attempt

    def trained(self, steps: int, number: int = 1) -> Attempt:
        """The attempt of that number, once it has trained so many steps."""
        attempt = self.attempt(number)
        wait_for_steps(attempt, steps)
        return attempt

    def stand(self, visit: int) -> None:
        """Let the attempts from the next on stand there."""
        hold(self.run, "step", visit)

    def go_on(self) -> None:
        """Stand still no more."""
        self.stand(NEVER)

    def go_on_after_notice(self, attempt: Attempt) -> None:
        """Stand still until the attempt was given notice."""
        wait_for_event(attempt, "notice", "agent")
        self.go_on()

    def job_id(self) -> str:
        """Of the newest job, once there is one."""
        return wait_for(lambda: list_jobs(self.run), "a job")[-1].job_id

    def submit_once_more(self) -> str:
        """One more job for the run, from nobody who looks after it; its id."""
        number = len(list_jobs(self.run)) + 1
        words = ["latentwire.scheduler.submission", "once-more", str(self.run.path), str(number)]
        subprocess.run([sys.executable, "-m", *words], env=self.environ, check=True, capture_output=True)
        return self.job_id()

    def field(self, job: str, name: str) -> str:
        """One field of ``scontrol show job``."""
        fields = self.cluster.run("scontrol", "show", "job", "-o", job).split()
        return next(field.removeprefix(f"{name}=") for field in fields if field.startswith(f"{name}="))

    def end(self) -> None:
        """Leave nothing behind."""
        self.kill()
        for job in list_jobs(self.run):
            with suppress(subprocess.CalledProcessError):  # Slurm has forgotten it
                self.cluster.run("scancel", job.job_id)


@contextmanager
def orchestrated(
    cluster: Cluster,
    folder: Path,
    partition: str,
    stand: int = stand_after(4),
    environ: Mapping[str, str] | None = None,
    **sections: Any,
) -> Iterator[Orchestrated]:
    """A run in a partition, with its orchestrator, until the block is left.

    ``sections`` lie over the toy's config; ``stand`` is the visit at which its attempts stand still.
    """
    scheduler = {**SMALL, "partition": partition, **sections.pop("scheduler", {})}
    run = make_run(folder / "runs", scheduler=scheduler, **{"checkpoint": OFTEN_SAVED, **sections})
    hold(run, "step", stand)
    program = Orchestrated(cluster, run, environ or {})
    try:
        yield program
    finally:
        program.end()


@contextmanager
def everything_taken(cluster: Cluster) -> Iterator[str]:
    """A job of the partition ``high`` wants both nodes for itself; its id."""
    with taken(cluster, "--exclusive") as job:
        yield job


@contextmanager
def taken(cluster: Cluster, *options: str) -> Iterator[str]:
    """A job of the partition ``high`` on both nodes; its id."""
    more = ["-p", "high", "-N", "2", "--time=5", "--output=/dev/null", *options]
    job = cluster.run("sbatch", "--parsable", *more, "--wrap", "srun sleep 300").strip()
    try:
        yield job
    finally:
        cluster.run("scancel", job)


def assert_lost_nothing(run: Run, calm: Run) -> None:
    """The first attempt was preempted, the second went on where it stood; the bits are those of a calm run."""
    first, second = run.attempts()
    assert [verdict_of(a).outcome for a in (first, second)] == ["preempted", "finished"]
    assert events(second, "restored")[0]["step"] == trained_steps(first)[-1]["step"]
    assert final_digests(run) == final_digests(calm)


def job_ids(run: Run) -> list[str]:
    """Of each attempt."""
    return [str(attempt.record()["job_id"]) for attempt in run.attempts()]


def stderr_of_jobs(run: Run) -> str:
    """submitit's logs of the run's jobs; Slurm tells there what it does to them."""
    return "".join(path.read_text() for path in (run.path / "submitit").glob("*/*_log.err"))
