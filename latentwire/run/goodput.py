"""Where a run's time went: every millisecond in one class, from the first submission to the end, or to now.

Read from the journals alone. Spans touch and do not overlap, so their sum is the wall clock exactly. Times of several
writers, whose clocks may differ, are put in order: no span is negative.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from latentwire.run.budget import Verdict, verdict_of
from latentwire.run.directory import Attempt, Run
from latentwire.run.figures import number, whole
from latentwire.run.journal import newest_first, time_of

KINDS = (
    "queued",
    "starting",
    "loading",
    "restoring",
    "training",
    "redoing",
    "saving",
    "evaluating",
    "draining",
    "failed",
    "stopped",
)
"""``starting``: processes, libraries, warm-up. ``loading``: models and data. ``restoring``: the checkpoint.
``redoing``: steps that an earlier attempt had done and lost. ``saving``: training waits for a save. ``draining``: from
a notice to the end. ``failed``: from the last sign of life of an attempt that went wrong to its end, and pauses in its
allocation. ``stopped``: nobody wanted it to run."""
PRODUCTIVE = "training"
NOT_ALLOTTED = ("queued", "stopped")
FIRST_START = "first start"

_SIGNS_OF_TROUBLE = ("waiting", "stuck", "goes_on")
_BEGINS = ("submitting", "submitted", "resumed")
_FOR_GOOD = ("finished", "interrupted", "cancelled")


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of time in one class.

    Attributes:
        kind: one of ``KINDS``.
        begin_ms, end_ms: milliseconds since the epoch.
        attempt: whose it is; None between attempts.
        cause: what it is due to: ``first start``, ``preempted``, ``lost``, ``oom``, ``network`` and so on (how the
            attempt before ended, for what a restart costs), ``saves``, ``evaluation``; empty for training.
        num_gpus: that were held, whether ranks used them or not.
    """

    kind: str
    begin_ms: int
    end_ms: int
    attempt: int | None
    cause: str
    num_gpus: int

    @property
    def seconds(self) -> float:
        """How long."""
        return (self.end_ms - self.begin_ms) / 1000


@dataclasses.dataclass(frozen=True)
class Ledger:
    """The account of a run, or of several. Spans of one run touch; ``sum`` of all is the wall clock."""

    spans: tuple[Span, ...]

    @property
    def wall_s(self) -> float:
        """Seconds of all spans."""
        return sum(span.end_ms - span.begin_ms for span in self.spans) / 1000

    @property
    def allotted_s(self) -> float:
        """Seconds in which the run had an allocation."""
        return sum(s.end_ms - s.begin_ms for s in self.spans if s.kind not in NOT_ALLOTTED) / 1000

    @property
    def goodput(self) -> float | None:
        """Seconds of training that stood, over those allotted; None before there were any."""
        allotted_s = self.allotted_s
        return self.seconds_of(PRODUCTIVE) / allotted_s if allotted_s else None

    def seconds_of(self, kind: str) -> float:
        """Seconds in a class."""
        return sum(span.end_ms - span.begin_ms for span in self.spans if span.kind == kind) / 1000

    def seconds(self) -> dict[str, float]:
        """Seconds in each class."""
        return {kind: self.seconds_of(kind) for kind in KINDS}

    def lost_by_cause(self) -> dict[str, tuple[float, float]]:
        """Cause -> seconds and GPU-hours of allotted time that was not training; the largest first."""
        lost: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
        for span in self.spans:
            if span.kind != PRODUCTIVE and span.kind not in NOT_ALLOTTED:
                lost[span.cause][0] += span.end_ms - span.begin_ms
                lost[span.cause][1] += (span.end_ms - span.begin_ms) * span.num_gpus
        in_order = sorted(lost.items(), key=lambda item: (-item[1][1], -item[1][0]))
        return {cause: (ms / 1000, gpu_ms / 3_600_000) for cause, (ms, gpu_ms) in in_order}

    @property
    def gpu_hours(self) -> float:
        """GPU-hours held."""
        return sum((s.end_ms - s.begin_ms) * s.num_gpus for s in self.spans) / 3_600_000


def together(ledgers: Iterable[Ledger]) -> Ledger:
    """The account of a fleet."""
    return Ledger(tuple(span for ledger in ledgers for span in ledger.spans))


