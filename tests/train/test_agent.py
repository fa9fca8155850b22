"""The agent with real ranks: how it ends on signals, and what it makes of failures."""

from __future__ import annotations

import dataclasses
import json
import signal
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import psutil
import pytest
from running import (
    HERE,
    INT,
    KILL,
    NEVER,
    TERM,
    AgentProcess,
    agent_of,
    events,
    held,
    hold,
    make_run,
    trained_steps,
    wait_for,
    wait_for_event,
)

from latentwire.checklist.drill import final_digests
from latentwire.checkpoint import reader
from latentwire.run.budget import next_move, verdict_of
from latentwire.run.directory import Attempt, Run
from latentwire.run.journal import read_journal

# --- a life: one run under every signal, compared at the end with the run that nobody disturbed ----------------------


@dataclasses.dataclass(frozen=True)
class Chapter:
    """One attempt of the life: what was done to it is its name in the fixture."""

    attempt: Attempt
    outcome: str
    processes: list[psutil.Process] = dataclasses.field(default_factory=list)

    def names(self) -> list[str]:
        """All events of rank 0."""
        return [str(e.get("event")) for e in read_journal(self.attempt.path / "events.rank0.jsonl")]

    def num_notices(self) -> int:
        """How many notices the agent passed on."""
        return len(events(self.attempt, "notice", "agent"))


def _give_notice(agent: AgentProcess, signum: signal.Signals = TERM) -> None:
    agent.send(signum)
    wait_for_event(agent.attempt, "notice", "agent")


def _term_while(run: Run, where: str, *more: signal.Signals) -> Chapter:
    with held(run, where), agent_of(run) as agent:
        wait_for_event(agent.attempt, "holding")
        _give_notice(agent)
        for signum in more:
            agent.send(signum)
        hold(run, where, NEVER)
        return Chapter(agent.attempt, agent.outcome())


IN_THE_SECOND_STEP = 12
"""Visits of a lone rank: one in warm-up, eight in each step."""


def _asked_then_interrupted(run: Run) -> Chapter:
    with held(run, "step", IN_THE_SECOND_STEP), agent_of(run) as agent:
        wait_for_event(agent.attempt, "holding")
        agent.send(signal.SIGUSR1)
        wait_for_event(agent.attempt, "save_requested", "agent")
        hold(run, "step", IN_THE_SECOND_STEP + 16)
        wait_for_event(agent.attempt, "holding", number=2)
        _give_notice(agent, INT)
        hold(run, "step", NEVER)
        return Chapter(agent.attempt, agent.outcome())


def _term_to_the_whole_tree(run: Run) -> Chapter:
    with held(run, "step", IN_THE_SECOND_STEP), agent_of(run) as agent:
        wait_for_event(agent.attempt, "holding")
        tree = agent.tree()
        for process in tree:
            process.send_signal(TERM)
        wait_for_event(agent.attempt, "notice", "agent")
        hold(run, "step", NEVER)
        return Chapter(agent.attempt, agent.outcome(), tree)


def _interrupted_twice(run: Run) -> Chapter:
    with held(run, "build"), agent_of(run) as agent:
        wait_for_event(agent.attempt, "holding")
        _give_notice(agent, INT)
        agent.send(INT)
        return Chapter(agent.attempt, agent.outcome())


def _killed(run: Run) -> Chapter:
    with held(run, "step", IN_THE_SECOND_STEP), agent_of(run) as agent:
        wait_for_event(agent.attempt, "holding")
        tree = agent.tree()
        agent.send(KILL)
        outcome = agent.outcome()
        wait_for(lambda: not any(map(_lives, tree)), "the end of all that the agent started")
        return Chapter(agent.attempt, outcome, tree)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory, failing: dict[str, AgentProcess]) -> dict[str, Chapter]:
    """The chapters by name, in order; lived while other runs fail beside it."""
    assert failing
    folder = tmp_path_factory.mktemp("life")
    run = make_run(folder)
    chapters = {
        "TERM in build": _term_while(run, "build", TERM, signal.SIGUSR2),
        "TERM in warm-up": _term_while(run, "step"),
        "USR1, then INT": _asked_then_interrupted(run),
        "TERM in evaluation": _term_while(run, "evaluate", TERM),
    }
    run = make_run(folder, data={"workers": 2})
    chapters["TERM to all"] = _term_to_the_whole_tree(run)
    chapters["INT twice"] = _interrupted_twice(run)
    chapters["SIGKILL"] = _killed(run)
    run = make_run(folder)
    with agent_of(run, {"PYTHONPATH": str(HERE / "no_pickle")}) as agent:
        chapters["finished"] = Chapter(agent.attempt, agent.outcome())
    return chapters


