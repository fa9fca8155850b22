"""What a notice would bring, told before one comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentwire.config import CheckpointSection
from latentwire.preemption.deadline import MARGIN_S, WINDOW, Pace, step_fits
from latentwire.preemption.forecast import Forecast, Grace, Measured, as_event, forecast, measured_before
from latentwire.run.directory import Attempt, Run
from latentwire.run.journal import Journal

SECTION = CheckpointSection()
QUICK = Measured(step_s=0.5, deaf_s=0.1, save_s=0.6)
LONG_STEP = Measured(step_s=30.0, deaf_s=4.0, save_s=3.0)
LONG_SAVE = Measured(step_s=1.0, deaf_s=1.0, save_s=25.0)
DEAF = Measured(step_s=30.0, deaf_s=30.0, save_s=3.0)


@pytest.mark.parametrize(
    ("measured", "grace", "fits", "warning", "advice"),
    [
        (QUICK, Grace(120, 20), "step", None, None),
        (QUICK, Grace(120, None), "step", None, None),
        (
            LONG_STEP, Grace(120, 20), "save",
            "a notice may cost the step under way: step and save need 35 s of 20 s grace",
            "more GPUs or a smaller batch shorten the step; or ask the site for a GraceTime over 35 s",
        ),
        (
            LONG_STEP, Grace(20, 120), "save",
            "a notice may cost the step under way: step and save need 35 s of 20 s grace",
            "more GPUs or a smaller batch shorten the step; or raise preemption.grace_s over 35 s",
        ),
        (
            LONG_SAVE, Grace(20, None), "nothing",
            "a notice saves nothing and loses up to 326 s of work: a save needs 27 s of 20 s grace",
            "shorten checkpoint.interval_s (300); or raise preemption.grace_s over 28 s if the machine stays so long; "
            "or save to a faster disk",
        ),
        (
            DEAF, Grace(120, 20), "nothing",
            "a notice may be heard too late and lose up to 333 s of work: a save needs 35 s of 20 s grace",
            "shorten checkpoint.interval_s (300); or ask the site for a GraceTime over 35 s; "
            "or make micro-batches smaller, in a loop of your own call safe_point() more often",
        ),
        (
            QUICK, Grace(120, 0), "nothing",
            "a preemption comes without grace and may lose up to 301 s of work: "
            "the periodic saves are the only guarantee",
            "shorten checkpoint.interval_s (300); or ask the site for a GraceTime over 2.7 s",
        ),
    ],
)  # fmt: skip
def test_the_verdict_with_its_cure(
    measured: Measured, grace: Grace, fits: Any, warning: str | None, advice: str | None
) -> None:
    needs_s = measured.step_s + measured.save_s + MARGIN_S
    assert forecast(measured, grace, SECTION) == Forecast(fits, needs_s, grace.seconds, warning, advice)


@pytest.mark.parametrize(
    ("section", "lost", "advice"),
    [
        ({"interval_s": 60.0}, "up to 86 s of work", "shorten checkpoint.interval_s (60)"),
        ({"interval_s": None, "interval_steps": 4}, "up to 30 s of work", "shorten checkpoint.interval_steps (4)"),
        ({"interval_s": 60.0, "interval_steps": 4}, "up to 30 s of work", "shorten checkpoint.interval_steps (4)"),
        ({"interval_s": 3.0, "interval_steps": 4}, "up to 29 s of work", "shorten checkpoint.interval_s (3)"),
        ({"interval_s": None}, "all since the last save", "set checkpoint.interval_s"),
    ],
)
def test_what_is_lost_is_bounded_by_the_interval_in_force(section: dict[str, Any], lost: str, advice: str) -> None:
    told = forecast(LONG_SAVE, Grace(120, 0), CheckpointSection(**section))
    assert f"may lose {lost}:" in str(told.warning)
    assert str(told.advice).split(";")[0] == advice


SECONDS = st.floats(0, 1e4)


@given(SECONDS, SECONDS, SECONDS, st.floats(0.1, 1e4), st.none() | SECONDS)
def test_it_warns_just_where_a_notice_would_drop_the_step(
    step_s: float, deaf_s: float, save_s: float, configured_s: float, scheduler_s: float | None
) -> None:
    grace = Grace(configured_s, scheduler_s)
    told = forecast(Measured(step_s, min(deaf_s, step_s), save_s), grace, SECTION)
    fits = step_fits(0.0, grace.seconds, step_s, save_s)
    assert (told.fits == "step", told.warning is None, told.advice is None) == (fits, fits, fits)


def test_the_event_leaves_out_what_there_is_not_to_say() -> None:
    assert as_event(forecast(QUICK, Grace(120, 20), SECTION), QUICK) == {
        "fits": "step", "needs_s": 3.1, "grace_s": 20, "step_s": 0.5, "deaf_s": 0.1, "save_s": 0.6,
    }  # fmt: skip


# ---- What was measured -----------------------------------------------------------------------------------------------


def write(path: Path, *lines: dict[str, Any]) -> None:
    journal = Journal(path)
    for line in lines:
        journal.record(**line)
    journal.close()


def trained(run: Run, step_s: list[float], save_s: list[float]) -> Attempt:
    """An attempt with such steps, half as deaf, an evaluation after them, and such saves."""
    attempt = run.claim_attempt("1", "local")
    steps = [{"step": n, "loss": 1.0, "step_s": s, "deaf_s": s / 2} for n, s in enumerate(step_s)]
    write(attempt.metrics_path, *steps, {"step": len(steps), "eval/loss": 1.0})
    commits = [{"event": "save_committed", "seconds": s} for s in save_s]
    write(attempt.path / "events.rank0.jsonl", {"event": "restored", "seconds": 99.0}, *commits)
    return attempt


def test_nothing_is_foretold_before_a_step_and_a_save_were_measured(run: Run) -> None:
    assert measured_before(run) is None
    trained(run, [1.0], [])
    assert measured_before(run) is None
    run.claim_attempt("2", "local")
    trained(run, [], [0.5])
    assert measured_before(run) == Measured(1.0, 0.5, 0.5)


def test_the_newest_figures_of_all_attempts_count(run: Run) -> None:
    trained(run, [500.0] * 50, [50.0])
    trained(run, [7.0] * 10 + [2.0] * 60, [3.0])
    trained(run, [1.0] * 30, [4.0, "nan"])  # type: ignore[list-item]
    assert measured_before(run) == Measured(step_s=7.0, deaf_s=3.5, save_s=50.0)
    trained(run, [1.0] * 10, [])
    assert measured_before(run) == Measured(step_s=2.0, deaf_s=1.0, save_s=50.0)


def test_half_written_files_upset_nothing(run: Run) -> None:
    attempt = trained(run, [1.0], [0.5])
    for name in ("metrics.jsonl", "events.rank0.jsonl"):
        with open(attempt.path / name, "ab") as file:
            file.write(b'[1]\n{"step_s": 9, "deaf_s": 9, "event": "save_comm')
    assert measured_before(run) == Measured(1.0, 0.5, 0.5)


def test_what_is_not_measured_is_no_figure() -> None:
    some = Pace()
    some.add(1.0)
    assert Measured.of(some, some, Pace()) is Measured.of(Pace(), some, some) is Measured.of(some, Pace(), some) is None
    for _ in range(2 * WINDOW):
        some.add(2.0)
    assert Measured.of(some, some, some) == Measured(2.0, 2.0, 2.0)


def test_what_the_scheduler_gives_is_known_to_the_ranks_where_it_is_known(run: Run) -> None:
    attempt = run.claim_attempt("1", "slurm")
    assert attempt.grace_s() is None
    attempt.set_grace(0.0)
    assert attempt.grace_s() == 0.0
