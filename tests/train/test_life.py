"""A life: one run under every signal, compared at the end with the run that nobody disturbed."""

from __future__ import annotations

import dataclasses
import signal

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
from latentwire.run.budget import next_move, verdict_of
from latentwire.run.directory import Attempt, Run
from latentwire.run.journal import read_journal


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
def life(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Chapter]:
    """The chapters by name, in order."""
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
