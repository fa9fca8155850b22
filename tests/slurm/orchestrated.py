"""A toy run on the private cluster with its orchestrator, and what may happen to it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster import Cluster
from running import NEVER, OFTEN_SAVED, PATIENCE_S, events, hold, make_run, trained_steps, wait_for, wait_for_event

from latentwire.checklist.drill import final_digests
from latentwire.run.budget import verdict_of
from latentwire.run.directory import Attempt, Run
from latentwire.scheduler.submission import list_jobs

VISITS_A_STEP = 8
"""The toy's micro-batches."""


def stand_after(steps: int, micro_batch: int = 0) -> int:
    """The toy's visit with which that micro-batch begins, in an attempt that has trained so many steps."""
    return 1 + steps * VISITS_A_STEP + micro_batch  # the first visit is the warm-up's


class Orchestrated:
    """A toy run on the private cluster, with its orchestrator as a program.

    Each attempt stands still in a step until ``go_on``: it is disturbed where the test wants it, and ends no sooner.
    """

    def __init__(self, cluster: Cluster, run: Run, environ: Mapping[str, str]) -> None:
        self.cluster, self.run = cluster, run
        self._environ = {**cluster.environ, **environ}
        command = [sys.executable, "-m", "latentwire.orchestrate", "--resume", "--runs-dir", str(run.path.parent)]
        with open(run.path.parent / "orchestrator.txt", "wb") as output:
            self._process = subprocess.Popen(command, env=self._environ, stdout=output, stderr=output)

    def standing(self, number: int = 1) -> Attempt:
        """The attempt of that number, once it stands."""
        wait_for(lambda: self.run.newest_number() >= number, f"attempt {number}")
        attempt = Attempt(self.run, number)
        wait_for_event(attempt, "holding")
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
        command = [sys.executable, "-m", "latentwire.scheduler.submission", str(self.run.path), str(number)]
        subprocess.run(command, env=self._environ, check=True, capture_output=True)
        return self.job_id()

    def field(self, job: str, name: str) -> str:
        """One field of ``scontrol show job``."""
        fields = self.cluster.run("scontrol", "show", "job", "-o", job).split()
        return next(field.removeprefix(f"{name}=") for field in fields if field.startswith(f"{name}="))

    def finish(self) -> int:
        """Wait for the orchestrator; its exit code."""
        return self._process.wait(PATIENCE_S)

    def kill(self) -> None:
        """The orchestrator goes, as with its login node."""
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """Leave nothing behind."""
        if self._process.poll() is None:
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
    scheduler = {"kind": "slurm", "partition": partition, "gpus": 1, "cpus": 2, "time_min": 10}
    scheduler |= sections.pop("scheduler", {})
    run = make_run(folder / "runs", scheduler=scheduler, checkpoint=OFTEN_SAVED, **sections)
    hold(run, "step", stand)
    program = Orchestrated(cluster, run, environ or {})
    try:
        yield program
    finally:
        program.end()


@contextmanager
def everything_taken(cluster: Cluster) -> Iterator[str]:
    """A job of the partition ``high`` wants both nodes for itself; its id."""
    options = ["-p", "high", "-N", "2", "--exclusive", "--time=5", "--output=/dev/null"]
    job = cluster.run("sbatch", "--parsable", *options, "--wrap", "srun sleep 300").strip()
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
