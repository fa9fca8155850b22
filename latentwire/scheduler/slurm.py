"""What a job asks of Slurm about itself, and how it has itself started again."""

from __future__ import annotations

import dataclasses
import datetime
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

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


def signal_target(job_id: str, signum: signal.Signals) -> str:
    """What ``scancel -s`` is given, so that the job's processes get the signal and the job is not cancelled.

    A SIGKILL to the job is a plain scancel, after which nobody starts the run again; one to its step is a crash.
    """
    return f"{job_id}.0" if signum == signal.SIGKILL else job_id


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


def partitions(runner: Runner = run_inside_a_job) -> dict[str, dict[str, str]]:
    """The fields of ``scontrol show partition`` for each partition by its name, hidden ones too.

    Raises:
        SchedulerError: Slurm did not answer.
    """
    every = map(_fields, runner(["scontrol", "show", "partition", "--all", "-o"]).splitlines())
    return {fields["PartitionName"]: fields for fields in every if "PartitionName" in fields}


def settings(runner: Runner = run_inside_a_job) -> dict[str, str]:
    """The site's settings by name, as ``scontrol show config`` has them.

    Raises:
        SchedulerError: Slurm did not answer.
    """
    return dict(re.findall(r"^(\S+)\s*= (.*?)\s*$", runner(["scontrol", "show", "config"]), re.MULTILINE))


def grace_time(job_id: str, runner: Runner = run_inside_a_job) -> float | None:
    """Seconds between notice and kill when the job is preempted: the GraceTime of its partition, which may be 0.

    None: jobs of the partition are not ended by preemption, a QOS decides and has a grace of its own, or Slurm did not
    say. The job's record is asked for the partition, because SLURM_JOB_PARTITION lists all that were wished for.
    """
    try:
        if settings(runner).get("PreemptType") != "preempt/partition_prio":
            return None
        fields = partitions(runner).get(show_job(job_id, runner).get("Partition", ""), {})
    except SchedulerError:
        return None
    is_ended = {"CANCEL", "REQUEUE"} & set(fields.get("PreemptMode", "").split(","))
    seconds = fields.get("GraceTime", "")
    return float(seconds) if is_ended and seconds.isdecimal() else None


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
    caller belongs to: a job that somebody else has requeued needs no more (a person, or Slurm at the end of grace), and
    on a node that was given up, a job that runs elsewhere by now would be thrown out there.

    Args:
        job_id: the job.
        restart: its count of restarts when the caller was started.
        runner: runs a command.
    """
    try:
        before = show_job(job_id, runner)
        if _restarts(before) > restart:
            return Requeue(True, "Slurm has done so already")
        if before.get("JobState") != "RUNNING":
            return Requeue(False, f"JobState is {before.get('JobState')}")
        runner(["scontrol", "requeue", job_id])
        after = show_job(job_id, runner)
    except SchedulerError as error:
        return Requeue(False, str(error))
    grown = _restarts(after) > _restarts(before)
    return Requeue(grown, "requeued" if grown else "scontrol requeue had no effect")


def was_cancelled(job_id: str, restart: int, runner: Runner = run_inside_a_job) -> bool:
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
        if not (ended and untouched and _restarts(job) == restart):
            return False
        if job.get("ExitCode") != "0:0" or time.monotonic() > deadline:
            return job.get("ExitCode") == f"0:{int(signal.SIGTERM)}"
        time.sleep(_POLL_S)


def was_cancelled_in_the_queue(job_id: str, runner: Runner = run_inside_a_job) -> bool:
    """Whether somebody cancelled a job that never ran. No answer is no."""
    try:
        job = show_job(job_id, runner)
    except SchedulerError:
        return False
    return job.get("JobState") == "CANCELLED" and job.get("RunTime") == "00:00:00"


def _restarts(job: dict[str, str]) -> int:
    return int(job.get("Restarts", 0))


def _kill_wait_s(runner: Runner) -> float:
    found = re.match(r"\d+", settings(runner).get("KillWait", ""))
    if found is None:
        raise SchedulerError("scontrol show config has no KillWait")
    return float(found[0])


def _fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"(\S+?)=(\S*)", line))
