"""The one curve of a run as charts take it: thinned out at first, then extended."""

from __future__ import annotations

from array import array
from typing import Any

from latentwire.run.curve import Columns, Table
from latentwire.run.directory import Run
from latentwire.views.thinning import extremes, plain

NUM_STRETCHES = 800
TRAINING = ("loss", "lr", "samples_per_s", "grad_norm")
EVALUATION = ("eval/loss",)


class CurveView:
    """Follows a run's curve. A first read takes as long as its files are large, each further one next to nothing."""

    def __init__(self, run: Run) -> None:
        self._columns = Columns(run, TRAINING, EVALUATION)
        self._tables = (self._columns.training, self._columns.evaluations)
        self._num_thinned = 0

    def read(self) -> dict[str, Any] | None:
        """What has changed since the last read; None: nothing.

        Returns:
            ``series`` of points. Whoever shows the curve drops its points from step ``from`` on and adds these; where
            ``from`` is None, all of its points.
        """
        first_changed = self._columns.grow()
        if first_changed is None:
            return None
        if len(self._columns.training) - self._num_thinned > 2 * NUM_STRETCHES:
            return self.snapshot()
        return self._message(first_changed, [_since(first_changed, table, key) for table, key in self._series()])

    def snapshot(self) -> dict[str, Any]:
        """The whole curve as of the last read, thinned out."""
        self._num_thinned = len(self._columns.training)
        series = [
            {"key": key, **extremes(table.steps, table.columns[key], NUM_STRETCHES)} for table, key in self._series()
        ]
        return self._message(None, series)

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


def _since(step: int, table: Table, key: str) -> dict[str, Any]:
    index = table.index_of(step)
    return {"key": key, "x": list(table.steps[index:]), "y": [plain(value) for value in table.columns[key][index:]]}


def _num_not_finite(values: array[float]) -> int:
    import numpy as np

    return int(np.count_nonzero(~np.isfinite(np.array(values))))
