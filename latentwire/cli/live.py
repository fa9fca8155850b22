"""What the schedulers say of the runs' jobs at this moment, for ``latentwire status --live``."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from latentwire.run.directory import Run
from latentwire.scheduler.jobs import Job, list_jobs
from latentwire.scheduler.queue import JobState, Queue, ask


def jobs_in_words(runs: Sequence[Run]) -> dict[str, str]:
    """Each run's name -> its newest job, why it waits and when it is expected to start. One call of squeue; blocks.

    Raises:
        SchedulerError: Slurm does not answer.
    """
    logging.getLogger("stamina").addHandler(logging.NullHandler())  # it retries in silence; the last failure is told
    jobs = {run.name: list_jobs(run) for run in runs}
    queue = ask([job for each in jobs.values() for job in each[-1:]])
    return {name: _in_words(each[-1], queue) if each else "no job yet" for name, each in jobs.items()}


def _in_words(job: Job, queue: Queue) -> str:
    state = queue.state_of(job)
    return f"{job.job_id} {'is over' if state is None else _state(state)}"


def _state(state: JobState) -> str:
    words = state.state
    if words == "PENDING":
        words += f" ({state.reason})" if state.reason else ""
        words += f", expected {_clock(state.start)}" if state.start else ""
    return words


def _clock(unix_s: float) -> str:
    """The time of day, and the date where it is not today's."""
    then = time.localtime(unix_s)
    is_today = time.strftime("%F", then) == time.strftime("%F")
    return time.strftime("%H:%M" if is_today else "%F %H:%M", then)
