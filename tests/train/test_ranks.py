"""One and several ranks give the same bits, also when their number changes from start to start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from running import NEVER, TERM, agent_of, events, held, hold, make_run, run_agent, wait_for_event

from latentwire.checklist.drill import final_digests
from latentwire.elastic.schedule import micro_batches_of
from latentwire.run.budget import verdict_of
from latentwire.run.directory import Attempt, Run

ONE_EPOCH = ("train.steps=12", "train.global_batch=8", "train.micro_batch=1", "train.schedule.warmup_steps=2")
SHORT = ("train.steps=8", "train.schedule.warmup_steps=2")


def _run_of(folder: Path, num_ranks: int, overrides: tuple[str, ...] = SHORT, **options: Any) -> Run:
    workload = {"options": {"counts": False, **options}}
    return make_run(folder, "ranks", overrides, workload=workload, elastic={"num_ranks": num_ranks})


def _rank_records(attempt: Attempt) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(attempt.path.glob("rank*.json"))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of one rank's result."""
    run = _run_of(tmp_path_factory.mktemp("alone"), 1)
    assert run_agent(run) == "finished"
    return final_digests(run)


@pytest.mark.slow  # the next test does this with changes in between
def test_four_ranks_give_the_bits_of_one(alone: dict[str, str], tmp_path: Path) -> None:
    run = _run_of(tmp_path, 4)
    assert run_agent(run) == "finished"
    assert [r["outcome"] for r in _rank_records(run.attempts()[0])] == ["finished"] * 4
    assert final_digests(run) == alone


@pytest.mark.parametrize(
    ("changes", "workers"),
    [((), 0), (("train.precision=bf16", "train.optimizer.fused=true"), 2)],
    ids=["fp32", "bf16, fused, workers"],
)
def test_another_number_of_ranks_at_each_of_five_preemptions_in_one_epoch(
    tmp_path: Path, changes: tuple[str, ...], workers: int
) -> None:
    """With dropout, EMA, gradient clipping and augmented data, which the toy has."""
    overrides = (*ONE_EPOCH, *changes)
    undisturbed = _run_of(tmp_path / "alone", 1, overrides)
    assert run_agent(undisturbed) == "finished"
    for num_ranks in (1, 2, 4, 3, 1):
        run = _run_of(tmp_path / "moved", num_ranks, (*overrides, f"data.workers={workers}"))
        _preempt_in_the_second_step(run)
    assert run_agent(run) == "finished"
    assert [len(_rank_records(attempt)) for attempt in run.attempts()] == [1, 2, 4, 3, 1, 1]
    assert max(verdict_of(attempt).step or 0 for attempt in run.attempts()) * 8 < 101, "one epoch"
    assert final_digests(run) == final_digests(undisturbed)


def _preempt_in_the_second_step(run: Run) -> None:
    """All ranks must stop at one step, though each stands somewhere else when the notice comes."""
    num_ranks = run.config().elastic.num_ranks or 1
    last = num_ranks - 1
    warm_up, in_a_step = 1, len(micro_batches_of(last, num_ranks, 8))
    with held(run, "step", warm_up + in_a_step + 1), agent_of(run) as agent:
        wait_for_event(agent.attempt, "holding", f"rank{last}")
        agent.send(TERM)
        wait_for_event(agent.attempt, "notice", "agent")
        hold(run, "step", NEVER)
        assert agent.outcome() == "preempted"
        attempt = agent.attempt
    records = _rank_records(attempt)
    assert len(records) == num_ranks
    assert {record["outcome"] for record in records} == {"preempted"}
    stopped = {events(attempt, "left", f"rank{index}")[0]["dropped_partial_step"] for index in range(num_ranks)}
    assert len(stopped) == 1
    before = [verdict_of(a).step or 0 for a in run.attempts()[:-1]]
    assert verdict_of(attempt).step == events(attempt, "left")[0]["step"] > max(before, default=0)


def test_the_rank_that_failed_first_gives_the_cause(tmp_path: Path) -> None:
    """The other ranks fail too, of the lost connection; that says nothing."""
    overrides = ("train.steps=2", "train.schedule.warmup_steps=0", "train.micro_batch=4")
    trouble = {"kind": "oom", "after_samples": 8, "rank": 1}
    run = _run_of(tmp_path, 2, overrides, troubles=[trouble])
    assert run_agent(run) == "finished"
    assert [verdict_of(attempt).cause for attempt in run.attempts()] == ["oom", None]
