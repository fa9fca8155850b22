"""The rules of alerts, on a clock that the tests turn; and where alerts are sent."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_parts import BUSY_GPU, HOST

from latentwire.config import AlertsSection
from latentwire.monitor.alerts import Alert, Alerts, Condition
from latentwire.monitor.vitals import LossSpread

Steps = list[tuple[float, float | None]]


class Attempt:
    """Alerts of an attempt that writes a line a second, judged every two."""

    def __init__(self, interval_s: float | str | None = 300.0, **settings: Any) -> None:
        self.now = 5000.0
        self.alerts = Alerts(AlertsSection(**settings), interval_s, clock=lambda: self.now)
        self.changes: list[Alert] = []
        self.step = 0

    def event(self, name: str, **fields: Any) -> None:
        self.alerts.take({"time": 1.0, "event": name, **fields})

    def train(self) -> None:
        self.event("restored", step=0)
        self.event("training_started", step=0)

    def wait(self, seconds: float, each_second: Callable[[], object] = lambda: None) -> list[Alert]:
        """What changes while so long a time goes by."""
        changes = []
        for second in range(int(seconds)):
            self.now += 1.0
            each_second()
            if second % 2:
                changes += self.alerts.look()
        return changes

    def sample(self, host: dict[str, Any] | None = None, **readings: Any) -> Callable[[], None]:
        return lambda: self.alerts.take({"time": 1, "host": HOST | (host or {}), "gpus": [BUSY_GPU | readings]})

    def make_step(self, loss: object = 2.0) -> None:
        self.step += 1
        self.alerts.take({"time": 1.0, "step": self.step, "loss": loss, "step_s": 1.0})


def names(changes: list[Alert]) -> list[tuple[str, bool]]:
    return [(change.name, change.is_raised) for change in changes]


SAMPLED = {
    "gpu_utilisation": ({"utilisation_percent": 74}, {"utilisation_percent": 79}, {"utilisation_percent": 81}),
    "gpu_memory": (
        {"memory_used_bytes": 120 << 30},
        {"memory_used_bytes": 114 << 30},
        {"memory_used_bytes": 100 << 30},
    ),
    "temperature": ({"temperature_c": 86}, {"temperature_c": 81}, {"temperature_c": 80}),
    "disk_space": tuple({"host": {"disk_free_bytes": free << 30}} for free in (49, 55, 61)),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_a_reading_must_be_bad_for_long_and_good_for_long(name: str) -> None:
    bad, wavering, good = SAMPLED[name]
    attempt = Attempt(no_progress_s=None, checkpoint_age_s=None, for_s=60.0)
    attempt.train()
    assert attempt.wait(50, attempt.sample(**bad)) == []
    assert attempt.wait(4, attempt.sample(**good)) == [], "the bad time begins anew"
    assert attempt.wait(58, attempt.sample(**bad)) == []
    (raised,) = attempt.wait(10, attempt.sample(**bad))
    assert names([raised]) == [(name, True)]
    assert raised.threshold in (75.0, 85.0, 5.0)
    assert attempt.wait(200, attempt.sample(**wavering)) == [], "hardly better is not over"
    assert attempt.wait(50, attempt.sample(**good)) == []
    assert names(attempt.wait(20, attempt.sample(**good))) == [(name, False)]


def test_gpus_that_do_not_train_yet_or_are_not_ours_may_idle() -> None:
    attempt = Attempt(no_progress_s=None, checkpoint_age_s=None, for_s=10.0)
    assert attempt.wait(100, attempt.sample(utilisation_percent=3)) == []
    attempt.train()
    assert attempt.wait(100, attempt.sample(utilisation_percent=0)) == [], "never used"
    attempt.wait(2, attempt.sample(utilisation_percent=90))
    assert names(attempt.wait(100, attempt.sample(utilisation_percent=0))) == [("gpu_utilisation", True)]


def test_a_monitor_that_went_silent_says_nothing() -> None:
    attempt = Attempt(no_progress_s=None, checkpoint_age_s=None, for_s=200.0)
    attempt.train()
    attempt.wait(100, attempt.sample(temperature_c=99, utilisation_percent=20))
    assert attempt.wait(1000) == []


def test_a_disk_that_is_full_until_an_old_checkpoint_is_pruned_is_no_trouble() -> None:
    attempt = Attempt(no_progress_s=None, checkpoint_age_s=None)
    full, pruned = (attempt.sample(host={"disk_free_bytes": free << 30}) for free in (5, 55))
    for _ in range(10):
        assert attempt.wait(290, full) + attempt.wait(10, pruned) == []
    attempt.event("save_failed", step=2, error="full")
    assert names(attempt.wait(2, full)) == [("error_rate", True)], "a save that fails is not waited for"
    assert names(attempt.wait(310, full)) == [("disk_space", True)]


def test_no_progress_is_told_once_and_is_over_with_the_next_step() -> None:
    attempt = Attempt(checkpoint_age_s=None)
    attempt.train()
    assert attempt.wait(3000, attempt.make_step) == []
    assert attempt.wait(900) == []
    (raised,) = attempt.wait(1000)
    assert (raised.name, raised.text) == ("no_progress", "no step for 902 s (limit 900 s)")
    assert names(attempt.wait(2, attempt.make_step)) == [("no_progress", False)]


def test_a_long_evaluation_is_progress_when_it_ends() -> None:
    attempt = Attempt(checkpoint_age_s=None)
    attempt.train()
    attempt.wait(800)
    attempt.event("evaluation_started", step=1)
    assert attempt.wait(800) == []
    attempt.event("evaluation_finished", step=1)
    assert attempt.wait(800) == []


@pytest.mark.parametrize(
    ("interval_s", "setting", "limit_s"),
    [(600.0, "auto", 1800.0), (60.0, "auto", 900.0), ("auto", "auto", 5400.0), (600.0, 100.0, 100.0)],
)
def test_a_checkpoint_that_is_not_verified_grows_stale(
    interval_s: float | str, setting: float | str, limit_s: float
) -> None:
    attempt = Attempt(interval_s, checkpoint_age_s=setting, no_progress_s=None)
    attempt.train()
    attempt.wait(limit_s - 10)
    attempt.event("save_committed", step=5)
    assert names(attempt.wait(20)) == [("checkpoint_age", True)], "committed is not verified"
    attempt.event("save_verified", step=5)
    assert names(attempt.wait(2)) == [("checkpoint_age", False)]
    assert attempt.wait(limit_s - 10) == []


def test_without_a_time_for_saves_none_is_stale() -> None:
    attempt = Attempt(None, no_progress_s=None)
    attempt.train()
    assert attempt.wait(10_000) == []


def test_a_failed_save_is_told_until_five_went_well() -> None:
    attempt = Attempt(checkpoint_age_s=None, no_progress_s=None)
    attempt.train()
    attempt.event("save_committed", step=1)
    attempt.event("save_failed", step=2, error="/runs: full; free some space there")
    (raised,) = attempt.wait(2)
    assert (raised.name, raised.value) == ("error_rate", 50.0)
    assert raised.text == "1 of the last 2 saves failed: /runs: full; free some space there (limit 1 %)"
    for step in range(3, 7):
        attempt.event("save_committed", step=step)
        assert attempt.wait(2) == []
    attempt.event("save_committed", step=7)
    assert names(attempt.wait(2)) == [("error_rate", False)]


def test_more_than_one_step_in_a_hundred_was_skipped() -> None:
    attempt = Attempt(checkpoint_age_s=None, no_progress_s=None)
    attempt.train()
    attempt.event("step_skipped", step=1)
    assert attempt.wait(20, attempt.make_step) == [], "one is no rate"
    attempt.event("step_skipped", step=22)
    assert names(attempt.wait(2, attempt.make_step)) == [("error_rate", True)]
    assert names(attempt.wait(500, attempt.make_step)) == [("error_rate", False)]


def test_a_notice_that_would_not_fit_is_passed_on_once_that_is_so_for_long() -> None:
    attempt = Attempt(no_progress_s=None, checkpoint_age_s=None)
    too_long = {"needs_s": 20.1, "grace_s": 20.0, "warning": "a notice saves nothing"}
    for _ in range(10):  # each save brings another forecast
        attempt.event("forecast", **too_long)
        assert attempt.wait(290) == []
        attempt.event("forecast", needs_s=19.9, grace_s=20.0)
        assert attempt.wait(60) == []
    attempt.event("forecast", **too_long)
    (raised,) = attempt.wait(310)
    assert (raised.name, raised.text) == ("grace", "a notice saves nothing")
    attempt.event("forecast", needs_s=5.0, grace_s=20.0)
    assert attempt.wait(290) == []
    assert names(attempt.wait(20)) == [("grace", False)]


def test_after_a_notice_no_alert_is_raised_and_none_is_over() -> None:
    attempt = Attempt(checkpoint_age_s=None, for_s=0.0)
    attempt.train()
    assert names(attempt.wait(1000)) == [("no_progress", True)]
    assert names(attempt.wait(2, attempt.make_step)) == [("no_progress", False)]
    assert names(attempt.wait(2, attempt.sample(host={"disk_free_bytes": 0}))) == [("disk_space", True)]
    attempt.event("notice")
    assert attempt.wait(1000) == [], "it stands still to save"
    assert attempt.wait(20, attempt.sample()) == [], "nobody looks any more"


@pytest.mark.parametrize("event", ["notice", "draining", "left", "training_finished"])
def test_whoever_leaves_stands_still_with_good_reason(event: str) -> None:
    attempt = Attempt()
    attempt.train()
    attempt.wait(4, attempt.make_step)
    attempt.event(event)
    attempt.event("save_failed", step=3)
    assert attempt.wait(20_000, attempt.sample(temperature_c=99, host={"disk_free_bytes": 0})) == []


def falling_loss(step: int, seed: int = 0) -> float:
    return 2.0 + 8.0 / (1 + step / 40) + random.Random(f"{seed} {step}").gauss(0, 0.15)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-3, 1e6))
def test_a_loss_that_falls_with_noise_is_no_spike_at_any_scale(seed: int, scale: float) -> None:
    attempt = Attempt(checkpoint_age_s=None, no_progress_s=None)
    attempt.train()
    losses = iter([scale * falling_loss(step, seed) for step in range(400)])
    assert attempt.wait(400, lambda: attempt.make_step(next(losses))) == []


@pytest.mark.parametrize("loss", [40.0, 1e30, "NaN", "Infinity"])
def test_a_loss_that_leaves_its_course_is_told_of_and_one_bad_batch_is_not(loss: object) -> None:
    attempt = Attempt(checkpoint_age_s=None, no_progress_s=None)
    attempt.train()
    attempt.wait(200, lambda: attempt.make_step(falling_loss(attempt.step)))
    attempt.make_step(loss)
    attempt.make_step(loss)
    assert attempt.wait(20, lambda: attempt.make_step(falling_loss(attempt.step))) == []
    assert names(attempt.wait(4, lambda: attempt.make_step(loss))) == [("loss_spike", True)]
    assert attempt.wait(500, lambda: attempt.make_step(loss)) == [], "it does not become usual"
    assert names(attempt.wait(20, lambda: attempt.make_step(falling_loss(attempt.step)))) == [("loss_spike", False)]


def test_a_spike_between_two_looks_is_not_missed() -> None:
    attempt = Attempt(checkpoint_age_s=None, no_progress_s=None)
    attempt.train()
    attempt.wait(100, attempt.make_step)
    for loss in [50.0] * 5 + [2.0] * 5:
        attempt.make_step(loss)
    assert names(attempt.wait(2)) == [("loss_spike", True)]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(1, 1e6), min_size=60, max_size=60), st.floats(1e-3, 1e3))
def test_the_spread_of_a_loss_does_not_depend_on_its_unit(losses: list[float], unit: float) -> None:
    plain, scaled = LossSpread(), LossSpread()
    for loss in losses:
        plain.take(loss)
        scaled.take(loss * unit)
        assert scaled.worst == (None if plain.worst is None else pytest.approx(plain.worst, rel=1e-6, abs=1e-6))
    assert plain.worst is not None


def test_rules_that_are_turned_off_say_nothing() -> None:
    off: dict[str, Any] = {name: None for name in AlertsSection.model_fields if name not in ("for_s", "grace")}
    attempt = Attempt(**off, grace=False, for_s=0.0)
    attempt.train()
    attempt.event("save_failed")
    attempt.event("forecast", warning="it does not fit")
    attempt.wait(50, attempt.make_step)
    bad = attempt.sample(
        host={"disk_free_bytes": 0}, temperature_c=120, utilisation_percent=1, memory_used_bytes=1 << 60
    )
    assert attempt.wait(50, lambda: attempt.make_step(1e9)) + attempt.wait(20_000, bad) == []


def test_nonsense_upsets_nothing() -> None:
    attempt = Attempt()
    for record in (
        {},
        {"event": None},
        {"event": "forecast", "warning": ["x"]},
        {"event": "step_skipped", "step": "one"},
        {"step_s": "NaN", "step": None, "loss": {}},
        {"gpus": 7, "host": 7},
        {"gpus": [3, {"uuid": None, "utilisation_percent": "x", "memory_total_bytes": 0, "memory_used_bytes": 1}]},
    ):
        attempt.alerts.take(record)
        attempt.wait(2)


# --- hysteresis and duration, whatever happens ------------------------------------------------------------------------

values = st.one_of(st.none(), st.floats(0, 100))


@given(st.lists(st.tuples(st.floats(0.1, 30), values), max_size=60), st.booleans(), st.floats(0, 60))
def test_every_change_was_due_for_so_long(steps: Steps, low_is_bad: bool, for_s: float) -> None:
    raise_at, clear_at = (40.0, 60.0) if low_is_bad else (60.0, 40.0)
    condition = Condition(raise_at, clear_at, for_s)
    is_bad: Callable[[float], bool] = (lambda v: v < raise_at) if low_is_bad else (lambda v: v > raise_at)
    is_good: Callable[[float], bool] = (lambda v: v >= clear_at) if low_is_bad else (lambda v: v <= clear_at)
    now, since, was_raised = 0.0, math.inf, False
    for seconds, value in steps:
        now += seconds
        speaks = value is not None and (is_good(value) if was_raised else is_bad(value))
        since = min(since, now) if speaks else math.inf
        changed = condition.take(value, now)
        assert changed == (speaks and now - since >= for_s)
        assert condition.is_raised == (was_raised != changed)
        if changed:
            was_raised, since = not was_raised, math.inf


def test_an_alert_has_all_that_a_message_needs() -> None:
    alert = Alert("disk_space", True, "full", 1.0, 5.0)
    assert alert.fields() == {"alert": "disk_space", "text": "full", "value": 1.0, "threshold": 5.0}
    assert dataclasses.replace(alert, is_raised=False).fields() == alert.fields()
