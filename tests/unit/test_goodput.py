"""The ledger: every millisecond of a run in one class."""

from __future__ import annotations

import dataclasses
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_parts import ELSEWHERE, NOW, tell

from latentwire.run.atomic import write_json
from latentwire.run.directory import Attempt, Run
from latentwire.run.goodput import KINDS, Ledger, ledger_of, together
from latentwire.run.journal import Journal
from latentwire.run.seen import SeenRun

Story = list[tuple[str, float]]


def own(run: Run, event: str, at: float, **fields: Any) -> None:
    """A line of the orchestrator, ``at`` seconds after the beginning."""
    journal = Journal(run.orchestrator_events, clock=lambda: NOW + at)
    journal.event(event, **fields)
    journal.close()


def claim(run: Run, at: float, job_id: str = "1", gpus: int = 0) -> Attempt:
    attempt = run.claim_attempt(job_id, "slurm")
    record = attempt.record() | {"claimed": NOW + at, "agent": dataclasses.asdict(ELSEWHERE)}
    write_json(attempt.path / "attempt.json", record)
    write_json(attempt.path / "placement.json", {"devices": [[f"cuda:{gpu}"] for gpu in range(gpus)] or [["cpu"]]})
    return attempt


def rank(attempt: Attempt, event: str, at: float, **fields: Any) -> None:
    tell(attempt, "rank0", event, NOW + at, **fields)


def agent(attempt: Attempt, event: str, at: float, **fields: Any) -> None:
    tell(attempt, "agent", event, NOW + at, **fields)


def step(attempt: Attempt, number: Any, at: float) -> None:
    with open(attempt.metrics_path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"time": NOW + at, "step": number, "loss": 1.0, "step_s": 1.0}) + "\n")


def trained(run: Run, at: float, first: int, last: int, **how: Any) -> Attempt:
    """An attempt that is up after 10 s, loads for 4, restores for 2, warms up for 1, and makes a step a second."""
    attempt = claim(run, at, **how)
    rank(attempt, "workload_built", at + 14, seconds=4.0)
    rank(attempt, "restored", at + 16, seconds=2.0, step=first)
    rank(attempt, "training_started", at + 17, step=first, total_steps=20)
    for number in range(first + 1, last + 1):
        step(attempt, number, at + 17 + number - first)
    return attempt


def story(ledger: Ledger) -> Story:
    return [(span.kind, span.seconds) for span in ledger.spans]


def check(ledger: Ledger) -> None:
    """No hole, no overlap, no class that is not one; so the sum is the wall clock to the millisecond."""
    for before, after in itertools.pairwise(ledger.spans):
        assert before.end_ms == after.begin_ms
    for span in ledger.spans:
        assert span.kind in KINDS
        assert span.begin_ms < span.end_ms
    if ledger.spans:
        assert round(ledger.wall_s * 1000) == ledger.spans[-1].end_ms - ledger.spans[0].begin_ms
        assert sum(ledger.seconds().values()) == pytest.approx(ledger.wall_s)


def account(run: Run, now: float = 1000, alive: bool = False) -> Ledger:
    ledger = ledger_of(run, NOW + now, alive)
    check(ledger)
    return ledger


STARTED: Story = [("starting", 10), ("loading", 4), ("restoring", 2), ("starting", 1)]


def test_a_run_that_never_began_has_no_account(run: Run) -> None:
    ledger = account(run)
    assert (ledger.spans, ledger.goodput, ledger.wall_s) == ((), None, 0)


def test_what_was_submitted_waits(run: Run) -> None:
    own(run, "submitting", 0)
    own(run, "submitted", 2, job_id="1")
    ledger = account(run, now=60)
    assert story(ledger) == [("queued", 60)]
    assert (ledger.allotted_s, ledger.goodput) == (0, None)


