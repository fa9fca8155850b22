"""Where the time of a run went, as a lane of few enough stretches to be drawn, and in sums."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from latentwire.run.goodput import KINDS, Ledger, Span

MAX_STRETCHES = 400


def timeline(ledger: Ledger) -> list[dict[str, Any]]:
    """The spans in order of time. Where they are too short to be seen, neighbours become one of the longest's kind."""
    spans = ledger.spans
    if not spans:
        return []
    begin_ms = spans[0].begin_ms
    width_ms = max(1, (spans[-1].end_ms - begin_ms) // MAX_STRETCHES)
    groups: Iterable[Sequence[Span]] = [spans[i : i + 1] for i in range(len(spans))]
    if len(spans) > MAX_STRETCHES:
        by_place = itertools.groupby(spans, key=lambda span: (_place(span, begin_ms, width_ms), span.attempt))
        groups = [list(group) for _, group in by_place]
    return [_stretch(group) for group in groups]


def _place(span: Span, begin_ms: int, width_ms: int) -> tuple[int, int]:
    """A long span stands alone, short ones are together with those of the same stretch of time."""
    is_long = span.end_ms - span.begin_ms >= width_ms
    return (span.begin_ms, 1) if is_long else ((span.begin_ms - begin_ms) // width_ms, 0)


def _stretch(spans: Sequence[Span]) -> dict[str, Any]:
    longest = max(spans, key=lambda span: span.end_ms - span.begin_ms)
    return {
        "kind": longest.kind,
        "begin": spans[0].begin_ms,
        "end": spans[-1].end_ms,
        "attempt": longest.attempt,
        "cause": longest.cause,
    }


def goodput(ledger: Ledger) -> dict[str, Any]:
    """The sums of an account, in seconds and GPU-hours."""
    return {
        "goodput": ledger.goodput,
        "wall_s": ledger.wall_s,
        "allotted_s": ledger.allotted_s,
        "gpu_hours": ledger.gpu_hours,
        "seconds": [[kind, ledger.seconds_of(kind)] for kind in KINDS if ledger.seconds_of(kind)],
        "lost": [[cause, seconds, hours] for cause, (seconds, hours) in ledger.lost_by_cause().items()],
    }
