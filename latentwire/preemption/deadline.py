"""How long until the machine is gone, and whether one more step still fits. Pure, but for the clocks handed in."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping

from latentwire.preemption.handler import Notice

WINDOW = 100
"""So many durations are remembered."""
MARGIN_S = 2.0
"""Seconds left over for leaving: closing files, the requeue, the exit."""


def deadline(
    notice: Notice,
    grace_s: float,
    environ: Mapping[str, str],
    end_unix_s: float | None = None,
) -> float:
    """The monotonic time at which the machine is expected to be taken away.

    Asked after a notice, at a safe point, never in a handler. The earliest of the configured grace, Slurm's
    SLURM_JOB_END_TIME (unix seconds, from Slurm 23.02; the job's time limit), and the scheduler's present EndTime
    (which at preemption is notice + GraceTime): to be early costs a step, to be late costs all since the last save.
    The partition's GraceTime itself is left out: it does not govern `scancel -s TERM` and the time limit's warning.

    Args:
        notice: what came.
        grace_s: configured seconds between notice and kill.
        environ: the process environment.
        end_unix_s: the job's EndTime as the scheduler gives it now; None where it does not.
    """
    ends = [notice.unix_s + grace_s, end_unix_s]
    text = environ.get("SLURM_JOB_END_TIME", "")
    if text.isdecimal():
        ends.append(float(text))
    earliest = min(end for end in ends if end is not None and end > notice.unix_s)
    return notice.monotonic_s + (earliest - notice.unix_s)


class Pace:
    """Recent durations of one kind of work, for a careful guess at the next. Seconds."""

    def __init__(self) -> None:
        self._durations: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self.num = 0
        """How many were recorded."""

    def add(self, seconds: float) -> None:
        """Record one."""
        self.num += 1
        self._durations.append(seconds)

    @property
    def p95(self) -> float:
        """The 95th percentile of the last 100 (nearest rank); 0 before the first."""
        if not self._durations:
            return 0.0
        ordered = sorted(self._durations)
        return ordered[math.ceil(0.95 * len(ordered)) - 1]


def step_fits(now: float, deadline: float, step_left_s: float, save_s: float) -> bool:
    """Whether the rest of the step, a save, and leaving still fit before the deadline. Monotonic seconds."""
    return now + step_left_s + save_s + MARGIN_S < deadline
