"""One curve out of many attempts, read as it grows: where an attempt redid steps, its points stand.

Attempts overlap, because one that was killed loses the steps since its last commit and the next does them again. So a
curve is laid out in stretches, each computed by one attempt, and read stretch after stretch in pieces of bounded size:
a million steps cost no more memory than a thousand. When a newer attempt goes back, readers are told from which step
on what they were given before is void.

A place on the curve is one whole number, ``2 * step``, and one more for the evaluation that follows the step.
"""

from __future__ import annotations

import bisect
import dataclasses
import operator
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from latentwire.run.directory import Attempt, Run, is_step
from latentwire.run.journal import Follower, newest_first, parse_line, read_journal

_PIECE_BYTES = 4 * 1024 * 1024
_OPEN = 2**200
"""Beyond any step: the end of the stretch that still grows."""


@dataclasses.dataclass(frozen=True)
class Stretch:
    """A part of the curve that one attempt computed: the places from ``begin`` up to, without it, ``end``."""

    attempt: Attempt
    begin: int
    end: int = _OPEN

    @property
    def first_step(self) -> int:
        """The step with which it begins."""
        return self.begin // 2


class Curve:
    """Reads a run's metrics over all its attempts, each step once, as they are written. Never blocks.

    Args:
        run: may be in progress, finished, or not started yet.
    """

    def __init__(self, run: Run) -> None:
        self._pieces = _Pieces(run)

    def read(self) -> tuple[list[dict[str, Any]], int | None]:
        """The next records in order of step, of some ten thousand at most; none: there is no more at present.

        Returns:
            The records, a step's (see ``is_step``) or an evaluation's, each with the ``attempt`` that it is from, and
            the step from which on all that was returned by earlier calls is void; None where all of it stands.
        """
        records: list[dict[str, Any]] = []
        first_void: int | None = None
        while not records and (piece := self._pieces.next()) is not None:
            first_void = _earlier(first_void, piece.first_void)
            number, begin, end = piece.stretch.attempt.number, piece.begin, piece.stretch.end
            for record in map(parse_line, piece.lines.split(b"\n")):
                if record is not None and begin <= (place := place_of(record)) < end:
                    record["attempt"] = number
                    records.append(record)
                    self._pieces.given_up_to = max(self._pieces.given_up_to, place + 1)
        return records, first_void

    @property
    def stretches(self) -> list[Stretch]:
        """Which attempt computed what, in order; as far as known from the last ``read``."""
        return list(self._pieces.stretches)


class Columns:
    """Chosen figures of the curve as flat arrays, for charts: several times faster and smaller than records.

    Args:
        run: may be in progress, finished, or not started yet.
        keys: what to take of each step's line, such as ``("loss", "lr", "time")``.
        evaluation_keys: what to take of each evaluation's line.

    Attributes:
        training, evaluations: the figures so far; of the steps those with a loss, be it NaN.
    """

    def __init__(self, run: Run, keys: Sequence[str], evaluation_keys: Sequence[str] = ("eval/loss",)) -> None:
        self._pieces = _Pieces(run)
        self.training, self.evaluations = Table(keys), Table(evaluation_keys)
        names = {
            key: f"k{number}" for number, key in enumerate(dict.fromkeys(["loss", "step_s", *keys, *evaluation_keys]))
        }
        fields: list[tuple[str, Any, Any]] = [("step", int, msgspec.field())]
        fields += [(name, float | str | None, msgspec.field(name=key, default=None)) for key, name in names.items()]
        self._decoder = msgspec.json.Decoder(msgspec.defstruct("Line", fields, gc=False))  # only what is asked for
        self._getters = {key: operator.attrgetter(name) for key, name in names.items()}

    def grow(self) -> int | None:
        """Take in all that is new. Reads the whole curve the first time, then only what was added.

        Returns:
            The first step of which a point was added or is void now; None where nothing has changed. Whoever holds a
            copy drops its points from that step on, and appends those that stand here.
        """
        first_changed: int | None = None
        while (piece := self._pieces.next()) is not None:
            if piece.first_void is not None:
                self.training.drop_from(piece.first_void)
                self.evaluations.drop_from(piece.first_void)
            first_changed = _earlier(_earlier(first_changed, piece.first_void), self._take(piece))
        return first_changed

    @property
    def stretches(self) -> list[Stretch]:
        """Which attempt computed what, in order; as far as known from the last ``grow``."""
        return list(self._pieces.stretches)

    def _take(self, piece: _Piece) -> int | None:
        loss, step_s = self._getters["loss"], self._getters["step_s"]
        begin, end = piece.begin, piece.stretch.end
        lines = [line for line in self._decoded(piece.lines) if begin <= 2 * line.step + (step_s(line) is None) < end]
        if not lines:
            return None
        steps = [r for r in lines if step_s(r) is not None and loss(r) is not None]
        evaluations = [r for r in lines if step_s(r) is None]
        for table, records in ((self.training, steps), (self.evaluations, evaluations)):
            table.append([r.step for r in records], {k: list(map(self._getters[k], records)) for k in table.columns})
        last = lines[-1]
        self._pieces.given_up_to = max(self._pieces.given_up_to, 2 * last.step + (step_s(last) is None) + 1)
        return int(lines[0].step)

    def _decoded(self, lines: bytes) -> Iterable[Any]:
        try:
            return self._decoder.decode_lines(lines)
        except ValueError:  # among them is a half-written or foreign one
            return filter(None, map(self._line, lines.split(b"\n")))

    def _line(self, line: bytes) -> Any:
        try:
            return self._decoder.decode(line)
        except ValueError:
            return None


