"""A run as it was when it was last looked at: each file is read once, and one that grows is read on.

``run_status`` and the ledger ask for the same events many times over, and whoever watches a run asks every second. They
ask a :class:`SeenRun`, which answers from memory; only ``look`` goes to the disk.
"""

from __future__ import annotations

import os
from typing import Any

from latentwire.run.directory import Attempt, Mark, Run
from latentwire.run.journal import Follower, time_of


class SeenRun(Run):
    """What was seen of a run. Nothing that it tells changes between two looks."""

    def __init__(self, run: Run) -> None:
        """Look for the first time. Does not block; upset by no half-written or missing file."""
        super().__init__(run.path)
        self._mark: Mark = None
        self._marks: dict[int, Mark] = {}
        self._attempts: dict[int, SeenAttempt] = {}
        self._follower = Follower(run.orchestrator_events)
        self._own_events: list[dict[str, Any]] = []
        self._is_cancelled = False
        self.look()

    def look(self) -> bool:
        """Read what was written since the last look; whether that was anything, or files vanished.

        A run or an attempt that was removed and made again under its name is another: it is read from its beginning.
        """
        before = self._mark, self._marks, self._is_cancelled
        self._look_for_another()
        self._is_cancelled = super().is_cancelled()
        changed = before != (self._mark, self._marks, self._is_cancelled)
        new = self._follower.read()
        self._own_events += new
        recent = list(self._attempts)[-2:]
        return any([changed, bool(new), *(each.look(each.number in recent) for each in self._attempts.values())])

    def _look_for_another(self) -> None:
        """Forget what was seen of a run, or of attempts, that are no longer those that were seen."""
        known, mark = self._marks, super().mark()
        if mark != self._mark:
            known, self._mark = {}, mark
            self._follower, self._own_events = Follower(self.orchestrator_events), []
        self._marks = {each.number: each.mark() for each in super().attempts()}
        same = {number for number, mark in self._marks.items() if number in known and known[number] == mark}
        self._attempts = {n: self._attempts[n] if n in same else SeenAttempt(self, n) for n in self._marks}

    def mark(self) -> Mark:
        """As of the last look."""
        return self._mark

    def attempts(self) -> list[Attempt]:
        """As of the last look."""
        return list(self._attempts.values())

    def own_events(self) -> list[dict[str, Any]]:
        """As of the last look."""
        return self._own_events

    def is_cancelled(self) -> bool:
        """As of the last look."""
        return self._is_cancelled


class SeenAttempt(Attempt):
    """What was seen of an attempt. Once it has ended with a word, and there are two newer, its files are let be."""

    def __init__(self, run: Run, number: int) -> None:
        """Nothing is read yet."""
        super().__init__(run, number)
        self._followers: dict[str, Follower] = {}
        self._events: list[dict[str, Any]] = []
        self._record: dict[str, Any] = {}
        self._placement: dict[str, Any] = {}
        self._environments: list[dict[str, Any]] = []
        self._last_step: dict[str, Any] = {}
        self._metrics_size = 0
        self._reached: dict[int, float | None] = {}
        self._end: dict[str, Any] | None = None

    def look(self, is_recent: bool) -> bool:
        """Read what was written since the last look; whether that was anything."""
        if self._end is not None and not is_recent:  # else it may yet be requeued, or another node say its last word
            return False
        self._record = self._record or super().record()
        self._placement = self._placement or super().placement()
        has_events = self._look_for_events()  # first: the last step of an ended attempt is then read for certain
        if has_events or not self._placement:  # each node's agent has an event to tell after it wrote its environment
            self._environments = super().environments()
        return self._look_for_steps() or has_events

    def _look_for_events(self) -> bool:
        new: list[dict[str, Any]] = []
        for path in self.event_files():
            follower = self._followers.setdefault(path.name, Follower(path))
            new += self._signed(follower.read(), path)
        self._events = sorted(self._events + new, key=_place) if new else self._events
        self._end = next((e for e in reversed(self._events) if _is_last_word(e)), None)
        return bool(new)

    def _look_for_steps(self) -> bool:
        try:
            size = os.stat(self.metrics_path).st_size
        except OSError:
            return False
        if size == self._metrics_size:
            return False
        self._metrics_size = size
        self._last_step = super().last_step()
        return True

    def record(self) -> dict[str, Any]:
        """As of the last look."""
        return self._record

    def placement(self) -> dict[str, Any]:
        """As of the last look."""
        return self._placement

    def environments(self) -> list[dict[str, Any]]:
        """As of the last look."""
        return self._environments

    def events(self) -> list[dict[str, Any]]:
        """As of the last look."""
        return self._events

    def ended(self) -> dict[str, Any] | None:
        """As of the last look."""
        return self._end

    def last_step(self) -> dict[str, Any]:
        """As of the last look."""
        return self._last_step

    def reached_at(self, step: int) -> float | None:
        """Looked up once it was reached."""
        if self._reached.get(step) is None:
            self._reached[step] = super().reached_at(step)
        return self._reached[step]


def _is_last_word(event: dict[str, Any]) -> bool:
    return event["writer"] == "agent" and event.get("event") == "attempt_ended"


def _place(event: dict[str, Any]) -> tuple[float, str]:
    """The order of ``Attempt.events``, whichever file was read on first."""
    return time_of(event), event["writer"]
