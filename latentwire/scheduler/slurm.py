"""What a job asks of Slurm about itself, and how it has itself started again."""

from __future__ import annotations

import dataclasses
import datetime
import re
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence

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


def own_job_id(environ: Mapping[str, str]) -> str | None:
    """The job that a process with this environment runs in, as Slurm's commands want it; None outside of any.

    The plain id of one task of an array is that of the whole array: to requeue it would start all its tasks again.
    """
    array = environ.get("SLURM_ARRAY_JOB_ID")
    return environ.get("SLURM_JOB_ID") if array is None else f"{array}_{environ['SLURM_ARRAY_TASK_ID']}"


def restart_count(environ: Mapping[str, str]) -> int:
    """How often the job that a process with this environment runs in was started again."""
    return int(environ.get("SLURM_RESTART_COUNT", 0))


def show_job(job_id: str, runner: Runner = run_inside_a_job) -> dict[str, str]:
    """The fields of ``scontrol show job``.

    Raises:
        SchedulerError: Slurm did not answer or does not know the job.
    """
    return _fields(runner(["scontrol", "show", "job", "-o", job_id]))


def grace_time(job_id: str, runner: Runner = run_inside_a_job) -> float | None:
    """Seconds between notice and kill when the job is preempted: the GraceTime of its partition, which may be 0.

    None: jobs of the partition are not ended by preemption, a QOS decides and has a grace of its own, or Slurm did not
    say. The job's record is asked for the partition, because SLURM_JOB_PARTITION lists all that were wished for.
    """
    try:
        if "preempt/partition_prio" not in runner(["scontrol", "show", "config"]):
            return None
        partition = show_job(job_id, runner).get("Partition", "")
        fields = _fields(runner(["scontrol", "show", "partition", "--all", "-o", partition]))
    except SchedulerError:
        return None
    is_ended = {"CANCEL", "REQUEUE"} & set(fields.get("PreemptMode", "").split(","))
    seconds = fields.get("GraceTime", "")
    return float(seconds) if is_ended and seconds.isdecimal() else None


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


def node_address(node: str, runner: Runner = run_inside_a_job) -> str | None:
    """The address by which Slurm's daemons reach a node. None: it did not say."""
    try:
        found = re.search(r"\bNodeAddr=(\S+)", runner(["scontrol", "show", "node", "-o", node]))
    except SchedulerError:
        return None
    return None if found is None else found[1]


def requeue(job_id: str, restart: int, runner: Runner = run_inside_a_job) -> Requeue:
    """Put the running job back into the queue, once; judged by its count of restarts having grown.

    Only while JobState is RUNNING: a job that is being cancelled must stay cancelled. And only by the start that the
    caller belongs to: on a node that was given up, a job that runs elsewhere by now would be thrown out there.

    Args:
        job_id: the job.
        restart: its count of restarts when the caller was started.
        runner: runs a command.
    """
    try:
        before = show_job(job_id, runner)
        if before.get("JobState") != "RUNNING":
            return Requeue(False, f"JobState is {before.get('JobState')}")
        if int(before.get("Restarts", 0)) != restart:
            return Requeue(False, f"it was started again elsewhere, {before.get('Restarts')} restarts so far")
        runner(["scontrol", "requeue", job_id])
        after = show_job(job_id, runner)
    except SchedulerError as error:
        return Requeue(False, str(error))
    grown = int(after.get("Restarts", 0)) > int(before.get("Restarts", 0))
    return Requeue(grown, "requeued" if grown else "scontrol requeue had no effect")


def _fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"(\S+?)=(\S*)", line))
