"""What the monitors of a run saw of its GPUs and hosts, as charts take it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

from latentwire.monitor.figures import gpus_of, host_of
from latentwire.monitor.stats import StatsFile, StatsFollower, stats_files
from latentwire.run.directory import Run
from latentwire.run.journal import time_of
from latentwire.views.thinning import Grid, Key, figure

NUM_BINS = 600
_SHOWN_ONE_BY_ONE = 8
_CLOCKS_DIFFER_BY_S = 86_400.0


@dataclasses.dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        key: of a reading in gpu_stats.jsonl.
        title, unit: for people.
        scale: what a reading is multiplied by, to be in that unit.
        of_host: a reading of the host, not of its GPUs.
    """

    key: str
    title: str
    unit: str
    scale: float = 1.0
    of_host: bool = False


PANELS = (
    Panel("utilisation_percent", "GPU utilisation", "%"),
    Panel("sm_active_percent", "SMs active", "%"),
    Panel("tensor_active_percent", "Tensor cores active", "%"),
    Panel("memory_used_bytes", "GPU memory", "GB", 1e-9),
    Panel("power_w", "Power", "W"),
    Panel("temperature_c", "Temperature", "°C"),
    Panel("cpu_percent", "Host processors", "%", of_host=True),
    Panel("processes_rss_bytes", "Memory of the run's processes", "GB", 1e-9, of_host=True),
)


class _Monitor:
    """What one monitor wrote: first all, however it was thinned since, then what is new."""

    def __init__(self, path: Path) -> None:
        self._file = StatsFile(path)
        self._follower = StatsFollower(path)
        self._last_s: float | None = None

    def read(self) -> list[dict[str, Any]]:
        """Records that were not returned yet."""
        records: list[dict[str, Any]] = []
        if self._last_s is None:
            with contextlib.suppress(OSError):  # vanished: there is nothing to show
                records = list(self._file.read())
            self._last_s = max(map(time_of, records), default=0.0)
        last_s = self._last_s
        records += [record for record in self._follower.read() if time_of(record) > last_s]
        self._last_s = max(map(time_of, records), default=last_s)
        return records


class GpuView:
    """Follows the monitors of all attempts of a run."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._monitors: dict[Path, _Monitor] = {}
        self._closed: set[int] = set()
        self._grid = Grid(NUM_BINS)
        self._begin_s = 0.0
        self._num_sent = 0
        self._shown: tuple[float, int] = (0.0, 0)

    def read(self) -> dict[str, Any] | None:
        """What charts are to add, or, where ``replace`` is true, to show instead of all; None: nothing new."""
        attempts = self._run.attempts()
        if attempts and not self._begin_s:
            self._begin_s = time_of({"time": attempts[0].record().get("claimed")})
        for attempt in attempts:
            if attempt.number in self._closed:
                continue
            for path in stats_files(attempt.path):
                for record in self._monitors.setdefault(path, _Monitor(path)).read():
                    self._take(record, node=path.name.split(".")[1].replace("jsonl", ""))
            if attempt not in attempts[-2:]:
                self._closed.add(attempt.number)
        if self._shown != (self._grid.width_s, len(self._grid.keys)):
            return self.snapshot() if self._grid.num_bins > 1 else None
        first = self._num_sent
        return self._message(first, replace=False) if self._grid.num_bins - 1 > first else None

    def snapshot(self) -> dict[str, Any]:
        """All as of the last read."""
        self._shown = (self._grid.width_s, len(self._grid.keys))
        return self._message(0, replace=True)

    def _message(self, first: int, replace: bool) -> dict[str, Any]:
        self._num_sent = max(0, self._grid.num_bins - 1)
        panels = []
        for panel in PANELS:
            keys = [key for key in self._grid.keys if key[0] == panel.key]
            if keys:
                series = [{"name": key[1], **self._grid.points(key, first)} for key in keys]
                panels.append({"key": panel.key, "title": panel.title, "unit": panel.unit, "series": series})
        return {"replace": replace, "panels": panels}

    def _take(self, record: dict[str, Any], node: str) -> None:
        time_s = time_of(record)
        if "event" in record or not self._begin_s - _CLOCKS_DIFFER_BY_S < time_s < time.time() + _CLOCKS_DIFFER_BY_S:
            return  # a clock that is days off would press all else into one corner
        readings: dict[Key, float] = {}
        for panel in PANELS:
            if panel.of_host:
                named = {f"{node} host".strip(): host_of(record)}
            else:
                named = {f"{node} GPU {gpu.get('index')}".strip(): gpu for gpu in gpus_of(record)}
            values = {
                name: value * panel.scale
                for name, source in named.items()
                if (value := figure(source.get(panel.key))) is not None
            }
            readings |= {(panel.key, name): value for name, value in _few(values, node).items()}
        weight = figure(record.get("seconds")) or 1.0
        self._grid.add(time_s, readings, weight)


def _few(values: dict[str, float], node: str) -> dict[str, float]:
    """Of many GPUs the mean and the two ends, so that a chart stays legible."""
    if len(values) <= _SHOWN_ONE_BY_ONE:
        return values
    ends = {"mean": sum(values.values()) / len(values), "lowest": min(values.values()), "highest": max(values.values())}
    return {f"{node} {name}".strip(): value for name, value in ends.items()}
