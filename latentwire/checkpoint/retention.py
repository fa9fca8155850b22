"""Which checkpoints stay. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Kept:
    """What retention must know of a checkpoint; ``metric`` is the one that ``best`` goes by, None if not measured."""

    step: int
    verified: bool
    metric: float | None = None


def best_of(checkpoints: Iterable[Kept], mode: Literal["min", "max"]) -> Kept | None:
    """The verified checkpoint with the best metric; of equals the earliest."""
    measured = [c for c in checkpoints if c.verified and c.metric is not None and c.metric == c.metric]
    sign = 1 if mode == "min" else -1
    return min(measured, key=lambda c: (sign * (c.metric or 0.0), c.step), default=None)


def to_delete(checkpoints: Iterable[Kept], keep: int, mode: Literal["min", "max"]) -> list[int]:
    """Steps whose checkpoints may go: all but the newest ``keep`` verified, the best, and any newer than those.

    While nothing is verified nothing goes: an unverified checkpoint is no replacement for an older one.
    """
    ordered = sorted(checkpoints, key=lambda c: c.step)
    verified = [c.step for c in ordered if c.verified]
    stay = set(verified[-keep:])
    best = best_of(ordered, mode)
    if best is not None:
        stay.add(best.step)
    newest_verified = verified[-1] if verified else -1
    return [c.step for c in ordered if c.step not in stay and c.step < newest_verified]
