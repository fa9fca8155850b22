"""When a running attempt calls for a person. Pure: records in, alerts out, with a clock of one's own choice.

Each rule holds a figure against a threshold, with what keeps it from telling of every waver: ``_rules`` says which rule
has what. After a notice nothing is raised any more: to be preempted is no trouble.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from latentwire.monitor.figures import Record
from latentwire.monitor.vitals import Vitals
from latentwire.run.directory import is_step

if TYPE_CHECKING:
    from latentwire.config import AlertsSection

MARGIN = 5.0
"""Percent or degrees: so far a figure must come back before its alert is over."""
AUTO_INTERVALS, AUTO_LEAST_S, LONGEST_INTERVAL_S = 3, 900.0, 1800.0
"""``checkpoint_age_s: auto``: three save intervals, of which ``interval_s: auto`` chooses half an hour at most."""


@dataclasses.dataclass(frozen=True)
class Alert:
    """One change: an alert was raised, or is over.

    Attributes:
        name: of the rule: ``gpu_utilisation``, ``loss_spike`` and so on.
        is_raised: False: it is over.
        text: what is seen, in words.
        value: the figure; None where it is infinite, or there is none.
        threshold: what it was held against.
    """

    name: str
    is_raised: bool
    text: str
    value: float | None = None
    threshold: float | None = None

    def fields(self) -> dict[str, Any]:
        """Of its event and its message."""
        return {"alert": self.name, "text": self.text, "value": self.value, "threshold": self.threshold}


class Condition:
    """A threshold with hysteresis and duration.

    Args:
        raise_at: beyond it the condition is met.
        clear_at: at or within it the condition is no longer met. Above ``raise_at``: low figures are the bad ones.
        for_s: so long without a break, before either counts.
    """

    def __init__(self, raise_at: float, clear_at: float, for_s: float = 0.0) -> None:
        self.raise_at, self.clear_at, self.for_s = raise_at, clear_at, for_s
        self.is_raised = False
        self._sign = 1 if raise_at >= clear_at else -1
        self._since: float | None = None

    def take(self, value: float | None, now: float) -> bool:
        """Hold a value against the thresholds; whether the condition changed. An unknown one changes nothing."""
        if value is None or not self._speaks_for_change(value):
            self._since = None
            return False
        if self._since is None:
            self._since = now
        if now - self._since < self.for_s:
            return False
        self.is_raised, self._since = not self.is_raised, None
        return True

    def _speaks_for_change(self, value: float) -> bool:
        if self.is_raised:
            return self._sign * (value - self.clear_at) <= 0
        return self._sign * (value - self.raise_at) > 0


@dataclasses.dataclass(frozen=True)
class _Rule:
    name: str
    condition: Condition
    figure: Callable[[], float | None]
    words: Callable[[float], str]

    def look(self, now: float) -> Alert | None:
        value = self.figure()
        if not self.condition.take(value, now) or value is None:
            return None
        shown = round(value, 3) if math.isfinite(value) else None
        return Alert(self.name, self.condition.is_raised, self.words(value), shown, self.condition.raise_at)


class Alerts:
    """The rules of one attempt. The agent's watch owns one: it hands on what was written, and asks now and then.

    Args:
        settings: the config's ``alerts``.
        interval_s: ``checkpoint.interval_s``.
        clock: seconds that never go back.
    """

    def __init__(
        self, settings: AlertsSection, interval_s: float | str | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._vitals = Vitals(clock)
        self._rules = list(_rules(settings, interval_s, self._vitals))

    def take(self, record: Record) -> None:
        """Take in a line of ``gpu_stats.jsonl``, ``metrics.jsonl``, or the events of the agent or rank 0."""
        if "event" in record:
            self._vitals.event(record)
        elif is_step(record):
            self._vitals.step(record)
        else:
            self._vitals.sample(record)

    def look(self) -> list[Alert]:
        """What has changed since the last call. Does not block."""
        if self._vitals.is_leaving:
            return []
        now = self._clock()
        changes = [change for rule in self._rules if (change := rule.look(now)) is not None]
        self._vitals.judged()
        return changes


def _rules(settings: AlertsSection, interval_s: float | str | None, vitals: Vitals) -> Iterator[_Rule]:
    """Those that are not turned off.

    All but ``grace`` have a nearer threshold, at which they are over. What is read off now and then must be bad for
    ``for_s`` without a break, and good for as long: ``gpu_utilisation``, ``gpu_memory``, ``temperature``, and
    ``disk_space``, as a disk may be full until an old checkpoint is pruned. ``grace`` too, and that is all it has: a
    forecast says yes or no.

    The others have no ``for_s``, as their figures have a duration of their own. ``error_rate`` counts over the last
    1000 steps or five saves: a failed save stays in it, and is told at once, also where a disk is full sooner than
    ``for_s``. ``loss_spike`` takes three bad ones of the last five steps. ``checkpoint_age`` and ``no_progress`` are
    seconds themselves, and begin anew with the next verified checkpoint or step: that ends the alert at once.
    """
    for_s = settings.for_s
    if (least := settings.gpu_utilisation_percent) is not None:
        yield _Rule(
            "gpu_utilisation",
            Condition(least, least + MARGIN, for_s),
            vitals.utilisation_percent,
            lambda value: f"the GPUs are busy for {value:.0f} % of the time ({least:g} % is wanted)",
        )
    if (most := settings.gpu_memory_percent) is not None:
        yield _Rule(
            "gpu_memory",
            Condition(most, most - MARGIN, for_s),
            vitals.memory_percent,
            lambda value: f"the fullest GPU's memory is {value:.0f} % full (limit {most:g} %)",
        )
    if (hottest := settings.temperature_c) is not None:
        yield _Rule(
            "temperature",
            Condition(hottest, hottest - MARGIN, for_s),
            vitals.temperature_c,
            lambda value: f"the hottest GPU is at {value:.0f} °C (limit {hottest:g} °C)",
        )
    if (errors := settings.error_percent) is not None:
        yield _Rule(
            "error_rate",
            Condition(errors, errors / 2),
            vitals.error_percent,
            lambda value: f"{vitals.error_words()} (limit {errors:g} %)",
        )
    if (free := settings.disk_free_percent) is not None:
        yield _Rule(
            "disk_space",
            Condition(free, free * 1.2, for_s),
            vitals.disk_free_percent,
            lambda value: f"{value:.1f} % of the run's disk is free ({free:g} % is wanted)",
        )
    if (age_s := _age_limit_s(settings.checkpoint_age_s, interval_s)) is not None:
        yield _Rule(
            "checkpoint_age",
            Condition(age_s, age_s / 2),
            vitals.unverified_s,
            lambda value: f"no checkpoint was verified for {value:.0f} s (limit {age_s:g} s)",
        )
    if (still_s := settings.no_progress_s) is not None:
        yield _Rule(
            "no_progress",
            Condition(still_s, still_s / 2),
            vitals.still_s,
            lambda value: f"no step for {value:.0f} s (limit {still_s:g} s)",
        )
    if settings.grace:
        yield _Rule("grace", Condition(0.5, 0.5, for_s), vitals.does_not_fit, lambda _: vitals.forecast_words())
    if (spreads := settings.loss_spike) is not None:
        yield _Rule(
            "loss_spike",
            Condition(spreads, spreads / 2),
            vitals.loss_spread,
            lambda value: f"the loss is {value:.3g} of its usual spreads above its course (limit {spreads:g})",
        )


def _age_limit_s(setting: float | str | None, interval_s: float | str | None) -> float | None:
    """What ``auto`` comes to; None: no limit, as no time is set for saves."""
    if not isinstance(setting, str):
        return setting
    if interval_s is None:
        return None
    seconds = LONGEST_INTERVAL_S if isinstance(interval_s, str) else interval_s
    return max(AUTO_INTERVALS * seconds, AUTO_LEAST_S)