def ledger_of(run: Run, now: float, alive: bool) -> Ledger:
    """Fold a run's journals. Reads only; does not block, and no half-written or missing file upsets it.

    Args:
        run: the run; a ``SeenRun`` where more is asked of it, so that its files are read once.
        now: seconds since the epoch.
        alive: whether its newest attempt runs; who does not know asks ``latentwire.run.status.account_of``.
    """
    attempts = run.attempts()
    own = run.own_events()
    for_good = _FOR_GOOD if was_submitted(own) else (*_FOR_GOOD, "failed")
    claims = [_claimed(attempt) for attempt in attempts]
    begun = [time_of(e) for e in own if e.get("event") in _BEGINS]
    known = [time_s for time_s in (*begun[:1], *claims[:1]) if time_s > 0]
    if not known:
        return Ledger(())
    painter = _Painter(_ms(min(known)))
    painter.turn(painter.begin_ms, "queued", None, FIRST_START, 0)
    cause, most_steps = FIRST_START, 0
    for attempt, claimed, following in itertools.zip_longest(attempts, claims, attempts[1:]):
        told = _Told(attempt, most_steps, cause)
        verdict = None if following is None and alive else verdict_of(attempt)
        told.paint(painter, claimed, verdict)
        if verdict is None:  # it runs
            break
        cause = cause_of(verdict)
        most_steps = max(most_steps, told.last_step)
        again_here = verdict.outcome == "failed" and following is not None and _same_job(attempt, following)
        until = _claimed(following) if following is not None else now
        meanwhile = [e for e in own if painter.open_ms <= _ms(time_of(e)) and time_of(e) <= until]
        _paint_gap(painter, told.num_gpus, verdict, meanwhile, again_here, verdict.outcome in for_good)
    return painter.ledger(_end_ms(run, own, attempts, painter.open_ms, now, alive, for_good))


def was_submitted(own_events: Iterable[dict[str, Any]]) -> bool:
    """Whether it was ever a job of ours; else it is a program of the user's, which nobody tries again."""
    return any(event.get("event") in _BEGINS for event in own_events)


def cause_of(verdict: Verdict) -> str:
    """What the restart after such an end is due to, in one word."""
    return verdict.cause or verdict.outcome


_TURNS = {
    *("notice", "draining", "workload_built", "restored", "training_started", "caught_up"),
    *("evaluation_started", "evaluation_finished", "save_staged"),
}
"""Events at which an attempt's time goes to another class; most others tell of saves."""


_OWN_CAUSES = {"training": "", "saving": "saves", "evaluating": "evaluation"}
"""All other classes of an attempt's time are owed to what ended the one before."""


class _Painter:
    """Lays span after span; each begins where the one before ends."""

    def __init__(self, begin_ms: int) -> None:
        self.begin_ms = self.open_ms = begin_ms
        self.kind = ""
        self._rest: tuple[int | None, str, int] = (None, "", 0)
        self._spans: list[Span] = []

    def turn(self, at_ms: int, kind: str, attempt: int | None, cause: str, num_gpus: int) -> None:
        """From here on it is this. A time before the last turn counts as that turn's."""
        at_ms = max(at_ms, self.open_ms)
        if at_ms > self.open_ms:
            self._spans.append(Span(self.kind, self.open_ms, at_ms, *self._rest))
        self.open_ms, self.kind, self._rest = at_ms, kind, (attempt, cause, num_gpus)

    def ledger(self, end_ms: int) -> Ledger:
        self.turn(end_ms, "", None, "", 0)
        return Ledger(tuple(self._spans))


class _Told:
    """What an attempt's journals say of where its time went."""

    def __init__(self, attempt: Attempt, most_steps: int, cause: str) -> None:
        self._attempt = attempt
        self._most_steps, self._restart_cause = most_steps, cause
        # one without a time cannot be placed: a line of somebody else's, or a damaged one
        self._events = [e for e in attempt.events() if e["writer"] in ("agent", "rank0") and time_of(e)]
        self.num_gpus = _gpus_held(attempt)
        last = attempt.last_step()
        self.last_step = whole(last.get("step"), 0)
        self.last_life_s = max(_claimed(attempt), time_of(last), self._last_sign_of_life())
        ended = attempt.ended()
        self._end_s = time_of(ended) if ended is not None else self._last_write_s(attempt)

    def paint(self, painter: _Painter, claimed: float, verdict: Verdict | None) -> None:
        """Lay this attempt's spans; ``verdict`` is None while it runs."""
        self._painter = painter
        self._turn(claimed, "starting")
        self._working = "training"
        by_hand = verdict is not None and verdict.outcome in ("interrupted", "cancelled")
        self._noticed_for = cause_of(verdict) if verdict is not None and by_hand else "preempted"
        for event in self._events_in_order():
            self._take(event)
        if verdict is not None:
            if verdict.outcome in ("failed", "lost", "fenced") and painter.kind != "draining":
                self._turn(self.last_life_s, "failed", cause_of(verdict))
            painter.turn(_ms(self._end_s), "queued", None, cause_of(verdict), 0)

    def _take(self, event: dict[str, Any]) -> None:
        name = event.get("event")
        if name not in _TURNS or self._painter.kind == "draining":  # what follows a notice belongs to it
            return
        at = time_of(event)
        began = at - (number(event.get("seconds")) or 0.0)
        if name in ("notice", "draining"):
            self._turn(number(event.get("received")) or at, "draining", self._noticed_for)
        elif name in ("workload_built", "restored"):
            self._turn(began, "loading" if name == "workload_built" else "restoring")
            self._turn(at, "starting")
        elif name == "training_started":
            self._working = "redoing" if whole(event.get("step"), 0) < self._most_steps else "training"
            self._turn(at, self._working)
        elif name == "caught_up":
            self._working = "training"
            if self._painter.kind == "redoing":
                self._turn(at, "training")
        elif name in ("evaluation_started", "evaluation_finished"):
            self._turn(at, "evaluating" if name == "evaluation_started" else self._working)
        elif name == "save_staged":
            self._turn(began, "saving")
            if event.get("reason") != "last":  # after the last step only the save is waited for
                self._turn(at, self._working)

    def _turn(self, at_s: float, kind: str, cause: str | None = None) -> None:
        because = cause or _OWN_CAUSES.get(kind, self._restart_cause)
        self._painter.turn(_ms(at_s), kind, self._attempt.number, because, self.num_gpus)

    def _events_in_order(self) -> list[dict[str, Any]]:
        """All events, and when the attempt had done again what an earlier one had lost."""
        started = next((e for e in self._events if e.get("event") == "training_started"), {})
        if whole(started.get("step"), 0) >= self._most_steps:
            return self._events
        at = self._attempt.reached_at(self._most_steps)
        caught_up = [] if at is None else [{"time": at, "event": "caught_up"}]
        return sorted(self._events + caught_up, key=time_of)

    def _last_sign_of_life(self) -> float:
        """Of the ranks' work: that the agent is there, warns and cleans up, is none."""
        return next((time_of(e) for e in reversed(self._events) if _is_sign_of_work(e)), 0.0)

    def _last_write_s(self, attempt: Attempt) -> float:
        """Of an attempt that ended without a word: its last one, the monitor's included."""
        parts = (attempt.path / name for name in ("gpu_stats.jsonl", "gpu_stats.thin.jsonl"))  # in time the first goes
        monitored = (record for part in parts for record in itertools.islice(newest_first(part), 1))
        return max([self.last_life_s, *map(time_of, monitored), *map(time_of, self._events)])


