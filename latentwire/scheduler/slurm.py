"""What a job asks of Slurm about itself, and how it has itself started again."""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
import signal
import subprocess
from collections.abc import Callable, Sequence

from latentwire.errors import SchedulerError

_TIMEOUT_S = 20.0
_REQUEUE_SENDS = (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR2)

Runner = Callable[[Sequence[str]], str]


@dataclasses.dataclass(frozen=True)
class Requeue:
    """Whether the job was put back into the queue, and why not."""

    done: bool
    reason: str


def run_inside_a_job(command: Sequence[str]) -> str:
    """Standard output of a Slurm command, tried once: a job that was given notice has no time for more.

    The command ignores the signals that its own effect sends to the job.

    Raises:
        SchedulerError: it is not there, failed, or did not answer.
    """

    def ignore() -> None:
        for signum in _REQUEUE_SENDS:
            signal.signal(signum, signal.SIG_IGN)

    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, preexec_fn=ignore
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SchedulerError(f"{' '.join(command)}: {error}") from None
    if done.returncode:
        raise SchedulerError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def signal_target(job_id: str, signum: signal.Signals) -> str:
    """What ``scancel -s`` is given, so that the job's processes get the signal and the job is not cancelled.

    A SIGKILL to the job is a plain scancel, after which nobody starts the run again; one to its step is a crash.
    """
    return f"{job_id}.0" if signum == signal.SIGKILL else job_id


def own_job_id() -> str | None:
    """The job that this process runs in, as Slurm's commands want it; None outside of any.

    The plain id of one task of an array is that of the whole array: to requeue it would start all its tasks again.
    """
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def show_job(job_id: str, runner: Runner = run_inside_a_job) -> dict[str, str]:
    """The fields of ``scontrol show job``.

    Raises:
        SchedulerError: Slurm did not answer or does not know the job.
    """
    return dict(re.findall(r"(\S+?)=(\S*)", runner(["scontrol", "show", "job", "-o", job_id])))


def end_time(job_id: str, runner: Runner = run_inside_a_job) -> float | None:
    """When Slurm means to end the job, in unix seconds: at preemption that is now + GraceTime. None: it did not say."""
    try:
        text = show_job(job_id, runner).get("EndTime", "")
        return datetime.datetime.fromisoformat(text).astimezone().timestamp()
    except (SchedulerError, ValueError):
        return None


def is_being_preempted(job_id: str, runner: Runner = run_inside_a_job) -> bool:
    """Whether the job's grace has begun. False where Slurm does not answer: the periodic saves are the guarantee."""
    try:
        return show_job(job_id, runner).get("PreemptTime", "None") not in ("None", "")
    except SchedulerError:
        return False


def requeue(job_id: str, runner: Runner = run_inside_a_job) -> Requeue:
    """Put the running job back into the queue, once; judged by its count of restarts having grown.

    Only while JobState is RUNNING: a job that is being cancelled must stay cancelled.
    """
    try:
        before = show_job(job_id, runner)
        if before.get("JobState") != "RUNNING":
            return Requeue(False, f"JobState is {before.get('JobState')}")
        runner(["scontrol", "requeue", job_id])
        after = show_job(job_id, runner)
    except SchedulerError as error:
        return Requeue(False, str(error))
    grown = int(after.get("Restarts", 0)) > int(before.get("Restarts", 0))
    return Requeue(grown, "requeued" if grown else "scontrol requeue had no effect")
