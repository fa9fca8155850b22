"""A run has one orchestrator at a time."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from latentwire.errors import RunBusy
from latentwire.run.atomic import read_json, write_json
from latentwire.run.process import ProcessIdentity

STALE_AFTER_S = 180.0


class Lease:
    """The right to submit jobs for a run: a file that names its holder, renewed while it is held.

    A holder on this host is judged by its process, a holder on another host by its last renewal; one that was the same
    Slurm job before it was started again is gone. The small window of
    taking over is closed by a file lock; where the file system has none, the attempts' fencing tokens still keep two
    jobs of one run from both committing.

    Args:
        path: the lease file.
        clock: seconds since the epoch.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._me = ProcessIdentity.of()
        self._job_id = os.environ.get("SLURM_JOB_ID")

    def acquire(self) -> None:
        """Take the lease, from nobody, from ourselves or from a dead holder. Does not wait.

        Raises:
            RunBusy: a living orchestrator holds it.
        """
        with self._lock():
            holder = self.holder()
            if holder not in (None, self._me):
                assert holder is not None
                raise RunBusy(
                    f"{self.path.parent.name} is held by the orchestrator with pid {holder.pid} on {holder.host}; "
                    f"stop that one first ({self.how_to_stop()}), or look on with: latentwire status"
                )
            self._write()

    def renew(self) -> None:
        """Say that we are still here; at least once a minute.

        Raises:
            RunBusy: we did not for so long that another orchestrator took over.
        """
        named = self._named(read_json(self.path))
        if named not in (None, self._me):
            assert named is not None
            raise RunBusy(
                f"{self.path.parent.name} was taken over by the orchestrator with pid {named.pid} on {named.host} "
                "while this one did not renew its lease: this one submits nothing more for it"
            )
        self._write()

    def _write(self) -> None:
        record = {"holder": dataclasses.asdict(self._me), "renewed": self._clock(), "job_id": self._job_id}
        write_json(self.path, record)

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
        if self._job_id is not None and record.get("job_id") == self._job_id and holder != self._me:
            return None  # ourselves before a requeue, on this node or another
        alive = holder.is_alive()
        if alive is None:
            alive = self._clock() - float(record.get("renewed", 0)) < STALE_AFTER_S
        return holder if alive else None

    def how_to_stop(self) -> str:
        """What a person types to end the holder; its jobs go on."""
        record = read_json(self.path)
        holder, job_id = self._named(record), record.get("job_id") if isinstance(record, dict) else None
        if job_id is not None:
            return f"scancel {job_id}"
        return "it is gone" if holder is None else f"kill -TERM {holder.pid}"

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
