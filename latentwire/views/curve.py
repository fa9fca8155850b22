"""The one curve of a run as charts take it: thinned out at first, then extended."""

from __future__ import annotations

import contextlib
import math
import os
from array import array
from typing import Any

from latentwire.run.atomic import open_to_read
from latentwire.run.curve import Columns, Table
from latentwire.run.directory import Attempt, Run
from latentwire.run.journal import parse_line
from latentwire.views.thinning import extremes, figure, plain

NUM_STRETCHES = 800
TRAINING = ("loss", "lr", "samples_per_s", "grad_norm")
EVALUATION = ("eval/loss",)
_LARGE_BYTES = 8_000_000
_NUM_SAMPLED = 600


class CurveView:
    """Follows a run's curve. A long one is shown by a glimpse first, because to read it all takes seconds.

    Attributes:
        is_behind: there is a glimpse yet; the next ``read`` takes as long as the files are large.
    """

    def __init__(self, run: Run) -> None:
        self.is_behind = sum(map(_size, run.attempts())) > _LARGE_BYTES
        self._run = run
        self._columns = Columns(run, TRAINING, EVALUATION)
        self._tables = (self._columns.training, self._columns.evaluations)
        self._glimpse: dict[str, Any] | None = None
        self._num_thinned = 0

    def read(self) -> dict[str, Any] | None:
        """What has changed since the last read; None: nothing.

        Returns:
            ``series`` of points. Whoever shows the curve drops its points from step ``from`` on and adds these; where
            ``from`` is None, all of its points.
        """
        if self.is_behind and self._glimpse is None:
            self._glimpse = self._look_here_and_there()
            return self._glimpse
        self.is_behind = False
        first_changed = self._columns.grow()
        if self._glimpse is not None:
            self._glimpse = None
            return self.snapshot()
        if first_changed is None:
            return None
        if len(self._columns.training) - self._num_thinned > 2 * NUM_STRETCHES:
            return self.snapshot()
        return self._message(first_changed, [_since(first_changed, table, key) for table, key in self._series()])

    def snapshot(self) -> dict[str, Any]:
        """The whole curve as of the last read, thinned out."""
        if self._glimpse is not None:
            return self._glimpse
        self._num_thinned = len(self._columns.training)
        series = [
            {"key": key, **extremes(table.steps, table.columns[key], NUM_STRETCHES)} for table, key in self._series()
        ]
        return self._message(None, series)

    def _look_here_and_there(self) -> dict[str, Any]:
        points = [point for point in sampled_lines(self._run, _NUM_SAMPLED) if "loss" in point]
        steps = [point["step"] for point in points]
        series = [{"key": key, "x": steps, "y": [figure(point.get(key)) for point in points]} for key in TRAINING]
        return {"from": None, "series": series, "num_points": None, "num_not_finite": 0, "borders": []}

    def _series(self) -> list[tuple[Table, str]]:
        return [(table, key) for table in self._tables for key in table.columns]

    def _message(self, since: int | None, series: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "from": since,
            "series": series,
            "num_points": len(self._columns.training),
            "num_not_finite": _num_not_finite(self._columns.training.columns["loss"]),
            "borders": [{"attempt": each.attempt.number, "step": each.first_step} for each in self._columns.stretches],
        }


def sampled_lines(run: Run, number: int) -> list[dict[str, Any]]:
    """So many lines of a run's metrics, evenly spread over its files, in order of step; those that stand."""
    attempts = run.attempts()
    total = max(1, sum(map(_size, attempts)))
    kept: list[dict[str, Any]] = []
    first_void = math.inf
    for attempt in reversed(attempts):
        size = _size(attempt)
        lines = _lines_at(attempt, [size * i // max(1, n) for n in [number * size // total] for i in range(n)])
        stand = [line for line in lines if type(line.get("step")) is int and line["step"] < first_void]
        first_void = min([first_void, *(line["step"] for line in stand)])
        kept = stand + kept
    return kept


def _lines_at(attempt: Attempt, offsets: list[int]) -> list[dict[str, Any]]:
    lines = []
    with contextlib.suppress(FileNotFoundError), open_to_read(attempt.metrics_path) as file:
        for offset in offsets:
            file.seek(offset)
            if offset:
                file.readline()  # the rest of a line
            line = parse_line(file.readline())
            if line is not None:
                lines.append(line)
    return lines


def _size(attempt: Attempt) -> int:
    try:
        return os.stat(attempt.metrics_path).st_size
    except OSError:
        return 0


def _since(step: int, table: Table, key: str) -> dict[str, Any]:
    index = table.index_of(step)
    return {"key": key, "x": list(table.steps[index:]), "y": [plain(value) for value in table.columns[key][index:]]}


def _num_not_finite(values: array[float]) -> int:
    if len(values) <= 2 * NUM_STRETCHES:
        return sum(not math.isfinite(value) for value in values)
    import numpy as np

    return int(np.count_nonzero(~np.isfinite(np.array(values))))