def test_a_disturbed_life_ends_with_the_bits_of_a_calm_one(life: dict[str, Chapter], calm: Run) -> None:
    last = life["finished"]
    assert last.outcome == "finished"
    assert final_digests(last.attempt.run) == final_digests(calm)
    assert [chapter.attempt.number for chapter in life.values()] == list(range(1, len(life) + 1))


def test_term_in_build_leaves_at_the_next_safe_point(life: dict[str, Chapter]) -> None:
    chapter = life["TERM in build"]
    assert chapter.outcome == "preempted"
    assert chapter.names() == ["holding", "draining", "left"]


def test_more_notices_change_nothing(life: dict[str, Chapter]) -> None:
    assert life["TERM in build"].num_notices() == 1
    assert life["TERM in evaluation"].num_notices() == 1


def test_term_in_warm_up_leaves_without_a_step(life: dict[str, Chapter]) -> None:
    chapter = life["TERM in warm-up"]
    assert chapter.outcome == "preempted"
    names = chapter.names()
    assert "warmup_started" in names
    assert "warmup_finished" not in names
    assert not trained_steps(chapter.attempt)


def test_usr1_saves_and_goes_on(life: dict[str, Chapter]) -> None:
    attempt = life["USR1, then INT"].attempt
    asked = [e["step"] for e in events(attempt, "save_staged") if e["reason"] == "asked"]
    assert len(asked) == 1
    assert max(r["step"] for r in trained_steps(attempt)) > asked[0]


def test_int_saves_the_step_and_leaves_for_good(life: dict[str, Chapter]) -> None:
    chapter = life["USR1, then INT"]
    assert chapter.outcome == "interrupted"
    verdict = verdict_of(chapter.attempt)
    assert verdict.step == max(r["step"] for r in trained_steps(chapter.attempt))
    assert not next_move(_as_it_was_after(chapter), chapter.attempt.run.config().retry).again


def _as_it_was_after(chapter: Chapter) -> Run:
    """The run without the attempts that came later."""
    upto = [attempt for attempt in chapter.attempt.run.attempts() if attempt.number <= chapter.attempt.number]

    class Earlier(Run):
        def attempts(self) -> list[Attempt]:
            return upto

    return Earlier(chapter.attempt.run.path)


def test_an_interrupted_evaluation_is_done_again_and_no_step_is_lost(life: dict[str, Chapter]) -> None:
    chapter, after = life["TERM in evaluation"], life["TERM to all"]
    assert chapter.outcome == "preempted"
    started = events(chapter.attempt, "evaluation_started")[-1]["step"]
    assert not [e for e in events(chapter.attempt, "evaluation_finished") if e["step"] == started]
    assert events(after.attempt, "restored")[0]["step"] == started
    assert events(after.attempt, "evaluation_finished")[0]["step"] == started


def test_data_workers_survive_a_notice_to_every_process(life: dict[str, Chapter]) -> None:
    chapter, after = life["TERM to all"], life["SIGKILL"]
    assert chapter.outcome == "preempted"
    assert len(chapter.processes) >= 5, "agent, rank, monitor and two data workers"
    left = events(chapter.attempt, "left")[0]
    assert left["dropped_partial_step"] is False, "the step that was under way was finished with batches of the workers"
    assert left["step"] == max(r["step"] for r in trained_steps(chapter.attempt)) == _restored(after)
    assert "killed by signal" not in (chapter.attempt.path / "stderr.log").read_text()


def _restored(chapter: Chapter) -> int:
    return int(events(chapter.attempt, "restored")[0]["step"])


