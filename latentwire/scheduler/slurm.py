"""What a job asks of Slurm about itself, and how it has itself started again."""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence

from latentwire.errors import SchedulerError

_TIMEOUT_S = 20.0
_EXIT_CODE_WITHIN_S = 5.0
_POLL_S = 0.2
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


def show_job(job_id: str, runner: Runner = run_inside_a_job) -> dict[str, str]:
    """The fields of ``scontrol show job``.

    Raises:
        SchedulerError: Slurm did not answer or does not know the job.
    """
    return dict(re.findall(r"(\S+?)=(\S*)", runner(["scontrol", "show", "job", "-o", job_id])))


def end_time(job_id: str, runner: Runner = run_inside_a_job, clock: Callable[[], float] = time.time) -> float | None:
    """When Slurm means to end the job, in unix seconds; None: it did not say.

    Asked after a notice. At preemption that is now + GraceTime. A job that is being ended already (scancel, requeue,
    time limit) has KillWait seconds from the notice on; its EndTime then is the past, or a guess at its next start.
    """
    try:
        job = show_job(job_id, runner)
        if job.get("JobState") != "RUNNING":
            return clock() + _kill_wait_s(runner)
        return datetime.datetime.fromisoformat(job.get("EndTime", "")).astimezone().timestamp()
    except (SchedulerError, ValueError):
        return None


def is_ending(job_id: str, runner: Runner = run_inside_a_job) -> bool:
    """Whether the job was given notice: its grace has begun, or it is being ended.

    False where Slurm does not answer: the periodic saves are the guarantee.
    """
    try:
        job = show_job(job_id, runner)
    except SchedulerError:
        return False
    return job.get("JobState") == "COMPLETING" or job.get("PreemptTime", "None") not in ("None", "")


def requeue(job_id: str, runner: Runner = run_inside_a_job) -> Requeue:
    """Put the running job back into the queue, once; judged by its count of restarts having grown.

    Only while JobState is RUNNING: a job that is being cancelled must stay cancelled, and one that somebody else has
    requeued (a person, or Slurm at the end of grace) needs no more.
    """
    try:
        before = show_job(job_id, runner)
        if before.get("JobState") != "RUNNING":
            already = _restarts(before) > _restarts_so_far()
            return Requeue(already, "Slurm has done so already" if already else f"JobState is {before.get('JobState')}")
        runner(["scontrol", "requeue", job_id])
        after = show_job(job_id, runner)
    except SchedulerError as error:
        return Requeue(False, str(error))
    grown = _restarts(after) > _restarts(before)
    return Requeue(grown, "requeued" if grown else "scontrol requeue had no effect")


def was_cancelled(job_id: str, runner: Runner = run_inside_a_job) -> bool:
    """Whether somebody cancelled the job (a plain scancel), beyond doubt. Asked by a job that was told to end.

    While processes of it live, Slurm shows COMPLETING whatever the cause; its other fields tell (measured on 22.05).
    A time limit, a dead node or a batch script that was killed leaves a Reason, a preemption a PreemptTime, a requeue
    another count of restarts, and a batch script that came to its end by itself an ExitCode other than 0:15. That code
    comes a moment after the signals: it is waited for, some seconds at most. No answer is no.
    """
    deadline = time.monotonic() + _EXIT_CODE_WITHIN_S
    while True:
        try:
            job = show_job(job_id, runner)
        except SchedulerError:
            return False
        untouched = job.get("Reason") == "None" and job.get("PreemptTime") == "None"
        ended = job.get("JobState") in ("COMPLETING", "CANCELLED")
        if not (ended and untouched and _restarts(job) == _restarts_so_far()):
            return False
        if job.get("ExitCode") != "0:0" or time.monotonic() > deadline:
            return job.get("ExitCode") == f"0:{int(signal.SIGTERM)}"
        time.sleep(_POLL_S)


def _restarts(job: dict[str, str]) -> int:
    return int(job.get("Restarts", 0))


def _restarts_so_far() -> int:
    """When this start of the job began; Slurm leaves the variable out in the first."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def _kill_wait_s(runner: Runner) -> float:
    found = re.search(r"^KillWait\s*=\s*(\d+)", runner(["scontrol", "show", "config"]), re.MULTILINE)
    if found is None:
        raise SchedulerError("scontrol show config has no KillWait")
    return float(found.group(1))
