"""What happened in a run, in words, and what its newest attempt printed."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentwire.run.directory import Attempt, Run
from latentwire.run.journal import Follower, time_of
from latentwire.run.telling import tell

NUM_EVENTS = 300
_LOG_BYTES = 16 * 1024
_LOG_LINES = 120
_GRAVE = ("ALARM", "WARNING")


class EventsView:
    """Follows the journals of a run."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._followers: dict[Path, Follower] = {}
        self._closed: set[int] = set()
        self._told: collections.deque[dict[str, Any]] = collections.deque(maxlen=NUM_EVENTS)

    def read(self) -> list[dict[str, Any]] | None:
        """The last events, the newest first; None where there are no new ones."""
        new = sorted(self._new(), key=lambda told: told["time"])
        if not new:
            return None
        self._told.extend(new)
        return self.snapshot()

    def snapshot(self) -> list[dict[str, Any]]:
        """As of the last read."""
        return sorted(self._told, key=lambda told: -told["time"])

    def _new(self) -> Iterator[dict[str, Any]]:
        yield from self._new_of(None, self._run.orchestrator_events)
        attempts = self._run.attempts()
        for attempt in attempts:
            if attempt.number not in self._closed:
                for path in attempt.event_files():
                    yield from self._new_of(attempt.number, path)
            if attempt not in attempts[-2:]:
                self._closed.add(attempt.number)

    def _new_of(self, attempt: int | None, path: Path) -> Iterator[dict[str, Any]]:
        for event in self._followers.setdefault(path, Follower(path)).read():
            words = tell(event)
            if words is not None:
                yield _told(event, words, attempt, path.name.split(".")[1])


def _told(event: dict[str, Any], words: str, attempt: int | None, writer: str) -> dict[str, Any]:
    grave = next((word for word in _GRAVE if words.startswith(word)), None)
    return {
        "time": time_of(event),
        "event": str(event.get("event")),
        "attempt": attempt,
        "writer": writer,
        "text": words if grave is None else words.removeprefix(grave).strip(),
        "level": "" if grave is None else grave.lower(),
    }


def log_tail(attempt: Attempt, name: str) -> str:
    """The last lines of a log; empty where there is none."""
    try:
        with open(attempt.path / name, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _LOG_BYTES))
            data = file.read()
    except OSError:
        return ""
    lines = data.decode("utf-8", "backslashreplace").split("\n")
    return "\n".join(lines[1 if size > _LOG_BYTES else 0 :][-_LOG_LINES - 1 :])
