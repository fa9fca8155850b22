"""Asking after jobs. A scheduler that does not answer is never taken for a job that has ended."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable, Sequence

import stamina

from latentwire.errors import SchedulerError
from latentwire.scheduler.submission import Job

_GONE = {
    "COMPLETED",
    "CANCELLED",
    "FAILED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "BOOT_FAIL",
    "DEADLINE",
    "OUT_OF_MEMORY",
}
_TIMEOUT_S = 30.0

Runner = Callable[[Sequence[str]], str]


def run_command(command: Sequence[str]) -> str:
    """Standard output of a scheduler's command; tried three times with growing pauses.

    Raises:
        SchedulerError: it failed or did not answer each time.
    """
    try:
        for attempt in stamina.retry_context(
            on=(subprocess.SubprocessError, OSError), attempts=3, wait_initial=1.0, wait_max=10.0
        ):
            with attempt:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except subprocess.CalledProcessError as error:
        raise SchedulerError(f"{' '.join(command)}: exit {error.returncode}: {error.stderr.strip()}") from None
    except (subprocess.TimeoutExpired, OSError) as error:
        raise SchedulerError(f"{' '.join(command)}: {error}") from None
    return done.stdout


@dataclasses.dataclass(frozen=True)
class JobStates:
    """What became of jobs. A job in neither set is gone, and nobody cancelled it (or Slurm has forgotten it)."""

    live: frozenset[str]
    cancelled: frozenset[str]


def job_states(jobs: Sequence[Job], runner: Runner = run_command) -> JobStates:
    """Which of the jobs are waiting, running or ending, and which were cancelled; one call for any number of jobs.

    Raises:
        SchedulerError: the scheduler did not answer: nothing is known of its jobs.
    """
    live = {job.job_id for job in jobs if job.scheduler == "local" and job.is_alive()}
    slurm = {job.job_id for job in jobs if job.scheduler == "slurm"}
    if not slurm:
        return JobStates(frozenset(live), frozenset())
    # Without -t all squeue leaves out a job that is completing; it fails on an id that it has forgotten, so ask for all
    # of the user's jobs and pick.
    lines = runner(["squeue", "--noheader", "--me", "-t", "all", "-o", "%i %T"]).splitlines()
    states = dict(line.strip().split(" ", 1) for line in lines if " " in line.strip())
    live |= {job_id for job_id in slurm if states.get(job_id, "COMPLETED") not in _GONE}
    return JobStates(frozenset(live), frozenset(job_id for job_id in slurm if states.get(job_id) == "CANCELLED"))
