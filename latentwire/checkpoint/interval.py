"""How often to save: what saving costs against what a kill would cost. Pure."""

from __future__ import annotations

import dataclasses
import math

PRIOR_S = 3600.0
"""A run that was never preempted is taken to have been once in an hour, until it has trained for longer."""
SHORTEST_S, LONGEST_S = 30.0, 1800.0
DISK_SHARE = 0.25
"""A save, read back, may keep the disk busy for so much of the time."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """Seconds between saves, and in words why."""

    seconds: float
    reason: str


def choose(stall_s: float, busy_s: float, trained_s: float, num_preemptions: int) -> Interval:
    """The interval that loses least time to saves and to redone steps together, within bounds.

    sqrt(2 x stall x time between preemptions): Young, "A first order approximation to the optimum checkpoint interval",
    CACM 17(9), 1974.

    Args:
        stall_s: what training waits for one save.
        busy_s: what one save takes in the background, with its read-back.
        trained_s: wall-clock seconds of the run's attempts so far.
        num_preemptions: how many of them were ended by force.
    """
    between_s = (trained_s + PRIOR_S) / (num_preemptions + 1)
    best = math.sqrt(2 * stall_s * between_s)
    shortest = max(SHORTEST_S, busy_s / DISK_SHARE)
    seconds = min(max(best, shortest), max(LONGEST_S, shortest))
    reason = (
        f"a save stops training for {stall_s:.3f} s and takes {busy_s:.1f} s; {num_preemptions} preemptions in "
        f"{trained_s:.0f} s: sqrt(2 x {stall_s:.3f} x {between_s:.0f}) = {best:.1f} s"
    )
    if seconds != best:
        reason += f", held between {shortest:.0f} and {max(LONGEST_S, shortest):.0f} s"
    return Interval(seconds, reason)
