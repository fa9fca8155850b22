"""A word to a running attempt, sent the way the scheduler sends it; for the command line and the dashboard."""

from __future__ import annotations

import os
import signal
import subprocess
import time

from latentwire.errors import RunError, SchedulerError
from latentwire.run.directory import Attempt, Run
from latentwire.run.process import node_name
from latentwire.run.status import is_running, run_status
from latentwire.scheduler.jobs import list_jobs
from latentwire.scheduler.slurm import signal_target


def signal_run(run: Run, signum: signal.Signals) -> str:
    """Send the running attempt a signal; says to what it went. Blocks while Slurm answers.

    Args:
        run: whose newest attempt is to hear it.
        signum: TERM, USR2: the machine is taken away. USR1: save and go on. INT: save and leave. KILL: no warning.

    Raises:
        RunError: the run is not running, or runs where its process cannot be reached.
        SchedulerError: Slurm refused or could not be asked.
    """
    return _send(_needed(run, "preempt"), signum)


def save_run(run: Run) -> str:
    """Ask the running attempt to save and go on, by the signal of its config; says to what that went.

    Blocks while Slurm answers.

    Raises:
        ConfigError: the run's config was damaged.
        RunError: the run takes no such signal, is not running, or runs where its process cannot be reached.
        SchedulerError: Slurm refused or could not be asked.
    """
    attempt = _needed(run, "save")
    name = run.config().preemption.save_signal
    if name == "none":
        raise RunError(
            f"{run.name} cannot be asked to save: its config has preemption.save_signal: none. "
            "Set it to USR1 and start the run again; it saves by itself all the same"
        )
    return _send(attempt, signal.Signals[f"SIG{name}"])


def cancel_run(run: Run) -> list[str]:
    """Let a run save and leave, and let nobody start it again; says what was done. Blocks while Slurm answers.

    Raises:
        RunError: it is finished, or runs where its process cannot be reached.
        SchedulerError: Slurm could not be reached; the mark on the disk stands all the same.
    """
    attempts = run.attempts()
    ended = attempts[-1].ended() if attempts else None
    if ended is not None and ended.get("outcome") == "finished":
        raise RunError(f"{run.name} is finished: there is nothing to cancel")
    _write_mark(run)  # before the signal: whoever sees the attempt end must see the mark
    try:
        return _stop(run)
    except SchedulerError as error:
        raise SchedulerError(
            f"{error}; the cancel itself is on disk: {run.name} ends at its next stop. Try again where Slurm "
            f"answers, or take it back: python -m latentwire.orchestrate --resume {run.name}"
        ) from None


def _write_mark(run: Run) -> None:
    import getpass

    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a uid without a name, as in many containers
        user = f"uid {os.getuid()}"
    run.mark_cancelled(user=user, host=node_name(), pid=os.getpid())


def _stop(run: Run) -> list[str]:
    """End what runs and what waits in the queue; says what was done."""
    attempt = _running(run)
    job_id = _slurm_job(run)
    if job_id is not None:
        try:
            _scancel(job_id)
        except SchedulerError as error:
            if attempt is not None:
                raise
            return [f"{run.name} is not running, and no job of it waits ({error})"]
        return [f"cancelled Slurm job {job_id} of {run.name}: what runs of it saves and leaves"]
    if attempt is None:
        return [f"{run.name} is not running: {_why_not(run)}"]
    return [f"sent SIGTERM to {_send(attempt, signal.SIGTERM)}: it saves and leaves"]


def _running(run: Run) -> Attempt | None:
    """The newest attempt if it is alive."""
    return run.attempts()[-1] if is_running(run, time.time()) else None


def _needed(run: Run, verb: str) -> Attempt:
    """The newest attempt, which must be alive for what is wanted of it."""
    attempt = _running(run)
    if attempt is None:
        raise RunError(f"{run.name} is not running, so there is nothing to {verb}: {_why_not(run)}")
    return attempt


def _why_not(run: Run) -> str:
    status = run_status(run)
    return f"it is {status.state}" + (f" ({status.reason})" if status.reason else "")


def _slurm_job(run: Run) -> str | None:
    """The newest Slurm job: of the newest attempt, or one that was submitted and has not started yet."""
    jobs = list_jobs(run)
    if jobs:
        return jobs[-1].job_id if jobs[-1].scheduler == "slurm" else None
    attempts = run.attempts()
    record = attempts[-1].record() if attempts else {}
    return str(record["job_id"]) if record.get("scheduler") == "slurm" else None


def _send(attempt: Attempt, signum: signal.Signals) -> str:
    """Send a signal to a living attempt; says to what."""
    record = attempt.record()
    of = f"attempt {attempt.number} of {attempt.run.name}"
    if record.get("scheduler") == "slurm":
        _scancel(signal_target(str(record["job_id"]), signum), "-s", signum.name.removeprefix("SIG"))
        return f"Slurm job {record['job_id']}, {of}"
    agent = attempt.agent()
    if agent is None or not agent.send(signum):
        where = "" if agent is None else f" (pid {agent.pid} on {agent.host})"
        raise RunError(f"the agent of {of}{where} could not be reached: it ended just now, or this is not its host")
    return f"the agent of {of} (pid {agent.pid} on {agent.host})"


def _scancel(job_id: str, *options: str) -> None:
    command = ["scancel", *options, job_id]
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except FileNotFoundError:
        raise SchedulerError(f"there is no scancel on PATH to reach job {job_id}: log in to the cluster") from None
    if result.returncode:
        raise SchedulerError(f"{' '.join(command)}: {result.stderr.strip() or f'exit {result.returncode}'}")
