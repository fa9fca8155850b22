"""A process that trains, or recovers, on a disk that fails; what it met goes to stdout, as JSON lines.

``python faulty_training.py '{"run": .., "what": "save", "calls": ["write"], "error": "ENOSPC", ..}'``, under LD_PRELOAD
of the library that faulty_disk.c becomes. The parent is test_faults.py.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import stamina
from checkpoint_parts import Events, assert_holds, commit, open_manager, snapshot

from latentwire.checkpoint import layout
from latentwire.errors import Fenced, NoUsableCheckpoint
from latentwire.run.directory import Attempt, Run
from latentwire.run.journal import Journal

FOR_GOOD = 1 << 30
SHORT = -1


class Fault:
    """What the disk does; see faulty_disk.c. ``struck`` counts how often."""

    def __init__(self, calls: list[str], error: str, delay_us: int = 0) -> None:
        self.struck = 0
        self._calls = f" {' '.join(calls)} ".encode()
        self._error = {"": 0, "short": SHORT}.get(error) if error in ("", "short") else getattr(errno, error)
        self._delay_us = delay_us
        self._library = ctypes.CDLL(None)

    @contextmanager
    def below(self, folder: Path, first: int = 1, times: int = FOR_GOOD) -> Iterator[None]:
        """From the ``first`` of these calls below the folder on, so many times."""
        self._library.faulty_arm(self._calls, bytes(folder), self._error, first, times, self._delay_us)
        try:
            yield
        finally:
            self.struck_last = self._library.faulty_disarm()
            self.struck += self.struck_last


def save(run: Run, fault: Fault) -> None:
    """The fault at each call of a save, once and then from there on; each time the disk is well again afterwards."""
    attempt, events = run.claim_attempt(job_id="1", scheduler="local"), Events()
    manager = open_manager(run.checkpoints, attempt.number, attempt.assert_newest, events, threads=3)
    steps = itertools.count(1)
    commit(manager, next(steps))
    for times in (1, FOR_GOOD):
        for first in itertools.count(1):
            failed = next(steps)
            with fault.below(run.checkpoints, first, times):
                commit(manager, failed)
            assert_nothing_lost(run, attempt, events, failed)
            commit(manager, next(steps))
            assert manager.failure is None, "the disk was well"
            if not fault.struck_last:
                break
    manager.close()
    say(events, fault)


def read(run: Run, fault: Fault) -> None:
    """The fault at each call of a recovery: once, then for the newest checkpoint, then for all."""
    attempt, events = run.claim_attempt(job_id="1", scheduler="local"), Events()
    commit(open_manager(run.checkpoints, attempt.number, event=events), 1, 2, 3)
    manager = open_manager(run.checkpoints, attempt.number, event=events)
    for first in itertools.count(1):
        with fault.below(run.checkpoints / layout.step_name(3), first, 1):
            assert_holds(manager.restore(), snapshot(3))
        if not fault.struck_last:
            break
    with fault.below(run.checkpoints / layout.step_name(3)):
        assert_holds(manager.restore(), snapshot(2))
    assert_holds(manager.restore(), snapshot(3))
    with fault.below(run.checkpoints / "step-"):
        try:
            manager.restore()
        except NoUsableCheckpoint as error:
            events("nothing_usable", error=str(error))
    assert_holds(manager.restore(), snapshot(3))
    assert not events.named("checkpoint_quarantined"), "nothing was wrong with the bytes"
    manager.close()
    say(events, fault)


def steadily(run: Run, fault: Fault) -> None:
    """A disk or a clock that is bad all the time and fails nothing."""
    attempt, events = run.claim_attempt(job_id="1", scheduler="local"), Events()
    with fault.below(run.path):
        manager = open_manager(run.checkpoints, attempt.number, attempt.assert_newest, events, threads=3)
        commit(manager, *range(1, 21))
        assert_nothing_lost(run, attempt, events, 0)
        commit(open_manager(run.checkpoints, attempt.number + 1, event=events), 21)
    assert not events.named("save_failed")
    manager.close()
    say(events, fault)


def rival(run: Run, fault: Fault) -> None:
    """Claims the run, so that whoever had it is fenced, and saves until it is itself."""
    attempt = run.claim_attempt(job_id="1", scheduler="local")
    journal = Journal(attempt.path / "events.rank0.jsonl")

    def tell(name: str, **fields: Any) -> None:
        journal.event(name, **fields)
        print(json.dumps({"event": name, **fields}), flush=True)

    manager = open_manager(run.checkpoints, attempt.number, attempt.assert_newest, tell, threads=3)
    with fault.below(run.checkpoints):
        manager.sweep()
        loaded = manager.restore()
        first = 1 if loaded is None else loaded.manifest.step + 1
        tell("restored", step=first - 1)
        try:
            for step in itertools.count(first):
                commit(manager, step)
        except Fenced as error:
            tell("fenced", error=str(error))


def assert_nothing_lost(run: Run, attempt: Attempt, events: Events, failed: int) -> None:
    """Who looks now finds the newest announced checkpoint, or the one of the failed save, whole."""
    promised = max(event["step"] for event in events.named("save_committed"))
    loaded = open_manager(run.checkpoints, attempt.number).restore()
    assert loaded is not None
    assert loaded.manifest.step in {promised, failed} - set(range(promised))
    assert_holds(loaded, snapshot(loaded.manifest.step))


def say(events: Events, fault: Fault) -> None:
    for event in events:
        print(json.dumps(event))
    print(json.dumps({"event": "struck", "times": fault.struck}))


if __name__ == "__main__":
    order = json.loads(sys.argv[1])
    stamina.set_testing(True, attempts=3)  # tries as often, without the pauses
    what = {"save": save, "read": read, "steadily": steadily, "rival": rival}[order["what"]]
    what(Run(Path(order["run"])), Fault(order["calls"], order["error"], order.get("delay_us", 0)))
