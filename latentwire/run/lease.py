"""A run has one orchestrator at a time."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from latentwire.errors import RunBusy
from latentwire.run.atomic import read_json, write_json
from latentwire.run.directory import PREFIX
from latentwire.run.figures import number
from latentwire.run.process import ProcessIdentity

STALE_AFTER_S = 180.0


class Lease:
    """The right to submit jobs for a run: a file that names its holder, renewed while it is held.

    A holder on this host is judged by its process, a holder on another host by its last renewal; one that was an
    earlier start of the Slurm job that we run in is gone, and any other in that job is a stranger. The small window of
    taking over is closed by a file lock; where the file system has none, the attempts' fencing tokens still keep two
    jobs of one run from both committing.

    Args:
        path: the lease file.
        clock: seconds since the epoch.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._run = path.parent.name.removeprefix(PREFIX)
        self._clock = clock
        self._me = ProcessIdentity.of()
        self._job = _own_job(os.environ)

    def acquire(self) -> None:
        """Take the lease, from nobody, from ourselves or from a dead holder. Does not wait.

        Raises:
            RunBusy: a living orchestrator holds it.
        """
        with self._lock():
            self.refuse_if_held()
            self._write()

    def refuse_if_held(self) -> None:
        """Tell a person who holds it, and what to do. Reads only.

        Raises:
            RunBusy: a living orchestrator, which is not this process, holds it.
        """
        holder = self.holder()
        if holder not in (None, self._me):
            assert holder is not None
            raise RunBusy(
                f"{self._run} is held by the orchestrator with pid {holder.pid} on {holder.host}; "
                f"stop that one first ({self.how_to_stop()}), or look on with: latentwire status"
            )

    def renew(self) -> None:
        """Say that we are still here; at least once a minute.

        Raises:
            RunBusy: we did not for so long that another orchestrator took over.
        """
        named = self._named(read_json(self.path))
        if named not in (None, self._me):
            assert named is not None
            raise RunBusy(
                f"{self._run} was taken over by the orchestrator with pid {named.pid} on {named.host} "
                "while this one did not renew its lease: this one submits nothing more for it"
            )
        self._write()

    def _write(self) -> None:
        record = {"holder": dataclasses.asdict(self._me), "renewed": self._clock()}
        write_json(self.path, record if self._job is None else record | {"job": dataclasses.asdict(self._job)})

    def release(self) -> None:
        """Give the lease back if it is ours."""
        if self.holder() == self._me:
            self.path.unlink(missing_ok=True)

    def holder(self) -> ProcessIdentity | None:
        """The living holder, or None."""
        record = read_json(self.path)
        holder = self._named(record)
        if holder is None:
            return None
        if self._job is not None and self._job.follows(record.get("job")):
            return None  # it was on this node or another
        alive = holder.is_alive()
        if alive is None:
            alive = self._clock() - (number(record.get("renewed")) or 0.0) < STALE_AFTER_S
        return holder if alive else None

    def how_to_stop(self) -> str:
        """What a person types to end the holder; its jobs go on."""
        record = read_json(self.path)
        holder = self._named(record)
        if holder is None:
            return "it is gone"
        job = record.get("job")
        return f"scancel {job['id']}" if job and job["is_batch"] else f"kill -TERM {holder.pid} there"

    @staticmethod
    def _named(record: Any) -> ProcessIdentity | None:
        return ProcessIdentity.from_json(record.get("holder")) if isinstance(record, dict) else None

    @contextmanager
    def _lock(self) -> Iterator[None]:
        descriptor = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with suppress(OSError):  # Lustre mounted without locks; see above
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


@dataclasses.dataclass(frozen=True)
class _Job:
    """The Slurm job that an orchestrator runs in.

    Attributes:
        restart: how often it had been started again.
        is_batch: the orchestrator is what a batch script starts with srun, and nobody types there.
    """

    id: str
    restart: int
    is_batch: bool

    def follows(self, record: Any) -> bool:
        """Whether the recorded job is an earlier start of this one."""
        return isinstance(record, dict) and record["id"] == self.id and record["restart"] < self.restart


def _own_job(environ: Mapping[str, str]) -> _Job | None:
    if "SLURM_JOB_ID" not in environ:
        return None
    is_batch = environ.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" in environ  # of sbatch; of srun
    return _Job(environ["SLURM_JOB_ID"], int(environ.get("SLURM_RESTART_COUNT", 0)), is_batch)
