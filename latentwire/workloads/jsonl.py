"""JSON lines files as a stream of training data."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from latentwire.errors import WorkloadError


class JsonlShards:
    """Files with one JSON object per line; an offset is a position in bytes. See ``ShardedSource``.

    Nothing is held in memory but the line that is being read. Files may not change while the run lasts.

    Args:
        paths: the files, in any order. Blank lines and empty files are passed over.

    Raises:
        WorkloadError: none, one twice, one that is no file, or a compressed one.
    """

    def __init__(self, paths: Iterable[str | Path]) -> None:
        self.shards = tuple(sorted(map(str, paths)))
        """Sorted, as a listing of a folder has another order on another machine."""
        if not self.shards:
            raise WorkloadError("no JSON lines files were given: does a pattern match nothing?")
        path, number = Counter(self.shards).most_common(1)[0]
        if number > 1:
            raise WorkloadError(f"{path} is given {number} times: give each file once, an epoch reads it once")
        for path in self.shards:
            if path.endswith(".gz"):
                raise WorkloadError(f"{path} is compressed, and no position in it can be returned to: gunzip it")
            if not os.path.isfile(path):
                raise WorkloadError(f"{path} is no file: look at the paths, and whether this machine sees them")

    def read(self, shard: str, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
        """The objects of a file from a byte on, each with the position behind its line.

        Raises:
            WorkloadError: the file cannot be read, is not what it was, or a line holds no JSON object.
        """
        try:
            with open(shard, "rb") as file:
                _go_to(file, shard, offset)
                for line in file:
                    start, offset = offset, offset + len(line)
                    if line.strip():
                        yield _parse(line, f"{shard}, byte {start}"), offset
        except OSError as error:
            raise WorkloadError(f"{shard}, byte {offset}: {error.strerror or error}: make it readable here") from error


def _go_to(file: BinaryIO, path: str, offset: int) -> None:
    """Go to the beginning of a line or to the end."""
    size = os.fstat(file.fileno()).st_size
    file.seek(max(0, offset - 1))
    if offset > size or (0 < offset < size and file.read(1) != b"\n"):
        raise WorkloadError(
            f"{path}, byte {offset}: no line begins here (the file has {size} bytes), so it was changed since the "
            "checkpoint was made: put the old file back, or start a new run"
        )
    file.seek(offset)


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        if not line.endswith(b"\n"):
            raise WorkloadError(f"{where}: the last line is cut off: write the file anew, or remove the line") from None
        raise WorkloadError(f"{where}: no JSON ({error}): correct or remove the line") from None
    if not isinstance(row, dict):
        raise WorkloadError(f"{where}: a JSON object was expected, not {line[:40]!r}: write {{...}} on each line")
    return row
