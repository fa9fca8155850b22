"""What a notice would bring, kept up to date while an attempt runs."""

from __future__ import annotations

import time
from collections.abc import Callable

from latentwire.config import Config
from latentwire.preemption.deadline import Pace
from latentwire.preemption.forecast import Grace, Measured, as_event, forecast
from latentwire.run.directory import Attempt


class Outlook:
    """Holds this attempt's steps, the gaps between their safe points, and saves against the grace.

    Its pace of steps is its own: warm-up's guess at the first step, good enough for a deadline, is no measured step.

    Args:
        attempt: knows what the scheduler gives.
        config: the run's.
        event: writes to the rank's journal.
    """

    def __init__(self, attempt: Attempt, config: Config, event: Callable[..., None]) -> None:
        self._attempt, self._config = attempt, config
        self._event = event
        self._steps, self._deaf = Pace(), Pace()
        self._deaf_s = 0.0
        self._heard_at = 0.0
        self._num_saves = 0
        self._told: str | None = None

    def step_begins(self) -> None:
        """From here on a notice waits for the next safe point."""
        self._heard_at, self._deaf_s = time.monotonic(), 0.0

    def safe_point(self) -> None:
        """A notice is heard here."""
        now = time.monotonic()
        self._deaf_s = max(self._deaf_s, now - self._heard_at)
        self._heard_at = now

    def step_ended(self, seconds: float) -> float:
        """Take in how long the step took; the longest gap in it, in seconds."""
        self.safe_point()
        self._steps.add(seconds)
        self._deaf.add(self._deaf_s)
        return self._deaf_s

    def update(self, saves: Pace) -> None:
        """Tell the first forecast of the attempt, and each that comes to another verdict.

        Called at every boundary, on the rank that saves; looks only after a save.
        """
        if saves.num == self._num_saves:
            return
        self._num_saves = saves.num
        measured = Measured.of(self._steps, self._deaf, saves)
        if measured is None:
            return
        grace = Grace(self._config.preemption.grace_s, self._attempt.grace_s())
        verdict = forecast(measured, grace, self._config.checkpoint)
        if verdict.fits != self._told:
            self._told = verdict.fits
            self._event("forecast", **as_event(verdict, measured))
