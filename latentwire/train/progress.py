"""What a checkpoint holds beside tensors, generators and cursors: counters, the last evaluation, the best so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from latentwire.config import CheckpointSection


class Progress:
    """Owned by the session; the same on every rank."""

    def __init__(self, section: CheckpointSection) -> None:
        self._section = section
        self.counters: dict[str, float] = {"samples": 0, "tokens": 0, "skipped_steps": 0}
        """Totals over the whole run."""
        self._counters_at_boundary = dict(self.counters)
        self._evaluated_step = 0
        self._evaluation: dict[str, float] = {}
        self._best: float | None = None

    def begin_step(self) -> None:
        """What is counted from here on belongs to the step; a save in the middle of it has what was before."""
        self._counters_at_boundary = dict(self.counters)

    def is_evaluated(self, step: int) -> bool:
        """Whether the state after that step was evaluated last."""
        return self._evaluated_step == step

    def evaluated(self, step: int, metrics: dict[str, float]) -> bool:
        """Take an evaluation in; whether it is the best so far."""
        self._evaluated_step, self._evaluation = step, metrics
        value = metrics.get(self._section.best_metric or "")
        if value is None or not math.isfinite(value):
            return False
        sign = 1 if self._section.best_mode == "min" else -1
        is_best = self._best is None or sign * value < sign * self._best
        self._best = value if is_best else self._best
        return is_best

    def evaluation_of(self, step: int) -> dict[str, float]:
        """What the evaluation after that step gave; empty where there was none."""
        return self._evaluation if self.is_evaluated(step) else {}

    def values(self, in_step: bool) -> dict[str, Any]:
        """For a checkpoint of the last boundary."""
        return {
            "counters": self._counters_at_boundary if in_step else self.counters,
            "evaluated_step": self._evaluated_step,
            "evaluation": self._evaluation,
            "best": self._best,
        }

    def resume(self, values: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's."""
        self.counters |= values["counters"]
        self._evaluated_step = values["evaluated_step"]
        self._evaluation = values["evaluation"]
        self._best = values["best"]