def test_an_undisturbed_run(run: Run) -> None:
    own(run, "submitting", 0)
    attempt = trained(run, 30, 0, 20)
    rank(attempt, "evaluation_started", 57, step=10)
    rank(attempt, "evaluation_finished", 59, step=10, seconds=2.0)
    rank(attempt, "save_staged", 62, step=13, reason="interval", seconds=0.5)
    rank(attempt, "save_staged", 67.25, step=20, reason="last", seconds=0.25)
    rank(attempt, "training_finished", 70)
    agent(attempt, "attempt_ended", 71, outcome="finished")
    ledger = account(run)
    assert story(ledger) == [
        ("queued", 30), *STARTED, ("training", 10), ("evaluating", 2), ("training", 2.5), ("saving", 0.5),
        ("training", 5), ("saving", 4),
    ]  # fmt: skip
    assert (ledger.wall_s, ledger.allotted_s) == (71, 41)
    assert ledger.goodput == 17.5 / 41
    assert {cause: seconds for cause, (seconds, _) in ledger.lost_by_cause().items()} == {
        "first start": 17, "saves": 4.5, "evaluation": 2
    }  # fmt: skip


def test_a_notice_costs_what_follows_it(run: Run) -> None:
    own(run, "submitting", 0)
    first = trained(run, 0, 0, 10, gpus=2)
    agent(first, "notice", 25.5, signal="SIGTERM", received=NOW + 25)
    rank(first, "save_staged", 27, step=10, reason="notice", seconds=0.2)
    agent(first, "attempt_ended", 28, outcome="preempted", step=10)
    agent(first, "requeue", 29, done=True)
    second = trained(run, 100, 10, 20, gpus=4)
    agent(second, "attempt_ended", 127, outcome="finished")
    ledger = account(run)
    assert story(ledger) == [
        *STARTED, ("training", 8), ("draining", 3), ("queued", 72), *STARTED, ("training", 10)
    ]  # fmt: skip
    assert ledger.seconds_of("redoing") == 0
    causes = ledger.lost_by_cause()
    assert {cause: seconds for cause, (seconds, _) in causes.items()} == {"first start": 17, "preempted": 3 + 17}
    assert causes["preempted"][1] == pytest.approx((3 * 2 + 17 * 4) / 3600)
    assert ledger.gpu_hours == pytest.approx((28 * 2 + 27 * 4) / 3600)


GPUS = {"": 3, ".node1": 2}
"""That the agents of two nodes see."""


@pytest.mark.parametrize(
    ("given", "seen", "placed", "held"),
    [
        (None, {"": 3}, 2, 3),
        (None, GPUS, 4, 5),
        (None, {"": 2}, 4, 4),
        (None, {}, 2, 2),
        (4, {"": 3}, 2, 4),
        (4, {"": 0}, 0, 4),
        (4, {}, None, 4),
        (None, {"": 3}, None, 3),
        (None, {}, None, 0),
    ],
    ids=["one idles", "two nodes", "a node does not say", "no node says", "one is broken", "no driver", "died at once",
         "died before it placed", "nothing is known"],
)  # fmt: skip
def test_what_was_held_counts_whether_ranks_used_it_or_not(
    run: Run, given: int | None, seen: dict[str, int], placed: int | None, held: int
) -> None:
    attempt = claim(run, 0, gpus=placed or 0)
    write_json(attempt.path / "attempt.json", attempt.record() | {"gpus": given})
    if placed is None:
        (attempt.path / "placement.json").unlink()
    agent(attempt, "attempt_started", 0)
    watched = SeenRun(run)
    for node, gpus in seen.items():
        write_json(attempt.path / f"environment{node}.json", {"gpus": [{"name": "H200"}] * gpus})
    agent(attempt, "attempt_ended", 3600, outcome="finished")
    watched.look()
    assert account(run).gpu_hours == held
    assert ledger_of(watched, NOW + 3600, alive=False).gpu_hours == held, "who looks on knows it too"


def test_what_was_lost_is_done_again(run: Run) -> None:
    own(run, "submitting", 0)
    first = trained(run, 0, 0, 10)
    rank(first, "save_committed", 23, step=6)
    own(run, "attempt_lost", 60, attempt=1, step=6)
    own(run, "submitting", 61)
    second = trained(run, 80, 6, 15)
    agent(second, "attempt_ended", 106, outcome="finished")
    assert story(account(run)) == [
        *STARTED, ("training", 10), ("failed", 33), ("queued", 20), *STARTED, ("redoing", 4), ("training", 5)
    ]  # fmt: skip


