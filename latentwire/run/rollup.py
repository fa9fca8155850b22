"""What the metrics of all attempts come to, for metrics.json."""

from __future__ import annotations

import math
from typing import Any

from latentwire.run.curve import merged_metrics
from latentwire.run.directory import Run, is_step
from latentwire.run.figures import number


def summarise_metrics(run: Run) -> dict[str, Any]:
    """The contents of runs/<run>/metrics.json: first and last figures, the best evaluation, totals."""
    summary: dict[str, Any] = {"attempts": len(run.attempts()), "steps": 0}
    for record in merged_metrics(run):
        if is_step(record):
            summary.setdefault("first", record)
            spent_s = summary.get("step_s_total", 0.0) + (number(record["step_s"]) or 0.0)
            summary |= {"last": record, "steps": record["step"], "step_s_total": spent_s}
        if "eval/loss" in record:
            best = summary.get("best_evaluation")
            is_best = best is None or _rank(record) < _rank(best)
            summary |= {"last_evaluation": record} | ({"best_evaluation": record} if is_best else {})
    return summary


def _rank(evaluation: dict[str, Any]) -> float:
    """Its loss; the worst of all where that was not finite."""
    loss = float(evaluation["eval/loss"])
    return loss if math.isfinite(loss) else math.inf
