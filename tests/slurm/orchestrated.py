"""Runs on the private cluster with their orchestrator as a program, and jobs that take their nodes away."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import Cluster
from running import OFTEN_SAVED, PATIENCE_S, SLOW_ENOUGH, make_run, wait_for, wait_for_steps

from latentwire.run.directory import Attempt, Run

SMALL: dict[str, Any] = {"kind": "slurm", "gpus": 1, "cpus": 2, "time_min": 10}
"""What a toy run asks for; its partition is missing."""


class Orchestrator:
    """The orchestrator as a program, writing into ``orchestrator.txt`` in the folder of the runs."""

    def __init__(self, cluster: Cluster, runs: Path, *words: str | Path, environ: Mapping[str, str] | None = None):
        self.cluster = cluster
        self._output = runs / "orchestrator.txt"
        command = [sys.executable, "-m", "latentwire.orchestrate", *words, "--runs-dir", str(runs)]
        with open(self._output, "ab") as output:
            self.process = subprocess.Popen(
                command, env=environ or cluster.environ, stdout=output, stderr=output, start_new_session=True
            )

    def finish(self) -> int:
        """Wait for its end; its exit code."""
        return self.process.wait(PATIENCE_S)

    def kill(self) -> None:
        """SIGKILL, and whatever it has started."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def said(self) -> str:
        """What it printed, and any before it in the same folder."""
        return self._output.read_text()


class Orchestrated(Orchestrator):
    """One run and its orchestrator."""

    def __init__(self, cluster: Cluster, run: Run) -> None:
        super().__init__(cluster, run.path.parent, "--resume")
        self.run = run

    def attempt(self, number: int) -> Attempt:
        """The run's attempt of that number, once it is there."""
        return wait_for(lambda: (self.run.attempts()[number - 1 :] or [None])[0], f"attempt {number}: {self.said()}")

    def trained(self, steps: int, number: int | None = None) -> Attempt:
        """The attempt of that number, else the newest, once it has trained so many steps."""
        wait_for(self.run.attempts, "an attempt")
        attempt = self.run.attempts()[-1] if number is None else self.attempt(number)
        wait_for_steps(attempt, steps)
        return attempt

    def job_id(self) -> str:
        """Of the newest attempt."""
        return str(self.run.attempts()[-1].record()["job_id"])


@contextmanager
def orchestrated(cluster: Cluster, folder: Path, partition: str, **sections: Any) -> Iterator[Orchestrated]:
    """A run in a partition, with its orchestrator, until the block is left; ``sections`` lie over its config."""
    scheduler = {**SMALL, "partition": partition, **sections.pop("scheduler", {})}
    config = {"checkpoint": OFTEN_SAVED, **SLOW_ENOUGH, **sections}
    program = Orchestrated(cluster, make_run(folder / "runs", scheduler=scheduler, **config))
    try:
        yield program
    finally:
        program.kill()
        cluster.run("scancel", "--me")


@contextmanager
def everything_taken(cluster: Cluster) -> Iterator[None]:
    """A job of the partition ``high`` wants both nodes for itself."""
    with taken(cluster, "--exclusive"):
        yield


@contextmanager
def taken(cluster: Cluster, *options: str) -> Iterator[str]:
    """A job of the partition ``high`` on both nodes; its id."""
    more = ["-p", "high", "-N", "2", "--time=5", "--output=/dev/null", *options]
    job = cluster.run("sbatch", "--parsable", *more, "--wrap", "srun sleep 300").strip()
    try:
        yield job
    finally:
        cluster.run("scancel", job)
