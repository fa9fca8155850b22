"""Thinning what the monitors of a run's earlier attempts left, so that the run stays small however often it starts.

The newest attempts keep every sample, up to :data:`SECONDS_BYTES` a node. Of the others the samples go and the records
by the minute stay; when those have :data:`MINUTES_BYTES` they are thinned again, to one every 2, 4, 8.. minutes. Called
by the leader's monitor for all nodes, as a later attempt may have fewer of them.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from latentwire.monitor.stats import Record, StatsFile, old_part, records_of, stats_files, thin_part
from latentwire.monitor.thin import LONGEST_S, THIN_S, folded, rewrite
from latentwire.run.atomic import replacing
from latentwire.run.directory import Attempt

SECONDS_BYTES = 96 << 20
"""Of the newest attempts before this one: no less than one of them may have."""
MINUTES_BYTES = 128 << 20
"""Of all that came before those."""
SETTLED_S = 3600.0
"""A monitor writes each second: a file that nobody wrote for so long has no writer, whatever became of its attempt."""


def thin_earlier(
    attempt: Attempt,
    tell: Callable[[str], None],
    *,
    clock: Callable[[], float] = time.time,
    seconds_bytes: int = SECONDS_BYTES,
    minutes_bytes: int = MINUTES_BYTES,
) -> None:
    """Thin the files of the attempts before this one. Blocks for a moment an attempt, for a minute if all is rewritten.

    A kill at any point costs nothing: readers find each second once, and the next attempt goes on. It stops where a
    newer attempt was claimed, as that one does the same.

    Args:
        attempt: whose monitor this is.
        tell: takes a line on a file that could not be thinned; the others are.
        clock: Unix seconds.
        seconds_bytes: what the newest of them may have together, of each node.
        minutes_bytes: what the others may have together, of each node.
    """
    nodes: defaultdict[str, list[Path]] = defaultdict(list)
    for earlier in reversed(attempt.run.attempts()):
        if earlier.number < attempt.number:
            for path in stats_files(earlier.path):
                nodes[path.name].append(path)
    for newest_first in nodes.values():
        over = [path for path in _beyond(newest_first, seconds_bytes) if clock() - _written_s(path) > SETTLED_S]
        for path in over:
            with _telling(tell, path):
                if _full_parts(path) and attempt.is_newest():
                    _keep_minutes(path)
        _thin_again(attempt, [path for path in over if not _full_parts(path)], minutes_bytes, tell)


def _beyond(newest_first: Sequence[Path], seconds_bytes: int) -> Iterator[Path]:
    """The files that no longer fit, with all that are older."""
    num_bytes = 0
    for path in newest_first:
        num_bytes += sum(map(_size, (thin_part(path), old_part(path), path)))
        if num_bytes > seconds_bytes:
            yield path


def _keep_minutes(path: Path) -> None:
    """Bring what only the samples have (a killed monitor's last minute) into the thinned part, then remove them."""
    thin = thin_part(path)
    if rest := list(folded(_not_thinned(path), THIN_S, math.inf)):
        with replacing(thin, alone=True) as target:
            target.writelines(json.dumps(record) + "\n" for record in itertools.chain(_records(thin), rest))
    for part in _full_parts(path):  # the older first: readers take the thinned records up to where the others begin
        part.unlink(missing_ok=True)


def _not_thinned(path: Path) -> Iterator[Record]:
    told_s = sampled_s = -math.inf
    for record in _records(thin_part(path)):
        told_s = record["time"]
        sampled_s = sampled_s if "event" in record else told_s
    for record in StatsFile(path).read(since=sampled_s):
        if record["time"] > (told_s if "event" in record else sampled_s):
            yield record


def _thin_again(attempt: Attempt, paths: Sequence[Path], minutes_bytes: int, tell: Callable[[str], None]) -> None:
    """Halve what has become too much, so that it is not done again at the next start."""
    parts, span_s = [thin_part(path) for path in paths], THIN_S
    if sum(map(_size, parts)) <= minutes_bytes:
        return
    while sum(map(_size, parts)) > minutes_bytes // 2 and span_s < LONGEST_S:
        span_s *= 2
        for part in parts:
            with _telling(tell, part):
                if attempt.is_newest():
                    rewrite(part, span_s, math.inf)


def _records(path: Path) -> Iterator[Record]:
    with suppress(FileNotFoundError), path.open("rb") as file:
        yield from records_of(file)


def _full_parts(path: Path) -> list[Path]:
    return [part for part in (old_part(path), path) if part.exists()]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # it vanished, or was never there
        return 0


def _written_s(path: Path) -> float:
    """When one of the parts was last written; never: there are none any more."""
    written = [-math.inf]
    for part in (thin_part(path), old_part(path), path):
        with suppress(OSError):
            written.append(part.stat().st_mtime)
    return max(written)


@contextmanager
def _telling(tell: Callable[[str], None], path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        pass  # somebody removed the attempt
    except OSError as error:
        tell(f"{path} was not thinned, the next attempt tries again: {error}")
