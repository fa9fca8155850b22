"""Whether a run is started again, read from its attempts on disk, so that every process comes to the same answer."""

from __future__ import annotations

import collections
import dataclasses
from typing import TYPE_CHECKING

from latentwire.run.atomic import read_json
from latentwire.run.directory import Attempt, Run
from latentwire.run.figures import whole
from latentwire.run.journal import read_journal, time_of
from latentwire.run.telling import tell_cause

if TYPE_CHECKING:
    from latentwire.config import RetrySection

_LONGEST_PAUSE_S = 300.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How an attempt ended.

    Attributes:
        outcome: ``finished``, ``preempted``, ``interrupted`` (INT), ``cancelled``, ``fenced``, ``failed``, or ``lost``:
            it ended without a word, or one of its nodes did.
        cause: of a failure: ``oom``, ``network``, ``killed``, ``user`` (would fail again) or ``other``.
        step: completed steps that are safe on disk.
        error: in words.
    """

    outcome: str
    cause: str | None = None
    step: int | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Move:
    """Whether there is to be another attempt, after which pause, and why."""

    again: bool
    pause_s: float
    reason: str


@dataclasses.dataclass(frozen=True)
class History:
    """How a run went so far.

    Attributes:
        seconds: wall-clock seconds of its attempts.
        num_preemptions: how many of these were ended by a notice, or without a word.
    """

    seconds: float
    num_preemptions: int

    @classmethod
    def before(cls, run: Run, attempt: Attempt) -> History:
        """Of all attempts before this one."""
        earlier = [a for a in run.attempts() if a.number < attempt.number]
        times = [[time_of(event) for event in a.events()] for a in earlier]
        ended_by_force = [a for a in earlier if verdict_of(a).outcome in ("preempted", "lost")]
        return cls(sum(max(t) - min(t) for t in times if t), len(ended_by_force))


def verdict_of(attempt: Attempt) -> Verdict:
    """The agent's last word, or ``lost``. Ask only for attempts that are not running."""
    record = attempt.ended()
    if record is None:
        return Verdict("lost", error="it ended without a word (SIGKILL, node failure or the like)")
    cause = str(record["cause"]) if record.get("cause") else None
    return Verdict(str(record.get("outcome")), cause, record.get("step"), record.get("error"))


def committed_step(attempt: Attempt) -> int:
    """The highest step that the attempt committed, 0 if none."""
    records = read_journal(attempt.path / "events.rank0.jsonl")
    steps = (r.get("step") for r in records if r.get("event") == "save_committed")
    return max((step for step in steps if isinstance(step, int)), default=0)


def num_halvings(run: Run, since: int = 0) -> int:
    """How often the run went out of memory from that attempt on: so often its micro-batch is halved.

    Not where two micro-batches were computed at once; one at a time comes first, which changes no bit.
    """
    return sum(_in_flight(attempt) == 1 for attempt in _ran_out_of_memory(run) if attempt.number >= since)


def had_too_many_at_once(run: Run) -> bool:
    """Whether memory ran out while a replica computed several micro-batches at once."""
    return any(_in_flight(attempt) > 1 for attempt in _ran_out_of_memory(run))


def _ran_out_of_memory(run: Run) -> list[Attempt]:
    return [attempt for attempt in run.attempts() if verdict_of(attempt).cause == "oom"]


def _in_flight(attempt: Attempt) -> int:
    placement = read_json(attempt.path / "placement.json")
    return whole(placement.get("in_flight"), 1) if isinstance(placement, dict) else 1


def next_move(run: Run, retry: RetrySection) -> Move:
    """What follows the newest attempt, which must have ended. A step gained, or a person, sets all counts to zero."""
    counts: collections.Counter[str] = collections.Counter()
    best = 0
    verdict = Verdict("none")
    resumed_after = _resumed_after(run)
    for attempt in run.attempts():
        verdict = verdict_of(attempt)
        step = committed_step(attempt)
        if step > best:
            best = step
            counts.clear()
        counts[_budget_of(verdict)] += 1
        if attempt.number == resumed_after:
            counts.clear()
            verdict = Verdict("none")
    return _move(verdict, counts, retry)


def _resumed_after(run: Run) -> int:
    """The attempt after which a person last started the run again."""
    records = read_journal(run.orchestrator_events)
    return max((whole(r.get("after_attempt"), 0) for r in records if r.get("event") == "resumed"), default=0)


def _budget_of(verdict: Verdict) -> str:
    if verdict.outcome == "lost" or verdict.cause == "killed":
        return "lost"
    return verdict.cause or verdict.outcome


def _move(verdict: Verdict, counts: collections.Counter[str], retry: RetrySection) -> Move:
    if verdict.outcome in ("none", "preempted"):
        return Move(True, 0.0, "not started yet" if verdict.outcome == "none" else "preempted")
    if verdict.outcome not in ("failed", "lost"):
        return Move(False, 0.0, verdict.outcome)
    budget = _budget_of(verdict)
    if budget == "user":
        return Move(False, 0.0, f"would fail again: {verdict.error}")
    allowed = {"oom": retry.oom, "network": retry.network, "lost": retry.lost}.get(budget, retry.other)
    used, words = counts[budget], tell_cause(budget)
    if used > allowed:
        return Move(False, 0.0, f"{words} {used} times without a step gained, {allowed} allowed: {verdict.error}")
    pause = min(_LONGEST_PAUSE_S, retry.network_backoff_s * 2 ** (used - 1)) if budget == "network" else 0.0
    return Move(True, pause, f"{words}, {used} of {allowed}: {verdict.error}")
