"""Many points made few, so that a picture of them shows the same."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from latentwire.run.figures import number

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Key = tuple[str, str]
"""What was read, and of which device."""

_DIGITS = 7


def extremes(steps: Sequence[int], values: Sequence[float], num_stretches: int) -> dict[str, list[Any]]:
    """The lowest and the highest point of each of so many equal stretches, the first and the last of all.

    Args:
        steps: where each value is, growing.
        values: NaN where there is none.
        num_stretches: at most twice as many points come back, and two.

    Returns:
        ``{"x": [..], "y": [..]}`` for JSON; a value that is no number is None.
    """
    if len(values) > 2 * num_stretches:
        import numpy as np

        kept = _places_of_extremes(np.array(values, dtype=np.float64), num_stretches).tolist()
        steps, values = [steps[place] for place in kept], [values[place] for place in kept]
    return {"x": list(steps), "y": [plain(value) for value in values]}


def _places_of_extremes(y: npt.NDArray[np.float64], num_stretches: int) -> npt.NDArray[np.intp]:
    import numpy as np

    length = math.ceil(len(y) / num_stretches)
    padded = np.full(num_stretches * length, np.nan)
    padded[: len(y)] = y
    unknown = ~np.isfinite(padded)
    begins = np.arange(0, len(padded), length)
    lows = np.where(unknown, np.inf, padded).reshape(-1, length).argmin(axis=1) + begins
    highs = np.where(unknown, -np.inf, padded).reshape(-1, length).argmax(axis=1) + begins
    kept = np.unique(np.concatenate([[0, len(y) - 1], lows, highs]))
    return kept[kept < len(y)]


def plain(value: float | None) -> float | None:
    """A number as JSON may hold it, in the digits that a picture can show."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{_DIGITS}g}")


def figure(value: Any) -> float | None:
    """The same of what a file holds: None for all that is no finite number."""
    return plain(number(value))


class Grid:
    """Readings over time in equal bins, which double in width as time goes on: memory and pictures stay small.

    Args:
        max_bins: the width doubles when more are needed.
        width_s: of a bin at first.
    """

    def __init__(self, max_bins: int, width_s: float = 1.0) -> None:
        self.max_bins = max_bins
        self.width_s = width_s
        self.begin_s = 0.0
        self.num_bins = 0
        self._sums: dict[Key, array[float]] = {}
        self._weights: dict[Key, array[float]] = {}

    @property
    def keys(self) -> list[Key]:
        """Of the series, in order of their first reading."""
        return list(self._sums)

    def add(self, time_s: float, readings: Mapping[Key, float], weight: float = 1.0) -> None:
        """Take in what was read at a time; a bin shows the mean, weighted."""
        if self.num_bins:
            self._make_room_for(time_s)
        else:
            self.begin_s = time_s // self.width_s * self.width_s
        place = int((time_s - self.begin_s) // self.width_s)
        self.num_bins = max(self.num_bins, place + 1)
        for key, value in readings.items():
            sums = self._sums.setdefault(key, array("d"))
            weights = self._weights.setdefault(key, array("d"))
            missing = place + 1 - len(sums)
            if missing > 0:
                sums.extend([0.0] * missing)
                weights.extend([0.0] * missing)
            sums[place] += value * weight
            weights[place] += weight

    def points(self, key: Key, first: int = 0) -> dict[str, list[Any]]:
        """The whole bins of a series from number ``first`` on: x in ms since the epoch, y None where nothing was read.

        The newest bin still fills and is left out.
        """
        sums, weights = self._sums[key], self._weights[key]
        bins = range(first, min(self.num_bins - 1, len(sums)))
        begin_ms, width_ms = self.begin_s * 1000, self.width_s * 1000
        return {
            "x": [round(begin_ms + (each + 0.5) * width_ms) for each in bins],
            "y": [plain(sums[each] / weights[each]) if weights[each] else None for each in bins],
        }

    def _make_room_for(self, time_s: float) -> None:
        earliest, latest = min(self.begin_s, time_s), max(self.begin_s + (self.num_bins - 1) * self.width_s, time_s)
        begin_s, width_s = self.begin_s, self.width_s
        while not begin_s <= earliest <= latest < begin_s + self.max_bins * width_s:
            width_s *= 2
            begin_s = earliest // width_s * width_s
        if (begin_s, width_s) == (self.begin_s, self.width_s):
            return
        places = [int((self.begin_s + i * self.width_s - begin_s) // width_s) for i in range(self.num_bins)]
        for table in (self._sums, self._weights):
            for key, column in table.items():
                table[key] = array("d", [0.0] * (places[-1] + 1))
                for place, value in zip(places, column):  # noqa: B905  a series may have begun, or ended, before others
                    table[key][place] += value
        self.begin_s, self.width_s, self.num_bins = begin_s, width_s, places[-1] + 1
