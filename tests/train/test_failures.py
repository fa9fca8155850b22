"""What the agent makes of failures."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from running import KILL, NEVER, AgentProcess, agent_of, events, hold, make_run, trained_steps, wait_for, wait_for_event

from latentwire.checkpoint import reader
from latentwire.run.budget import next_move, verdict_of
from latentwire.run.journal import read_journal

STEP = 16  # samples of one step


def _troubles(*troubles: tuple[str, int, bool]) -> dict[str, Any]:
    listed = [{"kind": kind, "after_samples": steps * STEP, "once": once} for kind, steps, once in troubles]
    return {"options": {"troubles": listed}}


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, AgentProcess]]:
    """Runs that fail in their own ways, at the same time."""
    folder = tmp_path_factory.mktemp("failing")
    once = (("oom", 3, True), ("network", 5, True), ("kill", 7, True), ("exit", 9, True), ("segfault", 11, True))
    runs = {
        "once": make_run(folder, "once", workload=_troubles(*once)),
        "bug": make_run(folder, "bug", workload=_troubles(("bug", 3, False))),
        "no-data": make_run(folder, "no-data", workload={"options": {"no_data": True}}),
        "diverging": make_run(
            folder,
            "diverging",
            ("train.max_skipped_steps=2",),
            workload=_troubles(("nan", 2, True), ("explode", 5, True), ("nan", 9, True)),
        ),
    }
    with ExitStack() as stack:
        yield {name: stack.enter_context(agent_of(run)) for name, run in runs.items()}


def test_each_cause_is_told_apart_and_overcome(failing: dict[str, AgentProcess]) -> None:
    agent = failing["once"]
    assert agent.outcome() == "finished"
    verdicts = [verdict_of(attempt) for attempt in agent.run.attempts()]
    assert [v.cause for v in verdicts] == ["oom", "network", "killed", "other", "killed", None]
    assert verdicts[2].error == "rank 0 ended by SIGKILL: the toy complains", "and no bar of progress"
    assert "exit code 3" in str(verdicts[3].error)
    assert "SIGSEGV" in str(verdicts[4].error)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_global_batch(failing: dict[str, AgentProcess]) -> None:
    failing["once"].outcome()
    placements = [json.loads((a.path / "placement.json").read_text()) for a in failing["once"].run.attempts()]
    assert [p["micro_batch"] for p in placements] == [2, 1, 1, 1, 1, 1]
    assert {p["micro_batch"] * p["num_micro_batches"] for p in placements} == {STEP}
    assert "halved" in placements[1]["why"]


def test_a_network_failure_is_retried_after_a_pause(failing: dict[str, AgentProcess]) -> None:
    failing["once"].outcome()
    _, failed, retried, *_ = failing["once"].run.attempts()
    ended = failed.ended()
    assert ended is not None
    pause = failed.run.config().retry.network_backoff_s
    assert retried.record()["claimed"] - ended["time"] >= pause - 0.002  # times in journals are rounded


def test_a_bug_is_retried_within_its_budget_and_then_told(failing: dict[str, AgentProcess]) -> None:
    agent = failing["bug"]
    assert agent.outcome() == "failed"
    attempts = agent.run.attempts()
    assert len(attempts) == 1 + agent.run.config().retry.other
    assert {verdict_of(a).cause for a in attempts} == {"other"}
    reason = next_move(agent.run, agent.run.config().retry).reason
    assert "without a step gained" in reason
    assert "RuntimeError: a bug in the toy" in reason
    errors = (attempts[-1].path / "stderr.log").read_text()
    assert "Traceback (most recent call last)" in errors
    assert 'raise RuntimeError("a bug in the toy")' in errors


def test_a_users_mistake_is_not_retried(failing: dict[str, AgentProcess]) -> None:
    agent = failing["no-data"]
    assert agent.outcome() == "failed"
    (attempt,) = agent.run.attempts()
    assert verdict_of(attempt).cause == "user"
    assert "there is no data file" in next_move(agent.run, agent.run.config().retry).reason


def test_bad_steps_are_skipped_and_too_many_end_the_run(failing: dict[str, AgentProcess]) -> None:
    agent = failing["diverging"]
    assert agent.outcome() == "failed"
    (attempt,) = agent.run.attempts()
    skipped = {e["step"]: e["reason"] for e in events(attempt, "step_skipped")}
    assert skipped == {3: "the loss is not finite", 6: "the gradient norm is over 10000", 10: "the loss is not finite"}
    verdict = verdict_of(attempt)
    assert verdict.cause == "user"
    assert "TrainingDiverged: step 10" in str(verdict.error)
    assert {r["step"]: r["loss"] for r in trained_steps(attempt)}[3] == "nan"


def test_a_skipped_step_leaves_the_weights_alone(failing: dict[str, AgentProcess]) -> None:
    failing["diverging"].outcome()
    (attempt,) = failing["diverging"].run.attempts()
    loaded = reader.load(attempt.run.checkpoints / "step-00000008")
    steps = loaded.tensors["optimizer"]["state.0.step"].data
    assert struct.unpack("<f", bytes(steps)) == (6.0,), "8 steps, two of them skipped"


def test_a_monitor_that_dies_is_told_of_and_started_again(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    hold(run, "step", 20)

    def monitor(agent: AgentProcess) -> psutil.Process | None:
        return next((p for p in agent.tree() if "latentwire.monitor" in p.cmdline()), None)

    with agent_of(run) as agent:
        wait_for_event(agent.attempt, "holding")
        stats = agent.attempt.path / "gpu_stats.jsonl"
        first = wait_for(lambda: monitor(agent), "the monitor")
        first.send_signal(KILL)
        assert wait_for_event(agent.attempt, "monitor_ended", "agent")["how"] == "by SIGKILL"
        wait_for(lambda: (second := monitor(agent)) and second.pid != first.pid, "another monitor")
        before = len(list(read_journal(stats)))
        wait_for(lambda: len(list(read_journal(stats))) > before + 1, "further samples")
        hold(run, "step", NEVER)
        assert agent.outcome() == "finished"
    assert len(events(agent.attempt, "monitor_ended", "agent")) == 1
