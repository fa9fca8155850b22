"""The simulator: by hand, by law, and from a run's own journals."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from cli_parts import complaint, printed
from hypothesis import given
from hypothesis import strategies as st
from run_parts import NOW, config
from test_goodput import agent, claim, rank, step, trained

from latentwire.errors import ConfigError, RunError
from latentwire.run.directory import Run
from latentwire.run.goodput import KINDS, ledger_of
from latentwire.run.history import costs_of, policy_of, read_trace, windows_of
from latentwire.run.simulation import Costs, Expected, Policy, Window, simulate, windows

COSTS = Costs(start_s=10, step_s=2, stall_s=1, commit_s=3, evaluation_s=5, drain_s=4, end_s=6)


def figures(expected: Expected) -> dict[str, float]:
    return {kind: seconds for kind, seconds in expected.seconds.items() if seconds}


def test_undisturbed_by_hand() -> None:
    """20 steps; saves after 6, 12 and 18, evaluations after 10 and 20."""
    policy = Policy(total_steps=20, interval_s=None, interval_steps=6, evaluate_every=10)
    expected = simulate(policy, COSTS, [])
    assert figures(expected) == {"starting": 10, "training": 40, "saving": 3 + 6, "evaluating": 10}
    assert (expected.num_attempts, expected.wall_s, expected.goodput) == (1, 69, 40 / 69)


def test_a_kill_costs_all_since_the_last_commit() -> None:
    """Saved after 10 steps at 30 s, committed at 33 s; killed at 40 s, in the 5th step after that."""
    policy = Policy(total_steps=20, interval_s=20.0)
    expected = simulate(policy, COSTS, [Window(7, 40, dead_s=9), Window(100, 1000)])
    assert figures(expected) == {
        "queued": 107, "failed": 9, "starting": 20, "saving": 1 + 6, "redoing": 8, "training": 29 + 12
    }  # fmt: skip
    assert expected.num_attempts == 2


def test_a_save_waits_for_the_one_before() -> None:
    """As the real one does; else saves that are due sooner than they are done would never commit."""
    costs = Costs(start_s=10, step_s=1, commit_s=15)
    expected = simulate(Policy(30, interval_s=None, interval_steps=10), costs, [Window(0, 36)])
    assert figures(expected) == {"starting": 20, "training": 30, "saving": 5, "redoing": 11}


def test_an_evaluation_that_was_cut_off_is_made_again_and_the_first_step_takes_longer() -> None:
    policy = Policy(total_steps=2, interval_s=None, evaluate_every=1)
    costs = Costs(start_s=10, step_s=2, first_step_s=3, evaluation_s=5)
    expected = simulate(policy, costs, [Window(0, 19, grace_s=1)])
    assert figures(expected) == {"starting": 20, "training": 10, "evaluating": 4 + 10}


def test_a_kill_before_the_commit_costs_the_save_too() -> None:
    policy = Policy(total_steps=20, interval_s=20.0)
    expected = simulate(policy, COSTS, [Window(0, 32.5)])
    assert figures(expected)["redoing"] == 2 * 10


def test_a_notice_costs_nothing_where_step_and_save_fit() -> None:
    """Noticed 1 s into the 6th step: the other second of it, 3 s of a commit and 4 s more."""
    policy = Policy(total_steps=20, interval_s=None)
    expected = simulate(policy, COSTS, [Window(0, 21, grace_s=8.1)])
    assert figures(expected) == {"starting": 20, "training": 11 + 28, "draining": 8, "saving": 6}


def test_a_step_that_does_not_fit_is_dropped() -> None:
    policy = Policy(total_steps=20, interval_s=None)
    expected = simulate(policy, COSTS, [Window(0, 21, grace_s=7.1)])
    assert figures(expected) == {"starting": 20, "training": 11 + 30, "draining": 7, "saving": 6}


def test_a_grace_that_is_too_short_saves_nothing() -> None:
    policy = Policy(total_steps=20, interval_s=None)
    expected = simulate(policy, COSTS, [Window(0, 21, grace_s=5)])
    assert figures(expected) == {"starting": 20, "training": 11 + 30, "redoing": 10, "draining": 5, "saving": 6}


def test_a_machine_that_never_lasts_is_refused() -> None:
    with pytest.raises(ConfigError, match="1000 starts in a row commit no step"):
        simulate(Policy(total_steps=20), COSTS, itertools.repeat(Window(0, 9)))


WINDOWS = st.lists(st.builds(Window, *[st.floats(0, 300)] * 4), max_size=8)


@given(WINDOWS, st.integers(1, 200), st.floats(1, 100), st.none() | st.integers(1, 50), st.none() | st.integers(1, 50))
def test_laws(trace: list[Window], total: int, every_s: float, by_steps: int | None, evaluate: int | None) -> None:
    expected = simulate(Policy(total, every_s, by_steps, evaluate), COSTS, trace)
    assert set(expected.seconds) <= set(KINDS)
    assert all(seconds >= 0 for seconds in expected.seconds.values())
    assert 0 < expected.goodput <= 1
    assert expected.num_attempts <= len(trace) + 1
    drained = sum(window.grace_s > 0 for window in trace)
    assert expected.seconds["training"] >= (total - drained) * COSTS.step_s - 1e-6, "all steps are made once at least"


@given(st.floats(0, 60), st.integers(1, 30))
def test_a_machine_that_stays_long_enough_gains_steps_each_time(commit_s: float, every: int) -> None:
    costs = Costs(start_s=10, step_s=1, commit_s=commit_s)
    policy = Policy(2 * every, interval_s=None, interval_steps=every)
    expected = simulate(policy, costs, itertools.repeat(Window(0, 10 + every + commit_s + 1)))
    assert expected.num_attempts <= 3


def test_drawn_preemptions_have_their_mean_and_their_seed() -> None:
    drawn = list(itertools.islice(windows(3600, 60, 120, seed=5), 4000))
    assert drawn == list(itertools.islice(windows(3600, 60, 120, seed=5), 4000))
    assert sum(window.seconds for window in drawn) / 4000 == pytest.approx(3600, rel=0.05)


# ---- From a run ------------------------------------------------------------------------------------------------------


def lived(run: Run) -> Run:
    """10 steps and a notice; 5 steps and a kill; done."""
    first = trained(run, 0, 0, 10)
    rank(first, "save_staged", 27, step=10, reason="notice", seconds=0.2)
    rank(first, "save_committed", 28, step=10, seconds=1.0)
    agent(first, "notice", 27, signal="SIGTERM", received=NOW + 27)
    agent(first, "attempt_ended", 29.5, outcome="preempted", step=10)
    trained(run, 40, 10, 15)
    third = trained(run, 100, 10, 20)
    rank(third, "evaluation_started", 127, step=20)
    rank(third, "evaluation_finished", 130, step=20, seconds=3.0)
    rank(third, "save_staged", 131, step=20, reason="last", seconds=0.5)
    agent(third, "attempt_ended", 132, outcome="finished")
    return run


def configured(run: Run) -> None:
    train = {"steps": 30, "eval_every": 20, "schedule": {"warmup_steps": 2}}  # 20 are what its loop made
    (run.path / "config.yaml").write_text(config("test", train=train).to_yaml())


def test_costs_and_windows_of_a_run(run: Run) -> None:
    ledger = ledger_of(lived(run), NOW + 500, alive=False)
    costs = costs_of(run, ledger)
    assert costs == Costs(
        start_s=17, step_s=25.5 / 25, first_step_s=0, stall_s=0, commit_s=1, evaluation_s=3, drain_s=1.5, end_s=1.5
    )
    assert windows_of(ledger, grace_s=120) == [Window(0, 27, 120), Window(10.5, 22, 0)]


def test_its_own_preemptions_give_its_own_goodput(run: Run) -> None:
    ledger = ledger_of(lived(run), NOW + 500, alive=False)
    configured(run)
    expected = simulate(policy_of(run), costs_of(run, ledger), windows_of(ledger, 120))
    assert expected.goodput == pytest.approx(ledger.goodput, rel=0.05)


def test_too_few_steps_tell_nothing(run: Run) -> None:
    step(claim(run, 0), 1, 10)
    with pytest.raises(RunError, match="has made 1 steps"):
        costs_of(run, ledger_of(run, NOW + 20, alive=True))


def test_a_number_of_steps_that_no_run_has_is_refused(run: Run) -> None:
    configured(lived(run))
    rank(run.attempts()[-1], "training_started", 133, step=10, total_steps=1e18)
    with pytest.raises(RunError, match=r"said to have 1e\+18 steps"):
        policy_of(run)


@pytest.mark.parametrize(
    "line",
    ["seconds: 5", "[]", '{"queued_s": 5}', '{"seconds": -1}', '{"seconds": "5"}', '{"seconds": 5, "x": 1}',
     '{"seconds": NaN}', '{"seconds": true}'],
)  # fmt: skip
def test_a_trace_that_is_none_names_the_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"seconds": 60, "grace_s": 5}\n\n' + line + "\n")
    with pytest.raises(ConfigError, match=r"trace\.jsonl:3"):
        read_trace(path)


def test_the_command(run: Run, tmp_path: Path) -> None:
    configured(lived(run))
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"seconds": 30}\n{"seconds": 30, "queued_s": 60, "grace_s": 120}\n')
    assert "measured, with the same preemptions" in printed(tmp_path, "simulate", "test")
    replayed = json.loads(printed(tmp_path, "simulate", "test", "--trace", str(trace), "--json"))
    assert (replayed["attempts"], replayed["measured_goodput"]) == (3, None)
    drawn = printed(tmp_path, "simulate", "test", "--mtbf-h", "0.1", "--interval-s", "5", "--interval-s", "50")
    assert [line.split()[0] for line in drawn.splitlines()[2:]] == ["5", "50"]
    trace.write_bytes(bytes(range(256)))
    assert "trace.jsonl:1" in complaint(tmp_path, "simulate", "test", "--trace", str(trace))
    complaint(tmp_path, "simulate", "test", "--mtbf-h", "inf", code=2)
    assert "not both" in complaint(tmp_path, "simulate", "test", "--mtbf-h", "1", "--trace", str(trace))
