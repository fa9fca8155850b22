"""TrainingJob: what submitit starts, once on each node of the allocation."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

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
        """EndTime as Slurm gives it now: during grace that is its end."""
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
        job_id = slurm.own_job_id()
        assert job_id is not None
        if slurm.is_being_preempted(job_id):  # the notice came before anybody could hear it
            outcome = "preempted"
        else:
            outcome = Agent(run, SlurmAllocation(job_id)).main().outcome
        if outcome == "preempted":
            _requeue(run, job_id)
        return outcome


def _requeue(run: Run, job_id: str) -> None:
    result = slurm.requeue(job_id)
    attempts = [attempt for attempt in run.attempts() if attempt.record().get("job_id") == job_id]
    if attempts:
        _write_down(attempts[-1], result)
    if result.done:
        os._exit(0)


def _write_down(attempt: Attempt, result: slurm.Requeue) -> None:
    end = attempt.end_unix_s()
    journal = Journal(attempt.path / "events.agent.jsonl")
    given_back_s = None if end is None else round(end - time.time(), 1)
    journal.event("requeue", done=result.done, reason=result.reason, given_back_s=given_back_s)
    journal.sync()
    journal.close()