def _paint_gap(
    painter: _Painter,
    num_gpus: int,
    verdict: Verdict,
    meanwhile: Sequence[dict[str, Any]],
    again_here: bool,
    for_good: bool,
) -> None:
    """What comes between an attempt's end and the next one's claim, by what the orchestrator wrote meanwhile."""
    ended_ms, cause = painter.open_ms, cause_of(verdict)
    if again_here:  # a pause after a failure, in the same allocation
        painter.turn(ended_ms, "failed", None, cause, num_gpus)
    elif verdict.outcome == "lost":
        found_out = [time_of(e) for e in meanwhile if e.get("event") in ("attempt_lost", *_BEGINS)]
        if found_out:  # until somebody noticed it did not even wait
            painter.turn(ended_ms, "failed", None, cause, 0)
            painter.turn(_ms(found_out[0]), "queued", None, cause, 0)
    stop = [e for e in meanwhile if e.get("event") == "given_up"]
    if (for_good and not again_here) or stop:
        painter.turn(_ms(time_of(stop[0])) if stop else ended_ms, "stopped", None, cause, 0)
        again = [time_of(e) for e in meanwhile if e.get("event") in _BEGINS and time_of(e) >= painter.open_ms / 1000]
        if again:
            painter.turn(_ms(again[0]), "queued", None, cause, 0)


def _end_ms(
    run: Run,
    own: Sequence[dict[str, Any]],
    attempts: Sequence[Attempt],
    open_ms: int,
    now: float,
    alive: bool,
    for_good: Sequence[str],
) -> int:
    """Where the account ends: now, unless nobody wants the run to go on."""
    over = not alive and (
        run.is_cancelled()
        or (bool(own) and own[-1].get("event") == "given_up")
        or (bool(attempts) and verdict_of(attempts[-1]).outcome in for_good)
    )
    return open_ms if over else max(open_ms, _ms(now))


def _is_sign_of_work(event: dict[str, Any]) -> bool:
    name = event.get("event")
    return name in ("attempt_started", "placed") or (event["writer"] == "rank0" and name not in _SIGNS_OF_TROUBLE)


def _same_job(attempt: Attempt, following: Attempt) -> bool:
    keys = ("job_id", "restart")
    return [attempt.record().get(k) for k in keys] == [following.record().get(k) for k in keys]


def _gpus_held(attempt: Attempt) -> int:
    """What the scheduler gave the job; where it does not say, what the nodes' agents saw or what ranks were given."""
    given = attempt.record().get("gpus")
    if given is not None:
        return whole(given, 0)
    seen = [environment.get("gpus") for environment in attempt.environments()]
    return max(sum(len(gpus) for gpus in seen if isinstance(gpus, list)), _gpus_placed(attempt))


def _gpus_placed(attempt: Attempt) -> int:
    devices = attempt.placement().get("devices")
    ranks = [rank for rank in devices if isinstance(rank, list)] if isinstance(devices, list) else []
    return sum(str(device).startswith("cuda") for rank in ranks for device in rank)


def _claimed(attempt: Attempt) -> float:
    return attempt.claimed() or min(map(time_of, attempt.events()), default=0.0)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
