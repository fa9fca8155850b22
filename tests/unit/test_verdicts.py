"""What the ends of several ranks add up to."""

from __future__ import annotations

import pytest

from latentwire.run.budget import Verdict
from latentwire.train.verdicts import RankEnd, judge

FINISHED = Verdict("finished", step=8)
PREEMPTED = Verdict("preempted", step=5)
FENCED = Verdict("fenced")
LOST_CONNECTION = Verdict("failed", "network")
OOM = Verdict("failed", "oom")
BUG = Verdict("failed", "other")
KILLED = Verdict("failed", "killed")


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ([(FINISHED, 9.0), (FINISHED, 8.0)], FINISHED),
        ([(PREEMPTED, 9.0), (Verdict("preempted"), 1.0)], PREEMPTED),
        ([(LOST_CONNECTION, 1.0), (OOM, 2.0)], OOM),
        ([(BUG, 2.0), (OOM, 1.0)], OOM),
        ([(BUG, 1.0), (KILLED, 0.0)], KILLED),
        ([(LOST_CONNECTION, 1.0), (FENCED, 2.0)], FENCED),
        ([(LOST_CONNECTION, 1.0), (PREEMPTED, 2.0)], PREEMPTED),
        ([(LOST_CONNECTION, 1.0), (FINISHED, 2.0)], LOST_CONNECTION),
    ],
)
def test_the_first_cause_counts_and_a_lost_connection_least(
    ends: list[tuple[Verdict, float]], verdict: Verdict
) -> None:
    assert judge({rank: RankEnd(*end) for rank, end in enumerate(ends)}) is verdict
