"""Forks processes that save checkpoints and kill themselves with SIGKILL at a chosen file-system operation.

``python kill_server.py`` reads one order per line and tells what came of it, in JSON. It is a process of its
own so that every order costs a fork, not the start of an interpreter.
"""

from __future__ import annotations

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
from watched_os import WRITING, WatchedOs

from latentwire.run.directory import Run
from latentwire.run.journal import Journal

_COUNTED = {"open", "write", "pwrite", "writev", "fsync", "fdatasync"}
_COUNTED |= {"rename", "replace", "link", "unlink", "mkdir", "rmdir"}


class Trap:
    """Counts the operations that change the disk and kills the process before the chosen one.

    A write counts twice: before it, and after its first half is written. ``kinds`` lists what was counted.
    """

    def __init__(self, kill_at: int | None) -> None:
        self.kinds: list[str] = []
        self._kill_at = kill_at
        self._lock = threading.Lock()

    def around(self, kind: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Before an operation of the disk; see ``WatchedOs``."""
        if kind in _COUNTED and (kind != "open" or args[1] & WRITING):
            self._point(kind)
        if kind == "write":
            descriptor, data = args
            view = memoryview(data).cast("B")
            self._point("half a write", lambda: function(descriptor, view[: view.nbytes // 2]))
        return function(*args, **kwargs)

    def _point(self, kind: str, dying: Callable[[], Any] = lambda: None) -> None:
        """Count; die here if it is the chosen point, after the last act ``dying``."""
        with self._lock:
            self.kinds.append(kind)
            if len(self.kinds) == self._kill_at:
                dying()
                os.kill(os.getpid(), signal.SIGKILL)


def train(run: Run, last_step: int | None, threads: int, trap: Trap) -> None:
    """An attempt as a job makes it: claim, clean up, restore, then a save a step, to the last or for ever."""
    WatchedOs(trap.around).__enter__()  # for good: the process ends with the attempt
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
