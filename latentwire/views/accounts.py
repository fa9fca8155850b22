"""Where the time of a run went, as a lane of few enough stretches to be drawn, and in sums."""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Iterable
from typing import Any

from latentwire.run.goodput import KINDS, Ledger, Span
from latentwire.run.telling import tell_cause

MAX_STRETCHES = 400


def timeline(ledger: Ledger) -> list[dict[str, Any]]:
    """The time of a run as a lane that can be drawn: stretches that touch, in order of time.

    Spans that are too short to be seen become part of what is beside them; such a stretch is ``mixed``, and of the kind
    that most of it is.
    """
    if not ledger.spans:
        return []
    width_ms = (ledger.spans[-1].end_ms - ledger.spans[0].begin_ms) / MAX_STRETCHES
    stretches: list[_Stretch] = []
    for span in ledger.spans:
        last = stretches[-1] if stretches else None
        if last is not None and last.attempt == span.attempt and last.length_ms < width_ms:
            last.add(span)
        else:
            stretches.append(_Stretch(span))
    by_kind = itertools.groupby(
        _without_short_ends(stretches, width_ms), key=lambda stretch: (stretch.attempt, stretch.kind)
    )
    return [functools.reduce(_Stretch.with_next, group).as_dict() for _, group in by_kind]


def _without_short_ends(stretches: Iterable[_Stretch], width_ms: float) -> list[_Stretch]:
    """What was too short, and had nothing after it in its attempt, belongs to what was before."""
    kept: list[_Stretch] = []
    for stretch in stretches:
        if kept and kept[-1].attempt == stretch.attempt and stretch.length_ms < width_ms:
            kept[-1].with_next(stretch)
        else:
            kept.append(stretch)
    return kept


class _Stretch:
    """Spans of one attempt, one after the other."""

    def __init__(self, span: Span) -> None:
        self.attempt, self.begin_ms = span.attempt, span.begin_ms
        self._ms_of: collections.Counter[str] = collections.Counter()
        self._causes: dict[str, str] = {}
        self.add(span)

    def add(self, span: Span) -> None:
        self.end_ms = span.end_ms
        self._ms_of[span.kind] += span.end_ms - span.begin_ms
        self._causes[span.kind] = span.cause

    def with_next(self, other: _Stretch) -> _Stretch:
        """Both as one."""
        self.end_ms = other.end_ms
        self._ms_of.update(other._ms_of)
        self._causes |= other._causes
        return self

    @property
    def length_ms(self) -> int:
        return self.end_ms - self.begin_ms

    @property
    def kind(self) -> str:
        return max(self._ms_of, key=self._ms_of.__getitem__)

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "begin": self.begin_ms,
            "end": self.end_ms,
            "attempt": self.attempt,
            "cause": tell_cause(self._causes[self.kind]),
            "mixed": len(self._ms_of) > 1,
        }


def goodput(ledger: Ledger) -> dict[str, Any]:
    """The sums of an account, in seconds and GPU-hours."""
    return {
        "goodput": ledger.goodput,
        "wall_s": ledger.wall_s,
        "allotted_s": ledger.allotted_s,
        "gpu_hours": ledger.gpu_hours,
        "seconds": [[kind, ledger.seconds_of(kind)] for kind in KINDS if ledger.seconds_of(kind)],
        "lost": [[tell_cause(cause), seconds, hours] for cause, (seconds, hours) in ledger.lost_by_cause().items()],
    }
