"""One and several ranks give the same bits, also when their number changes from start to start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from running import NEVER, TERM, agent_of, events, held, hold, make_run, run_agent, wait_for_event

from latentwire.checklist.drill import final_digests
from latentwire.run.budget import verdict_of
from latentwire.run.directory import Attempt, Run

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


def test_four_ranks_give_the_bits_of_one(alone: dict[str, str], tmp_path: Path) -> None:
    run = _run_of(tmp_path, 4)
    assert run_agent(run) == "finished"
    assert [r["outcome"] for r in _rank_records(run.attempts()[0])] == ["finished"] * 4
    assert final_digests(run) == alone


def test_the_number_of_ranks_may_change_at_every_start(alone: dict[str, str], tmp_path: Path) -> None:
    for num_ranks in (3, 4):
        run = _run_of(tmp_path, num_ranks)
        _preempt_in_a_step(run)
    run = _run_of(tmp_path, 2)
    assert run_agent(run) == "finished"
    assert [len(_rank_records(attempt)) for attempt in run.attempts()] == [3, 4, 2]
    assert final_digests(run) == alone


def _preempt_in_a_step(run: Run) -> None:
    """All ranks must stop at one step, though each stands somewhere else when the notice comes."""
    in_the_third_step = 8  # or the fourth: of rank 1's visits, which has two or three in a step and one in warm-up
    with held(run, "step", in_the_third_step), agent_of(run) as agent:
        wait_for_event(agent.attempt, "holding", "rank1")
        agent.send(TERM)
        wait_for_event(agent.attempt, "notice", "agent")
        hold(run, "step", NEVER)
        assert agent.outcome() == "preempted"
        attempt = agent.attempt
    records = _rank_records(attempt)
    assert len(records) == run.config().elastic.num_ranks
    assert {record["outcome"] for record in records} == {"preempted"}
    stopped = {events(attempt, "left", f"rank{index}")[0]["dropped_partial_step"] for index in range(len(records))}
    assert len(stopped) == 1
    assert verdict_of(attempt).step == events(attempt, "left")[0]["step"] >= 2


def test_the_rank_that_failed_first_gives_the_cause(tmp_path: Path) -> None:
    """The other ranks fail too, of the lost connection; that says nothing."""
    overrides = ("train.steps=2", "train.schedule.warmup_steps=0", "train.micro_batch=4")
    trouble = {"kind": "oom", "after_samples": 8, "rank": 1}
    run = _run_of(tmp_path, 2, overrides, troubles=[trouble])
    assert run_agent(run) == "finished"
    assert [verdict_of(attempt).cause for attempt in run.attempts()] == ["oom", None]