class Table:
    """Points in order of step: ``steps`` and, of the same length, the values of each key; NaN where one has none."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.steps: array[int] = array("q")
        self.columns: dict[str, array[float]] = {key: array("d") for key in keys}

    def __len__(self) -> int:
        return len(self.steps)

    def index_of(self, step: int) -> int:
        """Where the points from ``step`` on begin."""
        return bisect.bisect_left(self.steps, step)

    def drop_from(self, step: int) -> None:
        """Forget the points from ``step`` on."""
        index = self.index_of(step)
        del self.steps[index:]
        for column in self.columns.values():
            del column[index:]

    def append(self, steps: list[int], columns: dict[str, list[Any]]) -> None:
        """Add points behind those that are there."""
        self.steps.extend(steps)
        for key, values in columns.items():
            self.columns[key].extend(_as_floats(values))


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Whole lines of one attempt's file; those that count have their place between ``begin`` and the stretch's end."""

    stretch: Stretch
    begin: int
    lines: bytes
    first_void: int | None


class _Pieces:
    """Knows how the curve is laid out at present, and walks along it."""

    def __init__(self, run: Run) -> None:
        self.stretches: list[Stretch] = []
        self.given_up_to = 0
        """One after the last place that was given out; kept by whoever decodes the lines."""
        self._run = run
        self._hidden: list[Stretch] = []
        """Older attempts' points from the newest stretch on: the next attempt may go on from them after all."""
        self._index = 0
        self._begin = 0
        self._follower: Follower | None = None

    def next(self) -> _Piece | None:
        first_void = self._look_for_attempts()
        while self._index < len(self.stretches):
            stretch = self.stretches[self._index]
            path = stretch.attempt.metrics_path
            if self._follower is None or self._follower.path != path:
                self._follower = Follower(path)
            lines = self._follower.read_lines(_PIECE_BYTES)
            if lines or first_void is not None:
                return _Piece(stretch, max(self._begin, stretch.begin), lines, first_void)
            if stretch.end == _OPEN:
                return None
            self._index += 1
        return None

    def _look_for_attempts(self) -> int | None:
        """Lay the curve out anew where newer attempts have begun; returns the first step that is void, if one is."""
        newest = self.stretches[-1].attempt.number if self.stretches else 0
        first_void = None
        for attempt in self._run.attempts():
            first = _first(read_journal(attempt.metrics_path)) if attempt.number > newest else None
            if first is not None:
                first_void = _earlier(first_void, self._lay(attempt, first))
        return first_void

    def _lay(self, attempt: Attempt, first: int) -> int | None:
        known = self.stretches
        if known:
            newest = known[-1]
            reached = _first(newest_first(newest.attempt.metrics_path))
            end = max(newest.begin, -1 if reached is None else reached) + 1
            known = [*known[:-1], *_clipped([newest], 0, end), *_clipped(self._hidden, end, _OPEN)]
        self.stretches = [*_clipped(known, 0, first), Stretch(attempt, first)]
        self._hidden = _clipped(known, first, _OPEN)
        if first >= self.given_up_to:
            return None
        self.given_up_to = self._begin = first // 2 * 2  # a step and its evaluation are void together
        self._index = next(i for i, stretch in enumerate(self.stretches) if stretch.end > self._begin)
        self._follower = None
        return self._begin // 2


def _clipped(stretches: Iterable[Stretch], begin: int, end: int) -> list[Stretch]:
    """What of them lies between two places."""
    clipped = [dataclasses.replace(s, begin=max(s.begin, begin), end=min(s.end, end)) for s in stretches]
    return [stretch for stretch in clipped if stretch.begin < stretch.end]


def merged_metrics(run: Run) -> Iterator[dict[str, Any]]:
    """The curve as it is now, record by record; each has ``attempt``."""
    curve = Curve(run)
    while records := curve.read()[0]:
        yield from records


def _first(records: Iterable[dict[str, Any]]) -> int | None:
    return next((place for place in map(place_of, records) if place >= 0), None)


def place_of(record: dict[str, Any]) -> int:
    """Where a record belongs on the curve; before its begin where it does not."""
    step = record.get("step")
    return 2 * step + (not is_step(record)) if type(step) is int else -1


def _as_floats(values: list[Any]) -> array[float]:
    try:
        return array("d", values)
    except (TypeError, OverflowError):
        return array("d", map(_as_float, values))


def _as_float(value: Any) -> float:
    """Journals write NaN and infinities as words; what is missing, or no number, is NaN too."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def _earlier(one: int | None, other: int | None) -> int | None:
    return min((step for step in (one, other) if step is not None), default=None)