def test_a_monitors_last_line_counts_wherever_it_is_kept(run: Run) -> None:
    own(run, "submitting", 0)
    lost = trained(run, 0, 0, 10)
    samples, minutes = lost.path / "gpu_stats.jsonl", lost.path / "gpu_stats.thin.jsonl"
    samples.write_text(json.dumps({"time": NOW + 40, "host": {}, "gpus": []}) + "\n")
    own(run, "submitting", 61)
    trained(run, 80, 10, 15)
    before = story(account(run))
    samples.rename(minutes)  # as for an attempt of long ago
    assert story(account(run)) == before
    minutes.unlink()
    assert story(account(run)) != before


def test_twice_lost_is_twice_done_again(run: Run) -> None:
    """What stands is what the furthest attempt had reached, not the last."""
    trained(run, 0, 0, 10)
    trained(run, 100, 2, 5)
    third = trained(run, 200, 2, 12)
    agent(third, "attempt_ended", 227, outcome="finished")
    ledger = account(run)
    assert ledger.seconds_of("redoing") == 3 + 8
    assert ledger.seconds_of("training") == 10 + 2


def test_a_failure_and_the_pause_after_it_in_its_allocation(run: Run) -> None:
    own(run, "submitted", 0, job_id="1")
    first = trained(run, 0, 0, 5, gpus=1)
    rank(first, "stuck", 28)  # no sign of work
    agent(first, "attempt_ended", 30, outcome="failed", cause="network", error="a cable")
    second = trained(run, 35, 5, 10, gpus=1)
    agent(second, "attempt_ended", 60, outcome="failed", cause="other", error="why")
    third = trained(run, 70, 10, 11, job_id="2")
    agent(third, "attempt_ended", 88, outcome="finished")
    ledger = account(run)
    assert story(ledger) == [
        *STARTED, ("training", 5), ("failed", 8), ("failed", 5), *STARTED, ("training", 5), ("failed", 3),
        ("queued", 10), *STARTED, ("training", 1),
    ]  # fmt: skip
    assert {cause: seconds for cause, (seconds, _) in ledger.lost_by_cause().items()} == {
        "network": 8 + 5 + 17, "other": 3 + 17, "first start": 17
    }  # fmt: skip


def test_nobody_waits_for_what_no_orchestrator_started(run: Run) -> None:
    first = trained(run, 0, 0, 5)
    agent(first, "attempt_ended", 30, outcome="failed", cause="other", error="a bug")
    assert account(run, now=9000).wall_s == 30
    trained(run, 500, 5, 6, job_id="2")
    assert ("stopped", 470) in story(account(run, now=600))


def test_what_the_agent_says_of_a_hang_is_no_sign_of_work(run: Run) -> None:
    attempt = trained(run, 0, 0, 5)
    agent(attempt, "alert", 500, alert="no_progress", text="no step")
    agent(attempt, "tracker_cut_short", 999)
    agent(attempt, "attempt_ended", 1000, outcome="failed", cause="network", error="a hang")
    assert story(account(run, now=1000)) == [*STARTED, ("training", 5), ("failed", 978)]


def test_a_cancel_is_no_preemption(run: Run) -> None:
    attempt = trained(run, 0, 0, 5)
    agent(attempt, "notice", 22, signal="SIGTERM", received=NOW + 22)
    agent(attempt, "attempt_ended", 24, outcome="cancelled", step=5)
    assert account(run).lost_by_cause().keys() == {"first start", "cancelled"}


def test_nobody_waits_for_what_was_stopped(run: Run) -> None:
    first = trained(run, 0, 0, 5)
    agent(first, "attempt_ended", 22, outcome="interrupted")
    own(run, "resumed", 500, after_attempt=1)
    second = trained(run, 510, 5, 6)
    agent(second, "attempt_ended", 528, outcome="failed", cause="user", error="no")
    own(run, "given_up", 530, reason="no")
    ledger = account(run, now=9000)
    assert story(ledger)[5:7] == [("stopped", 478), ("queued", 10)]
    assert ledger.spans[-1].end_ms == round((NOW + 530) * 1000), "nobody waits any more"
    assert ledger.allotted_s == 22 + 18