def test_a_second_int_leaves_at_once(life: dict[str, Chapter]) -> None:
    chapter = life["INT twice"]
    assert chapter.outcome == "interrupted"
    assert chapter.names() == ["holding"], "it stood still in its build all the time"


def test_nothing_outlives_a_killed_agent(life: dict[str, Chapter]) -> None:
    chapter = life["SIGKILL"]
    assert chapter.outcome == ""
    assert len(chapter.processes) >= 5
    assert chapter.attempt.ended() is None
    assert verdict_of(chapter.attempt).outcome == "lost"


def test_a_resume_reads_no_pickle(life: dict[str, Chapter]) -> None:
    chapter = life["finished"]
    assert "nothing is unpickled here" in (chapter.attempt.path / "stderr.log").read_text()
    assert _restored(chapter) > 0


# --- failures ---------------------------------------------------------------------------------------------------------

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
    assert "SIGKILL" in str(verdicts[2].error)
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


# --- what a run leaves on disk ----------------------------------------------------------------------------------------


def test_an_attempt_has_all_its_files(calm: Run) -> None:
    (attempt,) = calm.attempts()
    assert (attempt.path / "stdout.log").read_text() == "the toy is built\n"
    assert (attempt.path / "stderr.log").read_text() == "the toy complains\n"
    environment = json.loads((attempt.path / "environment.json").read_text())
    assert {"gpus", "cpu_model", "versions", "host", "python"} <= set(environment)
    assert environment["versions"]["torch"]
    placement = json.loads((attempt.path / "placement.json").read_text())
    assert (len(placement["devices"]), placement["micro_batch"], placement["num_micro_batches"]) == (1, 2, 8)
    stats = list(read_journal(attempt.path / "gpu_stats.jsonl"))
    assert stats[0]["event"] == "monitor_started"
    samples = [line["host"] for line in stats if "host" in line]
    assert len(samples) >= 2
    assert all(host["memory_total_bytes"] > 0 for host in samples)
    for rollup in ("metrics.json", "gpu_stats.json"):
        assert json.loads((calm.path / rollup).read_text())


def test_every_step_has_its_line_of_metrics(calm: Run) -> None:
    (attempt,) = calm.attempts()
    steps = trained_steps(attempt)
    assert [r["step"] for r in steps] == list(range(1, calm.config().train.steps + 1))
    wanted = {"time", "step", "loss", "plane", "lr", "grad_norm", "samples_per_s", "tokens_per_s", "step_s"}
    wanted |= {"data_s", "forward_backward_s", "optimizer_s", "save_s"}
    assert all(wanted <= set(record) for record in steps)
    assert any(record["save_s"] > 0 for record in steps)
    evaluations = [r for r in read_journal(attempt.path / "metrics.jsonl") if "eval/loss" in r]
    assert [r["step"] for r in evaluations] == [6, 12, 18, 20]


def test_a_checkpoint_holds_all_states(calm: Run) -> None:
    loaded = reader.load(max(calm.checkpoints.glob("step-*")))
    assert set(loaded.tensors) == {"model", "optimizer", "ema", "random"}
    trees = loaded.values["trees"]
    assert set(trees) == {"model", "optimizer", "scheduler", "scaler", "ema", "random"}
    assert set(trees["random"]) == {"python", "numpy", "torch", "cuda"}
    assert len(trees["random"]["python"][1]) == 625
    assert len(trees["random"]["numpy"][1]) == 624
    assert trees["scheduler"]["last_epoch"] == 20
    assert loaded.values["step"] == 20
    assert loaded.values["progress"]["counters"] == {"samples": 20 * STEP, "tokens": 20 * STEP, "skipped_steps": 0}
    assert loaded.manifest.identity == {"config": calm.config().digest(), "frozen": {"nothing": "0" * 64}}
    assert "eval/loss" in loaded.manifest.metrics
    names = {path.suffix for path in loaded.path.iterdir()}
    assert names <= {".safetensors", ".json", ""}


def test_the_newest_and_the_best_checkpoints_are_kept(calm: Run) -> None:
    steps = sorted(int(path.name.removeprefix("step-")) for path in calm.checkpoints.glob("step-*"))
    assert steps == [16, 18, 20]
