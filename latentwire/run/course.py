"""The course of a run, for people: its spans of time and the events that matter, one after the other.

Stretches of training are told in one entry each, with the saves and evaluations in them: a run with 10,000 saves has
as few entries as one with ten.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from latentwire.run import figures
from latentwire.run.directory import Attempt
from latentwire.run.goodput import Ledger, Span
from latentwire.run.journal import time_of
from latentwire.run.seen import SeenRun
from latentwire.run.telling import tell, tell_cause

_WORK = ("training", "redoing")
_WITHIN_WORK = ("saving", "evaluating")
_ROUTINE = ("save_staged", "save_committed", "evaluation_finished", "mirror_committed")
_SAID_BY_SPANS = ("workload_built", "training_started", "draining")
_EXPLAINS = {"attempt_started": "starting", "warmup_started": "starting", "restored": "restoring", "notice": "draining"}
_SHORT_MS = 100


@dataclasses.dataclass(frozen=True)
class Entry:
    """A stretch of time, or an event.

    Attributes:
        time: when it began, unix seconds.
        seconds: how long it took; None for an event.
        attempt: whose it is; None between attempts.
        kind: one of ``latentwire.run.goodput.KINDS``, or the event's name.
        words: what there is to say of it.
    """

    time: float
    seconds: float | None
    attempt: int | None
    kind: str
    words: str


def course_of(run: SeenRun, ledger: Ledger, now: float, whole: bool = False) -> list[Entry]:
    """What happened, in order of time; a stretch comes before the events in it.

    Args:
        run: as it was seen.
        ledger: of the same look.
        now: with which the ledger was made; a stretch that ends then goes on.
        whole: each span and event by itself, however short or frequent.
    """
    events = list(_events(run))
    events_of = {number: [e for e in events if e["attempt"] == number] for number in {e["attempt"] for e in events}}
    stretches = [_Stretch((span,)) for span in ledger.spans] if whole else _stretches(ledger.spans)
    steps = _Steps(run)
    entries = []
    told: set[int] = set()
    for stretch in stretches:
        within = [] if whole else [e for e in events_of.get(stretch.attempt, ()) if stretch.explained_by(e)]
        told.update(map(id, within))
        entries.append(stretch.entry(within, steps, round(now * 1000)))
    for event in events:
        words = tell(event)
        if words is not None and (whole or (id(event) not in told and _is_news(event))):
            entries.append(Entry(time_of(event), None, event["attempt"], str(event.get("event")), words))
    return sorted(entries, key=_place)


def _place(entry: Entry) -> tuple[float, int]:
    """Of entries of the same time: how the attempt before ended, then what begins, then what is told of it."""
    rank = 0 if entry.kind == "attempt_ended" else 1 if entry.seconds is not None else 2
    return round(entry.time, 3), rank


def _is_news(event: dict[str, Any]) -> bool:
    """Whether it says more than the spans do. A forecast is news where a notice would not fit."""
    name = event.get("event")
    return name not in _SAID_BY_SPANS and (name != "forecast" or bool(event.get("warning")))


def _events(run: SeenRun) -> Iterator[dict[str, Any]]:
    """Those of the orchestrators, the agents and the first ranks: the other ranks say the same."""
    yield from ({"attempt": None} | event for event in run.own_events())
    for attempt in run.attempts():
        yield from (e for e in attempt.events() if e["writer"] in ("agent", "rank0") or e["writer"].startswith("node"))


@dataclasses.dataclass(frozen=True)
class _Stretch:
    """Spans that are told in one entry. The first of them is its kind."""

    spans: tuple[Span, ...]

    @property
    def kind(self) -> str:
        return self.spans[0].kind

    @property
    def attempt(self) -> int | None:
        return self.spans[0].attempt

    def takes(self, span: Span) -> bool:
        """Whether a span that follows is told in the same entry."""
        if span.attempt != self.attempt:
            return False
        within = self.kind in _WORK and (span.kind in _WITHIN_WORK or span.kind == self.kind)
        return within or span.end_ms - span.begin_ms < _SHORT_MS

    def explained_by(self, event: dict[str, Any]) -> bool:
        """Whether the event, of the same attempt, is told in the same words."""
        begin, at, end = self.spans[0].begin_ms, round(time_of(event) * 1000), self.spans[-1].end_ms
        name = event.get("event")
        if self.kind in _WORK:
            return name in _ROUTINE and begin < at <= end  # it is told when it is done, and belongs to what it followed
        return _EXPLAINS.get(str(name)) == self.kind and begin <= at <= end

    def entry(self, within: Sequence[dict[str, Any]], steps: _Steps, now_ms: int) -> Entry:
        begin, end = self.spans[0].begin_ms, self.spans[-1].end_ms
        words = ", ".join(filter(None, (self._words(within, steps), "so far" if end == now_ms else "")))
        return Entry(begin / 1000, (end - begin) / 1000, self.attempt, self.kind, words)

    def _words(self, within: Sequence[dict[str, Any]], steps: _Steps) -> str:
        if self.kind in _WORK and self.attempt is not None:
            return ", ".join([steps.done(self.attempt, self.kind), *self._besides(within)])
        if within:
            return "; ".join(filter(None, map(tell, within))) or "warm-up"
        return tell_cause(self.spans[0].cause) if self.kind in ("queued", "failed", "stopped") else ""

    def _besides(self, within: Sequence[dict[str, Any]]) -> Iterator[str]:
        for event, kind, one, many in (
            ("save_staged", "saving", "save", "saves"),
            ("evaluation_finished", "evaluating", "evaluation", "evaluations"),
        ):
            number = sum(e.get("event") == event for e in within)
            waited_s = sum(span.seconds for span in self.spans if span.kind == kind)
            if number or waited_s:
                yield f"{number} {one if number == 1 else many} in {waited_s:.3g} s"


def _stretches(spans: Sequence[Span]) -> list[_Stretch]:
    stretches: list[_Stretch] = []
    gathered: list[Span] = []
    for span in spans:
        if gathered and not _Stretch((gathered[0],)).takes(span):
            stretches.append(_Stretch(tuple(gathered)))
            gathered = []
        gathered.append(span)
    return [*stretches, _Stretch(tuple(gathered))] if gathered else stretches


class _Steps:
    """From which step to which an attempt went."""

    def __init__(self, run: SeenRun) -> None:
        self._attempts = {attempt.number: attempt for attempt in run.attempts()}

    def done(self, number: int, kind: str) -> str:
        """In words; steps that an earlier attempt had done are those of its second kind of work, ``redoing``."""
        attempt = self._attempts[number]
        reached = max((_last_step(each) for each in self._attempts.values() if each.number < number), default=0)
        begin, end = _first_step(attempt), _last_step(attempt)
        if begin < reached:
            begin, end = (begin, min(reached, end)) if kind == "redoing" else (reached, end)
        return f"step {begin} to {max(begin, end)}"


def _first_step(attempt: Attempt) -> int:
    started = next((e for e in attempt.events() if e.get("event") == "training_started"), {})
    return figures.whole(started.get("step"), 0)


def _last_step(attempt: Attempt) -> int:
    return figures.whole(attempt.last_step().get("step"), 0)
