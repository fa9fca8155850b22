"""Append-only JSONL files with one writer each, and readers that nothing upsets.

A line is written by one ``write`` call on an ``O_APPEND`` descriptor. A writer that is killed in mid-line leaves a half
line, which every reader skips and the next writer closes.
"""

from __future__ import annotations

import collections
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from latentwire.run.atomic import json_safe, open_to_read
from latentwire.run.figures import number

_TAIL_BYTES = 64 * 1024
_END_OF_TIME = 2.5e11  # in the year 9892: beyond it no calendar goes far
_MOST_UNWRITTEN = 10_000
_ENCODER = json.JSONEncoder(
    allow_nan=False, default=lambda value: dict(value) if isinstance(value, Mapping) else str(value)
)
_decode: Callable[[bytes], Any] = msgspec.json.Decoder().decode  # six times as fast for a line as json.loads


class Journal:
    """The one writer of a JSONL file. Never fails for the disk's sake: work must go on while a disk is full.

    Events are few and are kept until they can be written; plain records are many, and one that cannot be written is
    dropped, counted, and told of by a ``records_lost`` event once the disk takes lines again. Thread-safe.

    Args:
        path: the file; made if missing.
        clock: seconds since the epoch, for the ``time`` of each line.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._descriptor = _open(path)
        size = os.fstat(self._descriptor).st_size
        self._torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"
        self._unwritten: collections.deque[dict[str, Any]] = collections.deque(maxlen=_MOST_UNWRITTEN)
        self._num_lost = 0
        self._failure = ""
        self._lock = threading.Lock()

    def event(self, name: str, /, **fields: Any) -> None:
        """Write ``{"time", "event", ...}`` now or, if the disk refuses, before the next line that it takes."""
        with self._lock:
            self._unwritten.append({"time": self._now(), "event": name, **fields})
            self._write_events()

    def record(self, **fields: Any) -> None:
        """Write ``{"time", ...}``, or count it as lost."""
        with self._lock:
            if not (self._write_events() and self._write({"time": self._now(), **fields})):
                self._num_lost += 1
            elif self._num_lost:
                loss = {"num_records": self._num_lost, "reason": self._failure}
                self._unwritten.append({"time": self._now(), "event": "records_lost", **loss})
                self._num_lost = 0
                self._write_events()

    def is_at_path(self) -> bool:
        """Whether lines go to the file that is at the path now: not after a rename that ``reopen`` did not follow."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except OSError:  # it is gone, or stale: what the trouble is, reopen will say
            return False

    def reopen(self) -> None:
        """Go on in the file that is at the path now, made if missing; for a writer that renamed the one before.

        Raises:
            OSError: it cannot be opened; lines go on to the one before.
        """
        with self._lock:
            descriptor, before = _open(self.path), self._descriptor
            self._descriptor, self._torn = descriptor, False
            os.close(before)

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; every line written is already with the kernel."""
        os.close(self._descriptor)

    def _now(self) -> float:
        return round(self._clock(), 3)

    def _write_events(self) -> bool:
        while self._unwritten and self._write(self._unwritten[0]):
            self._unwritten.popleft()
        return not self._unwritten

    def _write(self, fields: dict[str, Any]) -> bool:
        line = (_encode(fields) + "\n").encode()
        data = b"\n" + line if self._torn else line  # the rest of a torn line must not swallow this one too
        try:
            num_written = os.write(self._descriptor, data)
        except OSError as error:
            self._failure = os.strerror(error.errno or 0)
            return False
        self._torn = num_written < len(data)
        if self._torn:
            self._failure = "the disk took only a part of a line"
        return not self._torn


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _encode(fields: dict[str, Any]) -> str:
    try:
        return _ENCODER.encode(fields)
    except (ValueError, TypeError):  # NaN, an infinity or a strange key somewhere: seldom, and slow to look for
        return json.dumps(json_safe(fields), allow_nan=False, default=str)


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """All whole records of a file in order; a missing file has none, half-written or foreign lines are skipped."""
    try:
        with open_to_read(path) as file:
            for line in file:
                record = parse_line(line)
                if record is not None:
                    yield record
    except (FileNotFoundError, NotADirectoryError):
        return


def time_of(record: Mapping[str, Any]) -> float:
    """A record's time for sorting; 0 where a foreign line has none that a calendar knows."""
    time_s = record.get("time")
    if type(time_s) is not float:  # ours are
        time_s = float(number(time_s) or 0.0)
    return time_s if -_END_OF_TIME < time_s < _END_OF_TIME else 0.0


def newest_first(path: Path) -> Iterator[dict[str, Any]]:
    """The whole records in the end of a file, the last one first; a missing file has none."""
    try:
        with open_to_read(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)
    except (FileNotFoundError, NotADirectoryError):
        return
    yield from (record for record in map(parse_line, reversed(lines)) if record is not None)


def last_record(path: Path, key: str = "time") -> dict[str, Any] | None:
    """The last whole record that has ``key``, looked for in the end of the file only."""
    return next((record for record in newest_first(path) if key in record), None)


class Follower:
    """Reads what was appended to a file since the last call; a file that does not exist yet has nothing.

    Only whole lines are returned: the half line at the end is read again next time. A file that was put in the place of
    another, or has become shorter, is read from its start.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._inode: int | None = None

    def read(self) -> list[dict[str, Any]]:
        """New whole records since the last call. Does not block."""
        return [r for r in map(parse_line, self.read_lines().split(b"\n")) if r is not None]

    def read_lines(self, most_bytes: int = -1) -> bytes:
        """New whole lines as they are, of so many bytes at most; nothing where there are none. Does not block."""
        try:
            with open_to_read(self.path) as file:
                stat = os.fstat(file.fileno())
                if stat.st_ino != self._inode or stat.st_size < self._offset:  # a new file may get the inode of an old
                    self._inode, self._offset = stat.st_ino, 0
                file.seek(self._offset)
                data = file.read(most_bytes)
        except (FileNotFoundError, NotADirectoryError):
            return b""
        whole = data[: data.rfind(b"\n") + 1]
        if not whole and len(data) == most_bytes:
            whole = data  # no line of ours is so long: it is given out in parts, none of which is a record
        self._offset += len(whole)
        return whole


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None for one that is half-written or holds something else."""
    try:
        record = _decode(line)
    except (ValueError, RecursionError):
        record = _foreign(line)
    return record if isinstance(record, dict) else None


def _foreign(line: bytes) -> Any:
    """The standard library takes some lines that are no JSON, such as one with a bare NaN."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
