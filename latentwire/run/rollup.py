"""One curve out of many attempts: where an attempt redid steps, its points stand and the older ones go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from latentwire.run.directory import Run
from latentwire.run.journal import read_journal


def merged_metrics(run: Run) -> Iterator[dict[str, Any]]:
    """The records of metrics.jsonl over all attempts, one for each step and kind, in order of step."""
    points: dict[tuple[int, bool], dict[str, Any]] = {}
    for attempt in run.attempts():
        for record in read_journal(attempt.path / "metrics.jsonl"):
            step = record.get("step")
            if isinstance(step, int):
                points[step, "loss" not in record] = record | {"attempt": attempt.number}
    for key in sorted(points):
        yield points[key]


def summarise_metrics(run: Run) -> dict[str, Any]:
    """The contents of runs/<run>/metrics.json: first and last figures, the best evaluation, totals."""
    steps = [r for r in merged_metrics(run) if "loss" in r]
    evaluations = [r for r in merged_metrics(run) if "eval/loss" in r]
    summary: dict[str, Any] = {"attempts": len(run.attempts()), "steps": steps[-1]["step"] if steps else 0}
    if steps:
        summary |= {"first": steps[0], "last": steps[-1], "step_s_total": sum(r.get("step_s", 0.0) for r in steps)}
    if evaluations:
        best = min(evaluations, key=lambda r: float(r["eval/loss"]))
        summary |= {"last_evaluation": evaluations[-1], "best_evaluation": best}
    return summary
