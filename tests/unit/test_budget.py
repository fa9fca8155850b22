"""How often a run is started again."""

from __future__ import annotations

import dataclasses

import pytest
from run_parts import end_attempt

from latentwire.config import RetrySection
from latentwire.run.atomic import write_json
from latentwire.run.budget import had_too_many_at_once, next_move, num_halvings, verdict_of
from latentwire.run.directory import Run

RETRY = RetrySection(oom=2, network=3, network_backoff_s=5.0, other=1, lost=2)


def test_a_run_that_was_never_started_is_started(run: Run) -> None:
    assert next_move(run, RETRY).again


@pytest.mark.parametrize(
    ("cause", "outcome", "allowed"),
    [("oom", "failed", 2), ("network", "failed", 3), ("other", "failed", 1), ("never heard of", "failed", 1),
     (None, "failed", 1), ("killed", "failed", 2), (None, None, 2), ("user", "failed", 0)],
)  # fmt: skip
def test_each_cause_has_its_budget(run: Run, cause: str | None, outcome: str | None, allowed: int) -> None:
    for _ in range(allowed):
        end_attempt(run, outcome, cause)
        assert next_move(run, RETRY).again
    end_attempt(run, outcome, cause)
    move = next_move(run, RETRY)
    assert not move.again
    assert move.reason


@pytest.mark.parametrize("outcome", ["finished", "interrupted", "cancelled", "fenced"])
def test_what_ended_on_purpose_is_not_started_again(run: Run, outcome: str) -> None:
    end_attempt(run, outcome)
    assert not next_move(run, RETRY).again


@pytest.mark.parametrize(
    ("cause", "words"),
    [("oom", "out of memory"), ("network", "network failure"), ("other", "unexpected error"), ("killed", "lost")],
)
def test_a_cause_is_told_in_words(run: Run, cause: str, words: str) -> None:
    retry = RetrySection(oom=1, network=1, other=1, lost=1)
    end_attempt(run, "failed", cause)
    assert next_move(run, retry).reason == f"{words}, 1 of 1: why 1"
    end_attempt(run, "failed", cause)
    assert next_move(run, retry).reason == f"{words} 2 times without a step gained, 1 allowed: why 2"


def test_preemptions_never_count(run: Run) -> None:
    for _ in range(30):
        end_attempt(run, "preempted")
        assert next_move(run, RETRY) == dataclasses.replace(next_move(run, RETRY), again=True, pause_s=0.0)
    end_attempt(run, "failed", "other")
    assert next_move(run, RETRY).again


def test_a_step_gained_sets_the_counts_to_zero(run: Run) -> None:
    end_attempt(run, "failed", "other")
    end_attempt(run, "failed", "other", committed=5)
    assert next_move(run, RETRY).again, "the second counts as the first"
    end_attempt(run, "failed", "other", committed=5)
    assert not next_move(run, RETRY).again, "the same step again is no gain"


def test_causes_are_counted_apart(run: Run) -> None:
    for cause in ("oom", "network", "other", "oom", "network"):
        end_attempt(run, "failed", cause)
        assert next_move(run, RETRY).again
    end_attempt(run, "failed", "other")
    assert not next_move(run, RETRY).again


def test_the_pause_after_network_failures_doubles_to_five_minutes(run: Run) -> None:
    patient = RetrySection(network=100)
    pauses = []
    for _ in range(9):
        end_attempt(run, "failed", "network")
        pauses.append(next_move(run, patient).pause_s)
    assert pauses == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    end_attempt(run, "failed", "oom")
    assert next_move(run, patient).pause_s == 0


def test_every_time_out_of_memory_halves_the_micro_batch(run: Run) -> None:
    end_attempt(run, "failed", "oom", committed=1)
    end_attempt(run, "preempted")
    end_attempt(run, "failed", "oom", committed=2)
    assert num_halvings(run) == 2
    assert [num_halvings(run, since=number) for number in (1, run.newest_number() + 1)] == [2, 0]


def test_out_of_memory_with_two_micro_batches_at_once_takes_one_first(run: Run) -> None:
    attempt = end_attempt(run, "failed", "oom")
    assert not had_too_many_at_once(run)
    write_json(attempt.path / "placement.json", {"in_flight": 2})
    assert (had_too_many_at_once(run), num_halvings(run)) == (True, 0)
    attempt = end_attempt(run, "failed", "oom")
    write_json(attempt.path / "placement.json", {"in_flight": 1})
    assert (had_too_many_at_once(run), num_halvings(run)) == (True, 1)


def test_an_attempt_without_a_word_is_lost(run: Run) -> None:
    assert verdict_of(end_attempt(run, None)).outcome == "lost"
    assert verdict_of(end_attempt(run, "failed", "oom")).cause == "oom"
