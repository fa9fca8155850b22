"""Reading what monitors wrote: the one way to ``gpu_stats.jsonl`` for the roll-up, the terminal and the dashboard.

A monitor's records lie in three files (``thin.py`` writes them): ``gpu_stats.thin.jsonl``, one record a minute or more
since the start; ``gpu_stats.old.jsonl`` and ``gpu_stats.jsonl``, every sample of the newest hours. A reader takes the
thinned ones up to where the others begin. Nothing here loads pynvml or psutil.
"""

from __future__ import annotations

import heapq
import json
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

from latentwire.run.atomic import open_to_read
from latentwire.run.figures import number
from latentwire.run.journal import time_of

Record = dict[str, Any]

MAX_GAP_INTERVALS = 2.0
"""A sample stands for the time since the one before. After a longer gap (lost records, a stopped process) nobody knows
what happened, and it stands for one interval."""
_SCANNED_BYTES = 64 * 1024


def thin_part(path: Path) -> Path:
    """Where the thinned records of a monitor's file lie."""
    return path.with_name(f"{path.stem}.thin{path.suffix}")


def old_part(path: Path) -> Path:
    """Where the samples before those in a monitor's file lie."""
    return path.with_name(f"{path.stem}.old{path.suffix}")


def stats_files(folder: Path) -> list[Path]:
    """The monitors' files in an attempt's folder, one a node, however many parts each has."""
    parts = folder.glob("gpu_stats*.jsonl")
    return sorted({part.with_name(part.name.replace(".old.", ".").replace(".thin.", ".")) for part in parts})


def read_stats(folder: Path | str, since: float = -math.inf) -> Iterator[Record]:
    """All records of an attempt's monitors in the order of time; for whoever shows or judges them. Reads as it goes.

    Args:
        folder: The attempt's, or any that a monitor writes to.
        since: Unix seconds; what is older is left out, and mostly not even read.

    Yields:
        Samples ``{"time", "hostname", "host", "gpus", "seconds", "num_samples"}``: ``seconds`` is how long the record
        stands for, up to its ``time``; in a thinned one ``num_samples`` is more than 1, and a reading is the mean, the
        highest (temperature, memory, counts) or the lowest (free space). ``host`` is ``{}`` where there was none, each
        of ``gpus`` has a ``uuid``. Events ``{"time", "event", "hostname"}`` with details stand in between. Half lines,
        foreign lines and files that vanish are left out.
    """
    yield from heapq.merge(*(_as_far_as_readable(path, since) for path in stats_files(Path(folder))), key=time_of)


def _as_far_as_readable(path: Path, since: float) -> Iterator[Record]:
    with suppress(OSError):  # a folder that vanished, a stale handle: what was read stands
        yield from StatsFile(path).read(since)


class StatsFile:
    """What one monitor wrote; ``path`` is that of its newest part."""

    def __init__(self, path: Path) -> None:
        """Nothing is opened yet."""
        self.path = path
        self.num_skipped_lines = 0
        """Lines without a record that :meth:`read` met."""
        self._hostname = "unknown"
        self._interval_s = math.inf
        self._previous_s = math.nan

    def read(self, since: float = -math.inf) -> Iterator[Record]:
        """The records as :func:`read_stats` gives them.

        Raises:
            OSError: there is no part of it, or none that may be read.
        """
        with ExitStack() as stack:
            thin, full = _open_parts(self.path, stack)
            full_since = next((record["time"] for file in full for record in records_of(file)), math.inf)
            for file in [*thin, *full]:
                file.seek(0)
                self._look_at(next(records_of(file), {}))
                _seek(file, since)
                yield from self._between(file, since, full_since if file in thin else math.inf)

    def _between(self, file: BinaryIO, since: float, until: float) -> Iterator[Record]:
        for line in file:
            record = _parse(line)
            if record is None:
                self.num_skipped_lines += bool(line.strip())
            elif record["time"] >= until:
                return
            elif record["time"] >= since:
                yield self._completed(record)

    def _completed(self, record: Record) -> Record:
        """The record with what a reader would else have to know of those before."""
        if "event" in record:
            self._look_at(record)
            return {"hostname": self._hostname, **record}
        seconds = covered_s(record["time"] - self._previous_s, self._interval_s)
        self._previous_s = record["time"]
        return {"hostname": self._hostname, "seconds": seconds, **record}

    def _look_at(self, record: Record) -> None:
        """The first part begins with the event that says whose it is; more come where a monitor was started anew."""
        if record.get("event") == "monitor_started":
            self._hostname = str(record.get("hostname", "unknown"))
            self._interval_s = number(record.get("interval_s")) or math.inf
            self._previous_s = record["time"]


