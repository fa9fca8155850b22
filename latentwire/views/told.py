"""What happened in a run, in words, and what its newest attempt printed."""

from __future__ import annotations

import itertools
import os
from typing import Any

from latentwire.run.atomic import open_to_read
from latentwire.run.directory import Attempt
from latentwire.run.journal import time_of
from latentwire.run.seen import SeenRun
from latentwire.run.telling import tell

NUM_EVENTS = 300
_LOG_BYTES = 16 * 1024
_LOG_LINES = 120
_GRAVE = ("ALARM", "WARNING")


def last_events(run: SeenRun) -> list[dict[str, Any]]:
    """What its writers told last, in words, the newest first; of those events that there are words for."""
    events = [{"attempt": None, "writer": "orchestrator"} | event for event in run.own_events()]
    for attempt in run.attempts():
        events += attempt.events()
    told = map(_told, sorted(events, key=time_of, reverse=True))
    return list(itertools.islice(filter(None, told), NUM_EVENTS))


def _told(event: dict[str, Any]) -> dict[str, Any] | None:
    words = tell(event)
    if words is None:
        return None
    grave = next((word for word in _GRAVE if words.startswith(word)), None)
    return {
        "time": time_of(event),
        "event": str(event.get("event")),
        "attempt": event["attempt"],
        "writer": event["writer"],
        "text": words if grave is None else words.removeprefix(grave).strip(),
        "level": "" if grave is None else grave.lower(),
    }


def log_tail(attempt: Attempt, name: str) -> str:
    """The last lines of a log; empty where there is none."""
    try:
        with open_to_read(attempt.path / name) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _LOG_BYTES))
            data = file.read()
    except OSError:
        return ""
    lines = data.decode("utf-8", "backslashreplace").split("\n")
    return "\n".join(lines[1 if size > _LOG_BYTES else 0 :][-_LOG_LINES - 1 :])