def test_a_running_attempt_counts_to_now(run: Run) -> None:
    trained(run, 0, 0, 5)
    assert story(account(run, now=100, alive=True)) == [*STARTED, ("training", 83)]


def test_a_fleet_is_the_sum(run: Run) -> None:
    attempt = trained(run, 0, 0, 5)
    agent(attempt, "attempt_ended", 22, outcome="finished")
    ledger = account(run)
    both = together([ledger, ledger])
    assert (both.wall_s, both.goodput) == (2 * ledger.wall_s, ledger.goodput)


def test_foreign_lines_upset_nothing(run: Run) -> None:
    attempt = trained(run, 0, 0, 5)
    with open(attempt.metrics_path, "a", encoding="utf-8") as file:
        file.write('{"step": "many", "step_s": "NaN", "time": null}\n[1]\n{"step": 7, "step_s"')
    with open(attempt.path / "events.rank0.jsonl", "a", encoding="utf-8") as file:
        file.write('{"event": "training_started", "step": null, "time": "soon"}\n{"event": 7}\n\x00\n')
    (attempt.path / "placement.json").write_text("{")
    (run.path / "attempts" / "0002").mkdir()
    account(run)


@pytest.mark.parametrize("figure", ["NaN", "-Infinity", "1e309", "true", "null"])
def test_a_figure_that_is_none_takes_no_time(run: Run, figure: str) -> None:
    """JSON has no NaN; Python reads it all the same."""
    attempt = trained(run, 0, 0, 5)
    with open(attempt.path / "events.rank0.jsonl", "a", encoding="utf-8") as file:
        file.write(f'{{"event": "save_staged", "time": {NOW + 22}, "seconds": {figure}}}\n')
        file.write(f'{{"event": "notice", "time": {NOW + 23}, "received": {figure}}}\n')
    agent(attempt, "attempt_ended", 24, outcome="preempted")
    assert story(account(run, now=24))[4:] == [("training", 5), ("training", 1), ("draining", 1)]


@pytest.mark.parametrize("time", ["[]", '"soon"', "null", "1e400"])
def test_an_event_without_a_time_turns_nothing(run: Run, time: str) -> None:
    attempt = trained(run, 0, 0, 5)
    before = story(account(run, now=24))
    with open(attempt.path / "events.rank0.jsonl", "a", encoding="utf-8") as file:
        file.write(f'{{"event": "save_staged", "time": {time}, "step": 5, "seconds": 1.0}}\n')
    assert story(account(run, now=24)) == before


NAMES = (
    "workload_built", "restored", "training_started", "evaluation_started", "evaluation_finished", "save_staged",
    "notice", "draining", "training_finished", "attempt_ended", "hang", "anything",
)  # fmt: skip
TIMES = st.floats(-50, 500)
EVENTS = st.lists(st.tuples(st.sampled_from(NAMES), TIMES, st.floats(0, 99), st.integers(0, 9)), max_size=12)
ENDS = st.sampled_from(["finished", "preempted", "failed", "lost", "interrupted"])


OWN = st.sampled_from(["submitting", "submitted", "attempt_lost", "given_up", "resumed"])


@settings(max_examples=30)
@given(
    st.lists(st.tuples(TIMES, EVENTS, ENDS), max_size=4),
    st.lists(st.tuples(OWN, TIMES), max_size=6),
    st.booleans(),
)
def test_whatever_the_clocks_say_the_sum_is_the_wall_clock(
    attempts: list[tuple[float, list[tuple[str, float, float, int]], str]], others: Story, alive: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "experiment_random")
        run.path.mkdir()
        for event, at in others:
            own(run, event, at)
        for claimed, told, outcome in attempts:
            attempt = claim(run, claimed)
            for event, at, seconds, number in told:
                rank(attempt, event, at, seconds=seconds, step=number, received=NOW + at - seconds, reason="last")
                step(attempt, number, at)
            if outcome != "lost":
                agent(attempt, "attempt_ended", claimed + 100, outcome=outcome)
        account(run, 200, alive)
