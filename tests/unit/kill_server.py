"""Forks processes that save checkpoints and kill themselves with SIGKILL at a chosen file-system operation.

``python kill_server.py`` reads one order per line and tells what came of it, in JSON. It is a process of its
own so that every order costs a fork, not the start of an interpreter.
"""

from __future__ import annotations

import builtins
import io
import itertools
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint_parts import open_manager, snapshot

from latentwire.run.directory import Run
from latentwire.run.journal import Journal

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Trap:
    """Counts the operations that change the disk and kills the process before the chosen one.

    A write counts twice: before it, and after its first half is written. ``kinds`` lists what was counted.
    """

    def __init__(self, kill_at: int | None) -> None:
        self.kinds: list[str] = []
        self._kill_at = kill_at
        self._lock = threading.Lock()

    def arm(self) -> None:
        """Put traps before the functions of ``os``, and under ``open``, which does not go through them."""
        for kind in ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir"):
            setattr(os, kind, self._before(kind, getattr(os, kind)))
        os.open = self._before("open", os.open, lambda path, flags, *_: bool(flags & _WRITES))
        os.write = self._halved(os.write)
        io.open = builtins.open = self._open(builtins.open)  # type: ignore[assignment]

    def point(self, kind: str, dying: Callable[[], Any] = lambda: None) -> None:
        """Count; die here if it is the chosen point, after the last act ``dying``."""
        with self._lock:
            self.kinds.append(kind)
            if len(self.kinds) == self._kill_at:
                dying()
                os.kill(os.getpid(), signal.SIGKILL)

    def _before(
        self, kind: str, function: Callable[..., Any], counts: Callable[..., bool] = lambda *_: True
    ) -> Callable[..., Any]:
        def trapped(*args: Any, **kwargs: Any) -> Any:
            if counts(*args):
                self.point(kind)
            return function(*args, **kwargs)

        return trapped

    def _halved(self, write: Callable[[int, Any], int]) -> Callable[[int, Any], int]:
        def trapped(descriptor: int, data: Any) -> int:
            view = memoryview(data).cast("B")
            self.point("write")
            self.point("half a write", lambda: write(descriptor, view[: view.nbytes // 2]))
            return write(descriptor, data)

        return trapped

    @staticmethod
    def _open(real: Callable[..., Any]) -> Callable[..., Any]:
        def trapped(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if mode != "x":
                assert not set(mode) & set("wa+x"), f"no trap for open(..., {mode!r})"
                return real(file, mode, *args, **kwargs)
            raw = _File(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
            return io.TextIOWrapper(io.BufferedWriter(raw), **kwargs)

        return trapped


class _File(io.RawIOBase):
    """A file whose writes go through ``os.write``, as those of ``open`` do not."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return os.write(self._descriptor, data)

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def train(run: Run, last_step: int | None, threads: int, trap: Trap) -> None:
    """An attempt as a job makes it: claim, clean up, restore, then a save a step, to the last or for ever."""
    trap.arm()
    attempt = run.claim_attempt(job_id="1", scheduler="local")
    journal = Journal(attempt.path / "events.rank0.jsonl")
    manager = open_manager(run.checkpoints, attempt.number, attempt.assert_newest, journal.event, threads=threads)
    manager.sweep()
    loaded = manager.restore(run.deadly_checkpoints(), attempt.mark_restoring)
    attempt.unmark_restoring()
    first = 1 if loaded is None else loaded.manifest.step + 1
    for step in itertools.count(first) if last_step is None else range(first, last_step + 1):
        manager.save(snapshot(step))
        manager.wait()
    manager.close()


def obey(order: dict[str, Any]) -> None:
    """Fork a process that trains with a trap; tell its pid, what it counted if it lived, and how it ended."""
    pid = os.fork()
    if pid == 0:
        try:
            trap = Trap(order["kill_at"])
            train(Run(Path(order["run"])), order["last_step"], order["threads"], trap)
            say(kinds=trap.kinds)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    say(pid=pid)
    _, status = os.waitpid(pid, 0)
    say(exit=os.waitstatus_to_exitcode(status))


def say(**answer: Any) -> None:
    """One line for the one who gave the order."""
    print(json.dumps(answer), flush=True)


def main() -> None:
    for line in sys.stdin:
        obey(json.loads(line))


if __name__ == "__main__":
    main()
