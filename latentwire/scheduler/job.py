"""TrainingJob: what submitit starts, once on each node of the allocation."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from latentwire.preemption.handler import blocked
from latentwire.run.atomic import write_json
from latentwire.run.directory import Attempt, Run
from latentwire.run.journal import Journal
from latentwire.scheduler import slurm


@dataclasses.dataclass(frozen=True)
class LocalAllocation:
    """A job of the local executor: nobody takes its machine away but a person."""

    job_id: str
    scheduler: str = "local"

    def end_unix_s(self) -> float | None:
        """Not known."""
        return None


@dataclasses.dataclass(frozen=True)
class SlurmAllocation:
    """A Slurm job."""

    job_id: str
    scheduler: str = "slurm"

    def end_unix_s(self) -> float | None:
        """What Slurm says now: the end of the grace, or of KillWait where the job is being ended."""
        return slurm.end_time(self.job_id)


@dataclasses.dataclass(frozen=True)
class TrainingJob:
    """A picklable job that knows nothing but the run's directory: everything else it reads from the disk.

    It has no ``checkpoint`` method on purpose: submitit's would run inside a signal handler and again on the requeue's
    own TERM. The handlers of ours take over inside ``__call__``, and a restart resumes from the disk.
    """

    run_path: str
    scheduler: str = "local"

    def __call__(self) -> str:
        """Run the agent until it is done with this allocation; returns the last attempt's outcome. Main thread.

        A preempted Slurm job puts itself back into the queue and does not return: what submitit wrote after a return
        would end the job for good.
        """
        from latentwire.train.agent import Agent  # the one place where the scheduler's side meets the training side

        run = Run(Path(self.run_path))
        if self.scheduler != "slurm":
            return Agent(run, LocalAllocation(str(os.getppid()))).main().outcome
        job_id = os.environ["SLURM_JOB_ID"]
        known = run.newest_number()
        with blocked():  # the agent's handlers unblock them, so that a notice is either found here or heard there
            ending = slurm.is_ending(job_id)
            outcome = "preempted" if ending else Agent(run, SlurmAllocation(job_id)).main().outcome
        if outcome == "preempted":
            _give_back(run, job_id, run.attempts()[known:])
        return outcome


def _give_back(run: Run, job_id: str, attempts: list[Attempt]) -> None:
    """Have the job started again, and end it here; where that cannot be, say so and return.

    Args:
        run: the run.
        job_id: of this job.
        attempts: those of this start of the job.
    """
    result = slurm.requeue(job_id)
    end = attempts[-1].end_unix_s() if attempts else None
    given_back_s = None if end is None else round(end - time.time(), 1)
    _write_down(attempts, "requeue", done=result.done, reason=result.reason, given_back_s=given_back_s)
    if result.done:
        os._exit(0)
    if slurm.was_cancelled(job_id) and not run.cancel_path.exists():  # Slurm forgets it in minutes, the run does not
        write_json(run.cancel_path, {"time": time.time(), "by": f"scancel of job {job_id}"})
        _write_down(attempts, "job_cancelled", job_id=job_id)


def _write_down(attempts: list[Attempt], event: str, **fields: Any) -> None:
    if attempts:
        journal = Journal(attempts[-1].path / "events.agent.jsonl")
        journal.event(event, **fields)
        journal.sync()
        journal.close()