class StatsFollower:
    """Reads what a monitor's file gained since the last call, also where it went on in a new part meanwhile."""

    def __init__(self, path: Path) -> None:
        """Begins with all of the newest part; what is older is for :func:`read_stats`."""
        self.path = path
        self._inode = 0
        self._offset = 0

    def read(self) -> list[Record]:
        """New whole records, as they are in the file. Does not block; ``[]`` where there is no file."""
        with ExitStack() as stack:
            try:
                file = stack.enter_context(open_to_read(self.path))
            except OSError:
                return []
            stat = os.fstat(file.fileno())
            records: list[Record] = []
            if stat.st_ino != self._inode or stat.st_size < self._offset:  # a new file may get the inode of an old
                records = self._rest_of_old()
                self._inode, self._offset = stat.st_ino, 0
            return records + self._go_on(file)

    def _rest_of_old(self) -> list[Record]:
        with suppress(OSError), open_to_read(old_part(self.path)) as file:
            if os.fstat(file.fileno()).st_ino == self._inode:
                return self._go_on(file)
        return []

    def _go_on(self, file: BinaryIO) -> list[Record]:
        file.seek(self._offset)
        whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return [record for record in map(_parse, whole.split(b"\n")) if record is not None]


def covered_s(elapsed_s: float, interval_s: float) -> float:
    """Seconds that a sample stands for; none where the one before is unknown or the clock was set back."""
    if math.isnan(elapsed_s) or elapsed_s < 0:
        return 0.0
    return elapsed_s if elapsed_s <= MAX_GAP_INTERVALS * interval_s else interval_s


def throttled_s(gpu: Record, seconds: float) -> dict[str, float]:
    """How long each reason held a GPU's clocks down, in a sample that stands for so many seconds."""
    held = gpu.get("throttled_s")
    if isinstance(held, dict):
        return {str(reason): value for reason in held if (value := number(held[reason])) is not None}
    reasons = gpu.get("throttle_reasons")
    return dict.fromkeys(map(str, reasons), seconds) if isinstance(reasons, list) else {}


def _open_parts(path: Path, stack: ExitStack) -> tuple[list[BinaryIO], list[BinaryIO]]:
    """The thinned part and those with every sample, none or one and none to two of them."""
    newest = _open(path, stack)
    before = _open(old_part(path), stack)
    # The newest becomes the old one when the monitor goes on in a new part: if just now, both are the same file.
    if newest and before and _inode(newest[0]) == _inode(before[0]):
        before = []
    thin = _open(thin_part(path), stack)
    if not (thin or before or newest):
        open_to_read(path).close()  # raises what the trouble is
    return thin, before + newest


def _open(path: Path, stack: ExitStack) -> list[BinaryIO]:
    try:
        return [stack.enter_context(open_to_read(path))]
    except OSError:
        return []


def _inode(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_ino


def records_of(file: BinaryIO) -> Iterator[Record]:
    """The sound lines of one part: events, and samples in which ``host`` is a dict and each GPU has a ``uuid``."""
    return (record for record in map(_parse, file) if record is not None)


def first_time(path: Path) -> float | None:
    """When a part begins; None where there is none."""
    with suppress(OSError), open_to_read(path) as file:
        return next((float(record["time"]) for record in records_of(file)), None)
    return None


def _parse(line: bytes) -> Record | None:
    """A record with a time, or None: half a line, not UTF-8, garbage nested without end, somebody else's JSON."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or number(record.get("time")) is None:
        return None
    return record if "event" in record else _sound(record)


def _sound(sample: Record) -> Record:
    host, gpus = sample.get("host"), sample.get("gpus")
    sample["host"] = host if isinstance(host, dict) else {}
    sample["gpus"] = [gpu for gpu in gpus if _is_gpu(gpu)] if isinstance(gpus, list) else []
    if number(sample.get("seconds")) is None or number(sample.get("num_samples")) is None:
        sample.pop("seconds", None)
        sample["num_samples"] = 1
    return sample


def _is_gpu(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("uuid"), str)


def _seek(file: BinaryIO, since: float) -> None:
    """Go to a line not far before the first record of ``since``; the times of the lines only grow."""
    low, high = 0, file.seek(0, os.SEEK_END)
    while high - low > _SCANNED_BYTES:
        middle = (low + high) // 2
        file.seek(middle)
        file.readline()  # the rest of a line
        record = next(records_of(file), None)
        if record is None or record["time"] >= since:
            high = middle
        else:
            low = middle
    file.seek(low)
    if low:
        file.readline()
