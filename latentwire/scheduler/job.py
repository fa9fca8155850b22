"""TrainingJob: what submitit starts, once on each node of the allocation."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from latentwire.run.directory import Run


@dataclasses.dataclass(frozen=True)
class TrainingJob:
    """A picklable job that knows nothing but the run's directory: everything else it reads from the disk.

    It has no ``checkpoint`` method on purpose: submitit's would run inside a signal handler and again on the requeue's
    own TERM. The handlers of ours take over inside ``__call__``, and a restart resumes from the disk.
    """

    run_path: str
    scheduler: str = "local"

    def __call__(self) -> str:
        """Run the agent until it is done with this allocation; returns the last attempt's outcome. Main thread."""
        from latentwire.train.agent import Agent  # the one place where the scheduler's side meets the training side

        job_id = os.environ["SLURM_JOB_ID"] if self.scheduler == "slurm" else str(os.getppid())
        return Agent(Run(Path(self.run_path)), job_id, self.scheduler).main().outcome
