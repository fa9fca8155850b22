"""The jobs that were submitted for a run: one record each, ``jobs/<number>.json``."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from latentwire.run.atomic import read_json, write_json
from latentwire.run.directory import Run
from latentwire.run.process import ProcessIdentity


@dataclasses.dataclass(frozen=True)
class Job:
    """A submitted job.

    Attributes:
        number: of the run's jobs, from 1.
        controller: the process that a local job lives in.
        after: of a successor: the job whose end it waits for.
    """

    number: int
    job_id: str
    scheduler: str
    submitted: float
    controller: ProcessIdentity | None
    after: str | None = None

    def is_alive(self) -> bool | None:
        """Whether a local job's controller runs; None where that cannot be told from here."""
        return None if self.controller is None else self.controller.is_alive()


def list_jobs(run: Run) -> list[Job]:
    """All jobs that were submitted for the run, oldest first."""
    numbers = sorted(int(p.stem) for p in (run.path / "jobs").glob("*.json") if p.stem.isdigit())
    return [job for number in numbers if (job := read_job(run, number)) is not None]


def read_job(run: Run, number: int) -> Job | None:
    """One submitted job, None if there is no such record."""
    record = read_json(run.path / "jobs" / f"{number:04d}.json")
    if not isinstance(record, dict):
        return None
    controller = ProcessIdentity.from_json(record.get("controller"))
    job_id, scheduler, submitted = str(record["job_id"]), str(record["scheduler"]), float(record["submitted"])
    return Job(number, job_id, scheduler, submitted, controller, record.get("after"))


def write_job(run: Run, number: int, job_id: str, scheduler: str, **more: Any) -> None:
    """Write down a job: one that was submitted, or that was found by its token."""
    (run.path / "jobs").mkdir(exist_ok=True)
    record = {"job_id": job_id, "scheduler": scheduler, "submitted": time.time(), **more}
    write_json(run.path / "jobs" / f"{number:04d}.json", record)
