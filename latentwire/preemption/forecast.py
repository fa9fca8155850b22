"""Whether a notice would fit into the grace, told before one comes, and what to change where it would not."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from latentwire.preemption.deadline import MARGIN_S, WINDOW, Pace
from latentwire.run.directory import Run
from latentwire.run.figures import number
from latentwire.run.journal import newest_first

if TYPE_CHECKING:
    from latentwire.config import CheckpointSection


@dataclasses.dataclass(frozen=True)
class Grace:
    """Seconds between a notice and the kill.

    Attributes:
        configured_s: ``preemption.grace_s``.
        scheduler_s: what the scheduler gives at preemption; None: not known.
    """

    configured_s: float
    scheduler_s: float | None

    @property
    def seconds(self) -> float:
        """The smaller one counts."""
        return self.configured_s if self.scheduler_s is None else min(self.configured_s, self.scheduler_s)

    def how_to_get(self, seconds: float) -> str:
        """What to change for more than so many seconds, in words."""
        if self.scheduler_s is not None and self.scheduler_s <= seconds:
            return f"ask the site for a GraceTime over {_words(seconds)}"
        condition = " if the machine stays so long" if self.scheduler_s is None else ""
        return f"raise preemption.grace_s over {_words(seconds)}{condition}"


@dataclasses.dataclass(frozen=True)
class Measured:
    """What things took lately: 95th percentiles, in seconds.

    Attributes:
        step_s: a step.
        deaf_s: the longest time between two safe points of a step, in which a notice is not heard.
        save_s: a save, from its start to its commit.
    """

    step_s: float
    deaf_s: float
    save_s: float

    @classmethod
    def of(cls, steps: Pace, deaf: Pace, saves: Pace) -> Measured | None:
        """None while one of them has nothing: no forecast is better than a guess."""
        return cls(steps.p95, deaf.p95, saves.p95) if steps.num and deaf.num and saves.num else None


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a notice would bring.

    Attributes:
        fits: what fits into the grace: ``step``, the step under way and its save; ``save``, a save; ``nothing``.
        needs_s: seconds that step, save and leaving take.
        grace_s: seconds that there are.
        warning: what is lost, in words; None where all fits.
        advice: what to change; None where all fits.
    """

    fits: Literal["step", "save", "nothing"]
    needs_s: float
    grace_s: float
    warning: str | None = None
    advice: str | None = None


def forecast(measured: Measured, grace: Grace, section: CheckpointSection) -> Forecast:
    """Hold what a notice needs against the grace. Pure.

    A notice is heard at the next safe point. There a step that does not fit any more is dropped, and the state before
    it is saved.

    Args:
        measured: what things take.
        grace: what there is.
        section: the config's; its intervals bound what a notice that does not fit loses.
    """
    save_s = measured.save_s + MARGIN_S
    needs_s, heard_s, has_s = measured.step_s + save_s, measured.deaf_s + save_s, grace.seconds
    if needs_s < has_s:
        return Forecast("step", needs_s, has_s)
    if heard_s < has_s:
        warning = f"a notice may cost the step under way: step and save need {_words(needs_s)} of {_words(has_s)} grace"
        advice = f"more GPUs or a smaller batch shorten the step; or {grace.how_to_get(needs_s)}"
        return Forecast("save", needs_s, has_s, warning, advice)
    loses, shorten = _between_saves(measured, section)
    advice = f"{shorten}; or {grace.how_to_get(heard_s)}"
    if has_s == 0:
        warning = f"a preemption comes without grace and may lose {loses}: the periodic saves are the only guarantee"
    elif save_s < has_s:
        warning = (
            f"a notice may be heard too late and lose {loses}: a save needs {_words(heard_s)} of {_words(has_s)} grace"
        )
        advice += "; or make micro-batches smaller, in a loop of your own call safe_point() more often"
    else:
        warning = f"a notice saves nothing and loses {loses}: a save needs {_words(save_s)} of {_words(has_s)} grace"
        advice += "; or save to a faster disk"
    return Forecast("nothing", needs_s, has_s, warning, advice)


def as_event(forecast: Forecast, measured: Measured) -> dict[str, Any]:
    """The fields of the event ``forecast``."""
    fields = dataclasses.asdict(forecast) | dataclasses.asdict(measured)
    return {name: round(v, 3) if isinstance(v, float) else v for name, v in fields.items() if v is not None}


def measured_before(run: Run) -> Measured | None:
    """What the last steps and saves took, over all attempts; None before the first of each. Reads their journals."""
    attempts = run.attempts()[::-1]
    metrics = [attempt.metrics_path for attempt in attempts]
    events = [attempt.path / "events.rank0.jsonl" for attempt in attempts]
    return Measured.of(_pace(metrics, "step_s"), _pace(metrics, "deaf_s"), _pace(events, "seconds", "save_committed"))


def _pace(paths: Iterable[Path], key: str, event: str | None = None) -> Pace:
    records = itertools.chain.from_iterable(map(newest_first, paths))
    figures = (number(r.get(key)) for r in records if r.get("event") == event)
    pace = Pace()
    for seconds in itertools.islice((figure for figure in figures if figure is not None), WINDOW):
        pace.add(seconds)
    return pace


def _between_saves(measured: Measured, section: CheckpointSection) -> tuple[str, str]:
    """What is lost at most where only the periodic saves count, and what would make it less; in words."""
    if section.interval_s == "auto":
        return "the work since the last save", "set checkpoint.interval_s to seconds instead of auto"
    every = {"interval_s": section.interval_s, "interval_steps": (section.interval_steps or 0) * measured.step_s}
    seconds, key = min(((s, key) for key, s in every.items() if s), default=(None, ""))
    if seconds is None:
        return "all since the last save", "set checkpoint.interval_s"
    most_s = seconds + measured.step_s + measured.save_s  # a save begins at a boundary and counts from its commit on
    return f"up to {_words(most_s)} of work", f"shorten checkpoint.{key} ({getattr(section, key):g})"


def _words(seconds: float) -> str:
    return f"{round(seconds, 1 if seconds < 100 else 0):.10g} s"
