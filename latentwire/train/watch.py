"""Who keeps whom waiting: every rank says where it stands, and the first node's agent names those that do not come.

A rank's main thread notes in memory when it enters and leaves a collective. A thread beside it looks at the note, and
writes to the rank's journal when it has not changed for half of ``elastic.hang_s``: ``waiting`` in a collective,
``stuck`` outside of any, ``goes_on`` when that is over. A process that is stopped can write nothing, and need not: the
words of those that wait for it tell as much. No torch here: the agent reads what the ranks write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

from latentwire.config import ElasticSection
from latentwire.run.directory import Attempt
from latentwire.run.journal import Follower
from latentwire.run.telling import tell_hang

_PACKAGE = Path(__file__).parents[1]
_ON_THE_WAY = ("ranks.py", "watch.py")
"""Between a collective and whoever called it."""
_STACK_DEPTH = 12
_LOOK_EVERY_S = 2.0


class Note(NamedTuple):
    """Since when (``time.monotonic``) a main thread is in a collective, or outside of any."""

    is_waiting: bool
    since_s: float


class Standing:
    """Where a rank's main thread stands. Written by it alone; costs it a microsecond a collective."""

    def __init__(self) -> None:
        self.place: str | None = None
        """The part of a step that it is in, such as ``forward_backward``."""
        self.note = Note(False, time.monotonic())

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, only the other ranks can keep us."""
        self.note = Note(True, time.monotonic())
        try:
            yield
        finally:
            self.note = Note(False, time.monotonic())


class Watchdog:
    """A daemon thread of a rank that says where the main thread has come to stand still. A context manager.

    Args:
        standing: of the thread that makes this one.
        hang_s: after half of it the rank speaks, so that all have spoken when the agent names who is missing.
        event: writes to the rank's journal; called from the new thread.
    """

    def __init__(self, standing: Standing, hang_s: float, event: Callable[..., None]) -> None:
        self._standing, self._event = standing, event
        self._speak_after_s = hang_s / 2
        self._watched = threading.get_ident()
        self._left = threading.Event()
        self._told: Note | None = None
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._left.wait(min(1.0, self._speak_after_s / 4)):
            self._look()

    def _look(self) -> None:
        note = self._standing.note
        if self._told is not None and note is not self._told:
            self._event("goes_on", seconds=round(note.since_s - self._told.since_s, 3))
            self._told = None
        seconds = time.monotonic() - note.since_s
        if self._told is None and seconds >= self._speak_after_s:
            frames = list(_frames(sys._current_frames().get(self._watched)))
            where = {"seconds": round(seconds, 3), "at": self._standing.place or _in_the_package(frames)}
            if note.is_waiting:
                self._event("waiting", **where)
            else:
                self._event("stuck", **where, stack=[*map(_line, frames[:_STACK_DEPTH])])
            self._told = note


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """The innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _in_the_package(frames: list[FrameType]) -> str:
    """The innermost function of ours: ``session.safe_point``."""
    for frame in frames:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE) and path.name not in _ON_THE_WAY:
            return f"{path.stem}.{frame.f_code.co_name}"
    return "?"


def _line(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


@dataclasses.dataclass(frozen=True)
class _Word:
    """What a rank last said, if that still holds; ``since_s`` by our own monotonic clock."""

    is_waiting: bool
    at: str
    since_s: float


class HangWatch:
    """Reads what the ranks of all nodes say. Made and asked by the agent of the first node.

    Args:
        attempt: whose ranks they are.
        num_ranks: in all.
        section: of the config.
        state_of: of a rank's process on this node: ``stopped``, ``sleeping`` and so on; None elsewhere.
        event: writes to the agent's journal.
    """

    def __init__(
        self,
        attempt: Attempt,
        num_ranks: int,
        section: ElasticSection,
        state_of: Callable[[int], str | None],
        event: Callable[..., None],
    ) -> None:
        self._section, self._state_of, self._event = section, state_of, event
        ranks = range(num_ranks) if num_ranks > 1 else ()
        self._journals = {rank: Follower(attempt.path / f"events.rank{rank}.jsonl") for rank in ranks}
        self._words: dict[int, _Word] = {}
        self._told: dict[str, Any] | None = None
        self._words_told: dict[int, _Word] = {}
        self._every_s = min(_LOOK_EVERY_S, section.hang_s / 2)
        self._next_look = 0.0

    def look(self) -> str | None:
        """Name who keeps others waiting, in a ``hang`` event, again with each new word; ``hang_over`` when nobody does.

        Reads every few seconds, and then only what was added to the journals since.

        Returns:
            In words, who did not come within ``elastic.timeout_s``; None as long as there is hope.
        """
        now = time.monotonic()
        if now < self._next_look:
            return None
        self._next_look = now + self._every_s
        for rank, journal in self._journals.items():
            with contextlib.suppress(OSError):  # an attempt must not end for what we wanted to know of it
                for record in journal.read():
                    self._take(rank, record, now)
        hang = self._find(now)
        if hang is None:
            self._tell_the_end()
            return None
        if self._told is None or self._words != self._words_told:
            self._event("hang", **hang)
        self._told, self._words_told = hang, dict(self._words)
        return tell_hang(hang) if hang["waited_s"] >= self._section.timeout_s else None

    def _take(self, rank: int, record: dict[str, Any], now: float) -> None:
        name = record.get("event")
        if name in ("waiting", "stuck"):  # its own clock counts: those of two nodes differ
            self._words[rank] = _Word(name == "waiting", str(record.get("at")), now - float(record["seconds"]))
        elif name == "goes_on":
            self._words.pop(rank, None)

    def _find(self, now: float) -> dict[str, Any] | None:
        """The fields of the event; None where nobody has waited for long."""
        waiting = sorted(rank for rank, word in self._words.items() if word.is_waiting)
        waited_s = max((now - self._words[rank].since_s for rank in waiting), default=0.0)
        if waited_s < self._section.hang_s:
            return None
        missing = [rank for rank in self._journals if rank not in waiting]
        where = {"ranks": missing, "at": [*map(self._where, missing)], "waiting": waiting}
        return where | {"waited_s": round(waited_s, 3)}

    def _where(self, rank: int) -> str:
        if rank in self._words:
            return self._words[rank].at
        state = self._state_of(rank)
        return "not a word from it" + (f", its process is {state}" if state is not None else "")

    def _tell_the_end(self) -> None:
        if self._told is not None:
            self._event("hang_over", **{key: self._told[key] for key in ("ranks", "waiting", "waited_s")})
            self._told = None
