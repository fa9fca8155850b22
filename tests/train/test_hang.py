"""Ranks that do not come are named, then given up; nothing waits for ever."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from running import (
    NEVER,
    PATIENCE_S,
    AgentProcess,
    agent_of,
    events,
    hold,
    make_run,
    run_agent,
    wait_for,
    wait_for_event,
)

from latentwire.checklist.drill import final_digests
from latentwire.run.budget import verdict_of
from latentwire.run.directory import Attempt, Run
from latentwire.run.status import run_status
from latentwire.train.node import ONE_NODE, Rendezvous, network_variables
from latentwire.train.watch import Standing

SHORT = ("train.steps=8", "train.schedule.warmup_steps=2")
IN_THE_SIXTH_STEP = {2: 21, 3: 16}
"""Visits of rank 1, by the number of ranks: one in warm-up, four or three in each step."""


def _run_of(folder: Path, num_ranks: int, elastic: dict[str, Any] | None = None, **options: Any) -> Run:
    workload = {"options": {"counts": False, **options}}
    return make_run(
        folder, f"hang-{num_ranks}", SHORT, workload=workload, elastic={"num_ranks": num_ranks, **(elastic or {})}
    )


def _standing_rank_1(agent: AgentProcess) -> psutil.Process:
    wait_for_event(agent.attempt, "holding", "rank1")
    workers = [p for p in agent.tree() if "latentwire.train.worker" in p.cmdline()]
    return next(p for p in workers if p.environ()["RANK"] == "1")


def _hangs(attempt: Attempt, *ranks: int) -> list[dict[str, Any]]:
    return [event for event in events(attempt, "hang", "agent") if event["ranks"] == [*ranks]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of one rank's result."""
    run = _run_of(tmp_path_factory.mktemp("alone"), 1)
    assert run_agent(run) == "finished"
    return final_digests(run)


def test_a_stopped_rank_is_named_and_given_up_and_the_run_goes_on(alone: dict[str, str], tmp_path: Path) -> None:
    with ExitStack() as stack:
        agents = []
        for num_ranks, visits in IN_THE_SIXTH_STEP.items():
            run = _run_of(tmp_path, num_ranks, {"hang_s": 0.5, "timeout_s": 10.0})
            hold(run, "step-rank1", visits)
            agents.append(stack.enter_context(agent_of(run)))
        for agent in agents:
            _stop_rank_1(agent)
        for agent in agents:
            wait_for(lambda agent=agent: _stopped(agent.attempt, 1), "the name of rank 1")
            assert agent.outcome() == "finished"
            first, *_, last = agent.run.attempts()
            verdict = verdict_of(first)
            assert (verdict.outcome, verdict.cause) == ("failed", "network")
            assert str(verdict.error).startswith("rank 1 (")
            assert events(last, "restored")[0]["step"] >= 4
            assert final_digests(agent.run) == alone


def _stopped(attempt: Attempt, rank: int) -> bool:
    """Whether it was named with where it stands; on a busy machine it may have been named before, as late."""
    where = ("not a word from it, its process is stopped", "forward_backward")
    return any(hang["at"] == [at] for hang in _hangs(attempt, rank) for at in where)


def _standing(attempt: Attempt, rank: int, waiting: list[int]) -> list[dict[str, Any]]:
    """Where it was named with its place; on a busy machine its own word may come after it was named."""
    return [hang for hang in _hangs(attempt, rank) if (hang["at"], hang["waiting"]) == (["forward_backward"], waiting)]


def _stop_rank_1(agent: AgentProcess) -> None:
    process = _standing_rank_1(agent)
    wait_for_event(agent.attempt, "save_committed")
    process.suspend()
    hold(agent.run, "step-rank1", NEVER)


def test_a_slow_rank_is_named_with_its_place_and_waited_for(alone: dict[str, str], tmp_path: Path) -> None:
    run = _run_of(tmp_path, 3, {"hang_s": 0.5})
    hold(run, "step-rank1", IN_THE_SIXTH_STEP[3])
    with agent_of(run) as agent:
        wait_for_event(agent.attempt, "holding", "rank1")
        (hang, *_) = wait_for(lambda: _standing(agent.attempt, 1, [0, 2]), "the name and the place of rank 1")
        status = run_status(run)
        hold(run, "step-rank1", NEVER)
        assert agent.outcome() == "finished"
    assert hang["waited_s"] >= 0.5
    assert status.state == "RUNNING"
    assert str(status.reason).startswith("rank 1 (forward_backward) did not come for ")
    attempt = run.attempts()[-1]
    assert attempt.number == 1, "it was not ended"
    stuck = [event for event in events(attempt, "stuck", "rank1") if event["at"] == "forward_backward"]
    assert any("toy.py" in line and "_hold" in line for line in stuck[-1]["stack"])
    assert events(attempt, "goes_on", "rank1")
    assert events(attempt, "hang_over", "agent")
    assert final_digests(run) == alone


@pytest.mark.parametrize(
    "others", ["wait for its gradients", pytest.param("have not come so far", marks=pytest.mark.slow)]
)
def test_a_rank_without_memory_holds_nobody_up(others: str, tmp_path: Path) -> None:
    """Not in the exchange that it does not finish, nor by the end of a process whose gradients nobody takes."""
    run = _run_of(tmp_path, 2, troubles=[{"kind": "late_oom", "after_samples": 16, "rank": 1}])
    last_micro_batch = 8  # of the second step: NCCL comes together in the first
    hold(run, "step-rank1", last_micro_batch)
    if others == "have not come so far":
        hold(run, "step-rank0", last_micro_batch)
    with agent_of(run) as agent:
        process = _standing_rank_1(agent)
        hold(run, "step-rank1", NEVER)
        process.wait(PATIENCE_S)
        hold(run, "step-rank0", NEVER)
        assert agent.outcome() == "finished"
    assert [verdict_of(attempt).cause for attempt in run.attempts()] == ["oom", None]
    (halved,) = events(run.attempts()[-1], "micro_batch_halved", "agent")
    assert (halved["from"], halved["to"]) == (2, 1)
    assert "bits may differ" in halved["note"]


def test_a_standing_says_whether_it_waits() -> None:
    standing = Standing()
    before = standing.note
    with standing.waiting():
        assert standing.note.is_waiting
    assert not standing.note.is_waiting
    assert standing.note is not before, "to come and go is to go on"


def test_ranks_of_one_node_meet_on_the_loopback_unless_the_user_says_otherwise() -> None:
    here, elsewhere = Rendezvous(ONE_NODE, 1), Rendezvous("10.0.0.7", 1)
    assert network_variables(here, {}) == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    assert network_variables(here, {"NCCL_SOCKET_IFNAME": "eth0"}) == {"GLOO_SOCKET_IFNAME": "lo"}
    assert network_variables(elsewhere, {}) == {}
