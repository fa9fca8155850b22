"""Folds ``gpu_stats.jsonl`` files of any number of attempts and nodes into one summary: a run's ``gpu_stats.json``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from latentwire.monitor.stats import Record, StatsFile, throttled_s
from latentwire.run.figures import number

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
            summary.add_file(StatsFile(path))
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

    def add_file(self, stats: StatsFile) -> None:
        for record in stats.read():
            if "event" in record:
                name = str(record["event"])
                self._events[name] = self._events.get(name, 0) + 1
            else:
                self._add_sample(record)
        self._num_skipped_lines += stats.num_skipped_lines

    def result(self) -> dict[str, object]:
        return {
            "gpus": {uuid: fold.result() for uuid, fold in self._gpus.items()},
            "hosts": {name: fold.result() for name, fold in self._hosts.items()},
            "events": self._events,
            "num_skipped_lines": self._num_skipped_lines,
        }

    def _add_sample(self, sample: Record) -> None:
        weight = sample["num_samples"], sample["seconds"]
        if sample["host"]:
            self._hosts.setdefault(sample["hostname"], _HostFold()).add(sample["host"], *weight)
        for gpu in sample["gpus"]:
            self._gpus.setdefault(gpu["uuid"], _GPUFold()).add(gpu, *weight)


class _Fold:
    """Counts, sums and extremes of the readings of one device."""

    def __init__(self) -> None:
        self._num_samples = 0
        self._covered_s = 0.0
        self._counts: dict[str, int] = {}
        self._sums: dict[str, float] = {}
        self._maxima: dict[str, float] = {}
        self._minima: dict[str, float] = {}

    def add(self, readings: Record, num_samples: int, covered_s: float) -> None:
        self._num_samples += num_samples
        self._covered_s += covered_s
        for name, reading in readings.items():
            value = number(reading)
            if value is not None:
                self._counts[name] = self._counts.get(name, 0) + num_samples
                self._sums[name] = self._sums.get(name, 0.0) + value * num_samples
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

    def add(self, readings: Record, num_samples: int, covered_s: float) -> None:
        super().add(readings, num_samples, covered_s)
        self._identity = {"index": readings.get("index"), "name": readings.get("name")}
        power_w = number(readings.get("power_w"))
        if power_w is not None:
            # NVML's power is itself a mean over the last second or so: times the seconds it is the energy.
            self._energy_ws = (self._energy_ws or 0.0) + power_w * covered_s
        for reason, seconds in throttled_s(readings, covered_s).items():
            self._throttled_s[reason] = self._throttled_s.get(reason, 0.0) + seconds

    def result(self) -> dict[str, object]:
        figures = self.figures(GPU_MEANS_AND_MAXIMA, GPU_MAXIMA)
        energy_wh = None if self._energy_ws is None else round(self._energy_ws / 3600, 4)
        by_reason = {reason: round(seconds, 3) for reason, seconds in sorted(self._throttled_s.items())}
        return {**self._identity, **figures, "energy_wh": energy_wh, "throttled_s": by_reason}
