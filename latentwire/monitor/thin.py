"""Writing what a monitor sees, so that a month of it stays below 96 MiB a node, however many GPUs there are.

Of a run's attempts before this one, ``earlier.py`` sees to that.

Every sample goes to ``gpu_stats.jsonl``. When that has :data:`FULL_BYTES` it becomes ``gpu_stats.old.jsonl``, in place
of the one before. Besides, each minute goes as one record to ``gpu_stats.thin.jsonl``, and so does each event. When
that file has :data:`THIN_BYTES`, what lies before the samples is thinned again, to a record every 2, 4, 8.. minutes.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from latentwire.monitor.stats import (
    Record,
    covered_s,
    first_time,
    old_part,
    records_of,
    thin_part,
    throttled_s,
)
from latentwire.run.atomic import replacing
from latentwire.run.figures import MAX_NUMBER
from latentwire.run.journal import Journal

FULL_BYTES = 32 << 20
"""Of each of the two parts with every sample."""
THIN_BYTES = 32 << 20
THIN_S = 60.0
"""What a thinned record stands for at first."""
LONGEST_S = 86400.0
"""Of a record that was thinned again and again."""

KEPT = {"index", "memory_total_bytes", "swap_total_bytes", "disk_total_bytes", "cgroup_memory_limit_bytes"}
"""Numbers that are no readings: the last one stands."""
HIGHEST = (
    "memory_used_bytes", "temperature_c", "num_ecc_corrected", "num_ecc_uncorrected", "swap_used_bytes",
    "cgroup_memory_used_bytes", "processes_rss_bytes",
)  # fmt: skip
LOWEST = ("memory_available_bytes", "disk_free_bytes")
EXTREMES: dict[str, Callable[..., Any]] = dict.fromkeys(HIGHEST, max) | dict.fromkeys(LOWEST, min)
"""Of these the worst is kept, of all other readings the mean."""


class StatsWriter:
    """The one writer of a monitor's files; as :class:`Journal`, it never fails for the disk's sake once it is open."""

    def __init__(
        self,
        path: Path,
        interval_s: float,
        *,
        clock: Callable[[], float] = time.time,
        full_bytes: int = FULL_BYTES,
        thin_bytes: int = THIN_BYTES,
    ) -> None:
        """Open the files, or go on in them.

        Args:
            path: Of the newest samples; the other parts lie beside it.
            interval_s: Seconds between samples.
            clock: Unix seconds, for the ``time`` of each line.
            full_bytes: Size at which a part with every sample is full.
            thin_bytes: Size at which the thinned records are thinned again.

        Raises:
            OSError: a file cannot be opened.
        """
        self._interval_s = interval_s
        self._clock = clock
        self._full_bytes = self._rotate_at_bytes = full_bytes
        self._thin_bytes = self._thin_at_bytes = thin_bytes
        self._full = Journal(path, clock)
        self._thin = Journal(thin_part(path), clock)
        self._fold = Fold()
        self._previous_s = math.nan

    def event(self, name: str, /, **fields: Any) -> None:
        """Write it to both files, for the samples around it will go from the one to the other."""
        if name == "monitor_started":
            self._previous_s = self._clock()
        # This order: what stands in both bears no earlier time in the thinned file, so that readers take it once.
        self._full.event(name, **fields)
        self._thin.event(name, **fields)

    def record(self, host: Record, gpus: list[Record]) -> None:
        """Write a sample, and once a minute look after the sizes."""
        self._full.record(host=host, gpus=gpus)
        now_s = self._clock()
        seconds = covered_s(now_s - self._previous_s, self._interval_s)
        self._previous_s = now_s
        self._fold.add({"host": host, "gpus": gpus, "seconds": seconds, "num_samples": 1})
        if self._fold.seconds >= THIN_S:
            self._go_on_at_the_paths()
            self._write_fold()
            self._keep_small()

    def close(self) -> None:
        """Write what is left of the last minute."""
        self._write_fold()
        self._full.close()
        self._thin.close()

    def _write_fold(self) -> None:
        if self._fold.num_samples:
            self._thin.record(**self._fold.result())
            self._fold = Fold()

    def _go_on_at_the_paths(self) -> None:
        """Where a file was renamed, and then none could be opened in its place."""
        for journal in (self._full, self._thin):
            try:
                if not journal.is_at_path():
                    journal.reopen()
            except OSError as error:
                self.event("stats_not_thinned", reason=str(error))

    def _keep_small(self) -> None:
        """Right after a thinned record, so that each of them lies either before or within a part with every sample."""
        try:
            if (size := self._full.path.stat().st_size) >= self._rotate_at_bytes:
                self._rotate_at_bytes = size + self._full_bytes // 8  # if it fails now
                os.replace(self._full.path, old_part(self._full.path))
                self._full.reopen()
                self._rotate_at_bytes = self._full_bytes
            if (size := self._thin.path.stat().st_size) >= self._thin_at_bytes:
                self._thin_at_bytes = size + self._thin_bytes // 8
                self._thin_again()
                self._thin_at_bytes = self._thin_bytes
        except OSError as error:
            self.event("stats_not_thinned", reason=str(error))

    def _thin_again(self) -> None:
        """Halve the thinned file; blocks for a second or two, every other day with eight GPUs."""
        path, span_s = self._thin.path, THIN_S
        full = [old_part(self._full.path), self._full.path]
        before_s = next((time_s for part in full if (time_s := first_time(part)) is not None), math.inf)
        while path.stat().st_size > self._thin_bytes // 2 and span_s < LONGEST_S:
            span_s *= 2
            rewrite(path, span_s, before_s)
        self._thin.reopen()


class Fold:
    """Samples in a row, made into one that has the same fields."""

    def __init__(self) -> None:
        """Nothing is in it."""
        self.num_samples = 0
        self.seconds = 0.0
        self._host = _Readings()
        self._gpus: dict[str, _Readings] = {}

    def add(self, sample: Record) -> None:
        """Add a sample, thinned or not, with its ``seconds`` and ``num_samples``."""
        num_samples, seconds = sample["num_samples"], sample["seconds"]
        self.num_samples += num_samples
        self.seconds += seconds
        self._host.add(sample["host"], num_samples)
        for gpu in sample["gpus"]:
            readings = self._gpus.setdefault(gpu["uuid"], _Readings())
            readings.add(gpu, num_samples)
            readings.throttle(throttled_s(gpu, seconds))

    def result(self) -> Record:
        """The sample but for its time."""
        gpus = [readings.result() for readings in self._gpus.values()]
        covered = {"seconds": round(self.seconds, 3), "num_samples": self.num_samples}
        return {"host": self._host.result(), "gpus": gpus, **covered}


class _Readings:
    """Of the host or of one GPU."""

    def __init__(self) -> None:
        self._values: Record = {}
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._throttled_s: dict[str, float] = {}

    def add(self, readings: Mapping[str, Any], num_samples: int) -> None:
        values, sums, counts = self._values, self._sums, self._counts
        for name, value in readings.items():
            kind = type(value)  # this runs for each reading each second; a bool is no number here
            if not (kind is float or kind is int) or name in KEPT:
                if value is not None or name not in values:
                    values[name] = value
            elif not -MAX_NUMBER < value < MAX_NUMBER:
                values.setdefault(name)
            elif name in sums:
                sums[name] += value * num_samples
                counts[name] += num_samples
            elif name in EXTREMES:
                values[name] = value if values.get(name) is None else EXTREMES[name](values[name], value)
            else:
                values[name] = None  # its place among the others
                sums[name], counts[name] = value * num_samples, num_samples

    def throttle(self, seconds: dict[str, float]) -> None:
        for reason, value in seconds.items():
            self._throttled_s[reason] = self._throttled_s.get(reason, 0.0) + value

    def result(self) -> Record:
        result = self._values | {name: _rounded(total / self._counts[name]) for name, total in self._sums.items()}
        if self._throttled_s:
            result["throttle_reasons"] = list(self._throttled_s)
            result["throttled_s"] = {reason: round(value, 3) for reason, value in self._throttled_s.items()}
        return result


def _rounded(value: float) -> float:
    return round(value) if abs(value) >= 10_000 else round(value, 2)


def rewrite(path: Path, span_s: float, before_s: float) -> None:
    """Replace a file of thinned records by one whose records before ``before_s`` stand for ``span_s`` each."""
    with path.open("rb") as source, replacing(path, alone=True) as target:
        target.writelines(json.dumps(record) + "\n" for record in folded(records_of(source), span_s, before_s))


def folded(records: Iterator[Record], span_s: float, before_s: float) -> Iterator[Record]:
    """The records, of which those before ``before_s`` are made into ones that stand for ``span_s`` each."""
    fold, time_s = Fold(), 0.0
    for record in records:
        is_sample = "event" not in record
        has_to_end = record.get("event") == "monitor_started" or record["time"] >= before_s
        if fold.num_samples and (has_to_end or fold.seconds >= span_s):
            yield {"time": time_s, **fold.result()}
            fold = Fold()
        if is_sample and not has_to_end:
            fold.add(record)
            time_s = record["time"]
        else:
            yield record
    if fold.num_samples:
        yield {"time": time_s, **fold.result()}
