"""What the ranks of an attempt say of their end, ``rank<r>.json``, and what follows from all of it."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any

from latentwire.run.atomic import read_json, write_json
from latentwire.run.budget import Verdict
from latentwire.run.directory import Attempt

_WORD = re.compile(r"rank(\d+)\.json")


@dataclasses.dataclass(frozen=True)
class RankEnd:
    """How a rank ended, and when it said so (unix seconds). 0: it was killed and said nothing; others only followed."""

    verdict: Verdict
    time: float = 0.0

    @property
    def is_failure(self) -> bool:
        """The other ranks cannot go on."""
        return self.verdict.outcome in ("failed", "fenced")

    @property
    def is_echo(self) -> bool:
        """It may only have lost the connection to a rank to which something else happened."""
        return self.verdict.outcome == "failed" and self.verdict.cause == "network"


def said_by_ranks(attempt: Attempt) -> dict[int, RankEnd]:
    """The ends that are on disk. Lists the folder: a network file system then looks anew for files of other nodes."""
    names = [path.name for path in attempt.path.iterdir()]
    found = {int(match[1]): read_json(attempt.path / match[0]) for name in names if (match := _WORD.fullmatch(name))}
    return {rank: _read(record) for rank, record in found.items() if isinstance(record, dict)}


def say_for(attempt: Attempt, rank: int, verdict: Verdict) -> None:
    """Write down how a rank ended that could not do so itself. Called by the agent of its node."""
    record = {key: value for key, value in dataclasses.asdict(verdict).items() if value is not None}
    write_json(attempt.path / f"rank{rank}.json", record | {"time": time.time()})


def judge(ends: Mapping[int, RankEnd]) -> Verdict:
    """The gravest of what happened to the ranks; of several failures the first is the cause.

    A lost connection counts least: that is how the other ranks fail a moment after one that was killed.
    """
    gravest = min(map(_gravity, ends.values()))
    equals = {rank: end for rank, end in ends.items() if _gravity(end) == gravest}
    first = min(equals, key=lambda rank: (equals[rank].time if equals[rank].is_failure else 0.0, rank))
    return equals[first].verdict


def _gravity(end: RankEnd) -> int:
    order = ["failed", "fenced", "preempted", "echo", "finished"]
    return order.index("echo" if end.is_echo else end.verdict.outcome)


def _read(record: dict[str, Any]) -> RankEnd:
    verdict = Verdict(record["outcome"], record.get("cause"), record.get("step"), record.get("error"))
    return RankEnd(verdict, float(record.get("time", 0)))
