"""Folds ``gpu_stats.jsonl`` files of any number of attempts and nodes into one summary: a run's ``gpu_stats.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

Record = Mapping[str, object]

GPU_MEANS_AND_MAXIMA = ("utilisation_percent", "sm_active_percent", "tensor_active_percent", "temperature_c", "power_w")
GPU_MAXIMA = ("memory_used_bytes", "memory_total_bytes", "power_limit_w")
HOST_MEANS_AND_MAXIMA = ("cpu_percent", "load_1m")
HOST_MAXIMA = (
    "memory_used_bytes",
    "memory_total_bytes",
    "swap_used_bytes",
    "cgroup_memory_used_bytes",
    "cgroup_memory_limit_bytes",
    "processes_rss_bytes",
)
HOST_MINIMA = ("memory_available_bytes", "disk_free_bytes")
MAX_NUMBER = 1e300
"""A larger number is garbage; so are NaN and the infinities, which JSON does not have and Python reads all the same."""
MAX_GAP_INTERVALS = 2.0
"""A sample stands for the time since the one before. After a longer gap (lost records, a stopped process) nobody knows
what happened, and it stands for one interval."""


def summarise(paths: Iterable[Path]) -> dict[str, object]:
    """Read the files line by line and summarise them; called when an attempt ends and by reports. Blocks on the disk.

    Lines that are half-written or garbage are counted and skipped, and so are files that cannot be read.

    Args:
        paths: The ``gpu_stats.jsonl`` of every attempt and node, each in the order of its own lines.

    Returns:
        ``gpus`` by UUID and ``hosts`` by name, each with ``num_samples``, ``covered_s`` and the figures, null where no
        sample had the reading; ``events`` (counts by name), ``num_skipped_lines`` and ``unreadable_files``.
    """
    summary = _Summary()
    unreadable: list[str] = []
    for path in paths:
        try:
            with path.open("rb") as lines:
                summary.add_file(lines)
        except OSError:
            unreadable.append(str(path))
    return {**summary.result(), "unreadable_files": unreadable}


class _Summary:
    """Everything seen so far, over all files."""

    def __init__(self) -> None:
        self._gpus: dict[str, _GPUFold] = {}
        self._hosts: dict[str, _HostFold] = {}
        self._events: dict[str, int] = {}
        self._num_skipped_lines = 0

    def add_file(self, lines: Iterable[bytes]) -> None:
        hostname, interval_s, previous_s = "unknown", math.inf, math.nan
        for record in self._records(lines):
            time_s = _number(record.get("time"))
            if time_s is None:
                self._num_skipped_lines += 1
            elif "event" in record:
                name = str(record["event"])
                self._events[name] = self._events.get(name, 0) + 1
                if name == "monitor_started":
                    hostname, previous_s = str(record.get("hostname", hostname)), time_s
                    interval_s = _number(record.get("interval_s")) or math.inf
            else:
                self._add_sample(record, hostname, _covered_s(time_s - previous_s, interval_s))
                previous_s = time_s

    def result(self) -> dict[str, object]:
        return {
            "gpus": {uuid: fold.result() for uuid, fold in self._gpus.items()},
            "hosts": {name: fold.result() for name, fold in self._hosts.items()},
            "events": self._events,
            "num_skipped_lines": self._num_skipped_lines,
        }

    def _records(self, lines: Iterable[bytes]) -> Iterator[Record]:
        for line in lines:
            record = _parse(line)
            if record is not None:
                yield record
            elif line.strip():
                self._num_skipped_lines += 1

    def _add_sample(self, record: Record, hostname: str, covered_s: float) -> None:
        host, gpus = record.get("host"), record.get("gpus")
        if isinstance(host, dict):
            self._hosts.setdefault(hostname, _HostFold()).add(host, covered_s)
        for gpu in gpus if isinstance(gpus, list) else []:
            if isinstance(gpu, dict) and isinstance(gpu.get("uuid"), str):
                self._gpus.setdefault(gpu["uuid"], _GPUFold()).add(gpu, covered_s)


class _Fold:
    """Counts, sums and extremes of the readings of one device."""

    def __init__(self) -> None:
        self._num_samples = 0
        self._covered_s = 0.0
        self._counts: dict[str, int] = {}
        self._sums: dict[str, float] = {}
        self._maxima: dict[str, float] = {}
        self._minima: dict[str, float] = {}

    def add(self, readings: Record, covered_s: float) -> None:
        self._num_samples += 1
        self._covered_s += covered_s
        for name, reading in readings.items():
            value = _number(reading)
            if value is not None:
                self._counts[name] = self._counts.get(name, 0) + 1
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._maxima[name] = max(value, self._maxima.get(name, value))
                self._minima[name] = min(value, self._minima.get(name, value))

    def figures(self, means: Iterable[str], maxima: Iterable[str], minima: Iterable[str] = ()) -> dict[str, object]:
        means, maxima = list(means), list(maxima)
        figures: dict[str, object] = {"num_samples": self._num_samples, "covered_s": round(self._covered_s, 3)}
        for name in means:
            count = self._counts.get(name)
            figures[f"mean_{name}"] = round(self._sums[name] / count, 3) if count else None
        for name in (*means, *maxima):
            figures[f"max_{name}"] = self._maxima.get(name)
        for name in minima:
            figures[f"min_{name}"] = self._minima.get(name)
        return figures


class _HostFold(_Fold):
    """One node."""

    def result(self) -> dict[str, object]:
        return self.figures(HOST_MEANS_AND_MAXIMA, HOST_MAXIMA, HOST_MINIMA)


class _GPUFold(_Fold):
    """One GPU."""

    def __init__(self) -> None:
        super().__init__()
        self._identity: dict[str, object] = {}
        self._energy_ws: float | None = None
        self._throttled_s: dict[str, float] = {}

    def add(self, readings: Record, covered_s: float) -> None:
        super().add(readings, covered_s)
        self._identity = {"index": readings.get("index"), "name": readings.get("name")}
        power_w = _number(readings.get("power_w"))
        if power_w is not None:
            # NVML's power is itself a mean over the last second or so: times the seconds it is the energy.
            self._energy_ws = (self._energy_ws or 0.0) + power_w * covered_s
        reasons = readings.get("throttle_reasons")
        for reason in reasons if isinstance(reasons, list) else []:
            self._throttled_s[str(reason)] = self._throttled_s.get(str(reason), 0.0) + covered_s

    def result(self) -> dict[str, object]:
        figures = self.figures(GPU_MEANS_AND_MAXIMA, GPU_MAXIMA)
        energy_wh = None if self._energy_ws is None else round(self._energy_ws / 3600, 4)
        throttled_s = {reason: round(seconds, 3) for reason, seconds in sorted(self._throttled_s.items())}
        return {**self._identity, **figures, "energy_wh": energy_wh, "throttled_s": throttled_s}


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # half a line, not UTF-8, or garbage nested without end
        return None
    return record if isinstance(record, dict) else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < MAX_NUMBER else None


def _covered_s(elapsed_s: float, interval_s: float) -> float:
    """Seconds that a sample stands for; none where the one before is unknown or the clock was set back."""
    if math.isnan(elapsed_s) or elapsed_s < 0:
        return 0.0
    return elapsed_s if elapsed_s <= MAX_GAP_INTERVALS * interval_s else interval_s
