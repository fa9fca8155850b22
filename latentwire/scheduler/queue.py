"""Asking after jobs. A scheduler that does not answer is never taken for a job that has ended."""

from __future__ import annotations

import dataclasses
import datetime
import re
import subprocess
from collections.abc import Callable, Sequence

import stamina

from latentwire.errors import SchedulerError
from latentwire.scheduler.jobs import Job

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
_FIELDS = ("JobArrayID", "State", "Reason", "StartTime", "EligibleTime", "RestartCnt", "tres-per-node", "Comment")
# -a: also of hidden partitions. -t all: without it a job that is completing is left out. All jobs of the user, because
# squeue fails on an id that Slurm has forgotten.
_SQUEUE = ("squeue", "--noheader", "--me", "-a", "-r", "-t", "all", "-O", ",".join(f"{f}:|" for f in _FIELDS))

Runner = Callable[[Sequence[str]], str]


def run_once(command: Sequence[str]) -> str:
    """Standard output of a scheduler's command.

    Raises:
        SchedulerError: it failed or did not answer.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except subprocess.CalledProcessError as error:
        raise SchedulerError(f"{' '.join(command)}: exit {error.returncode}: {error.stderr.strip()}") from None
    except (subprocess.TimeoutExpired, OSError) as error:
        raise SchedulerError(f"{' '.join(command)}: {error}") from None
    return done.stdout


@stamina.retry(on=SchedulerError, attempts=3, wait_initial=1.0, wait_max=10.0)
def run_command(command: Sequence[str]) -> str:
    """Standard output of a scheduler's command; tried three times with growing pauses.

    Raises:
        SchedulerError: it failed or did not answer each time.
    """
    return run_once(command)


@dataclasses.dataclass(frozen=True)
class JobState:
    """What Slurm says of a job. Times in seconds since the epoch; None: not known.

    Attributes:
        state: PENDING, RUNNING, COMPLETING, ... as in Slurm.
        reason: why it waits.
        start: when it started, or is expected to.
        eligible: since when it may start: its submission, or after a requeue somewhat later.
        restarts: how often it was requeued.
        gpus_per_node: what it asks for.
        comment: the submission's token.
    """

    state: str
    reason: str = ""
    start: float | None = None
    eligible: float | None = None
    restarts: int = 0
    gpus_per_node: int | None = None
    comment: str = ""

    @property
    def is_live(self) -> bool:
        """Waiting, running or ending."""
        return self.state not in _GONE


class Queue:
    """All jobs at one moment, as far as their schedulers remember them."""

    def __init__(self, states: dict[str, JobState]) -> None:
        self._states = states

    def state_of(self, job: Job) -> JobState | None:
        """None: nobody remembers it, so it has ended."""
        return self._states.get(job.job_id)

    def is_live(self, job: Job) -> bool:
        """Waiting, running or ending."""
        state = self.state_of(job)
        return state is not None and state.is_live

    def was_cancelled(self, job: Job) -> bool:
        """By a person, or by an administrator."""
        state = self.state_of(job)
        return state is not None and state.state == "CANCELLED"

    def ids_with(self, comment: str) -> list[str]:
        """Jobs with that comment, tasks of an array one by one: those that live, and those that a person cancelled.

        Slurm also keeps a record of what it refused, as FAILED.
        """
        known = {job_id: state for job_id, state in self._states.items() if comment and state.comment == comment}
        return [job_id for job_id, state in known.items() if state.is_live or state.state == "CANCELLED"]


def ask(
    jobs: Sequence[Job], unknown_ones: bool = False, runner: Runner = run_command, accounting: Runner = run_once
) -> Queue:
    """The queue with at least these jobs: one call of squeue for any number of them; blocks for it.

    Args:
        jobs: of any scheduler.
        unknown_ones: ask Slurm also where none of ``jobs`` is its: one may have been submitted and not written down.
        runner: runs squeue.
        accounting: runs sacct, once: many a site has none.

    Slurm's controller forgets a job some minutes after its end (MinJobAge); what became of it then the accounting
    knows, where a site has one. ``scontrol show job`` asks the same controller and would add nothing.

    Raises:
        SchedulerError: the scheduler did not answer: nothing is known of its jobs.
    """
    states = {j.job_id: JobState("RUNNING") for j in jobs if j.scheduler == "local" and j.is_alive()}
    wanted = {job.job_id for job in jobs if job.scheduler == "slurm"}
    if not wanted and not unknown_ones:
        return Queue(states)
    states |= _parse_squeue(runner(_SQUEUE))
    forgotten = wanted - set(states)
    if forgotten:
        states |= _ask_the_accounting(forgotten, accounting)
    return Queue(states)


def _parse_squeue(text: str) -> dict[str, JobState]:
    rows = [line.split("|", len(_FIELDS) - 1) for line in text.splitlines() if line.count("|") >= len(_FIELDS) - 1]
    return {row[0].strip(): _job_state([cell.strip() for cell in row[1:]]) for row in rows}


def _job_state(cells: Sequence[str]) -> JobState:
    state, reason, start, eligible, restarts, tres, comment = cells
    gpus = re.search(r"gpu(?::[^:,=]+)?[:=](\d+)", tres)
    return JobState(
        state=state,
        reason="" if reason == "None" else reason,
        start=_unix_s(start),
        eligible=_unix_s(eligible),
        restarts=int(restarts) if restarts.isdecimal() else 0,
        gpus_per_node=int(gpus.group(1)) if gpus else None,
        comment=comment.strip("|").strip(),
    )


def _unix_s(text: str) -> float | None:
    try:
        return datetime.datetime.fromisoformat(text).astimezone().timestamp()
    except ValueError:  # N/A, Unknown
        return None


def _ask_the_accounting(job_ids: set[str], runner: Runner) -> dict[str, JobState]:
    """What the accounting remembers; nothing where a site has none: the job has ended all the same."""
    command = ["sacct", "--noheader", "--parsable2", "-X", "-j", ",".join(sorted(job_ids)), "-o", "JobID,State"]
    try:
        lines = runner(command).splitlines()
    except SchedulerError:
        return {}
    rows = [line.split("|") for line in lines if "|" in line]
    return {row[0]: JobState(row[1].split()[0]) for row in rows if row[0] in job_ids and row[1]}
