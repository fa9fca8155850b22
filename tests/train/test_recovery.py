"""Checkpoints that somebody removed: noticed, and never answered by a silent start at step 0."""

from __future__ import annotations

import shutil
from pathlib import Path

from running import NEVER, agent_of, events, held, hold, make_run, run_agent, wait_for_event

from latentwire.run.budget import verdict_of
from latentwire.run.directory import Run

AFTER_FIVE_STEPS = 1 + 5 * 8
"""Visits of a lone rank: one in warm-up, eight in each step."""


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(tmp_path: Path, calm: Run) -> None:
    run = Run(tmp_path / calm.path.name)
    shutil.copytree(calm.path, run.path)
    shutil.rmtree(run.checkpoints)
    assert run_agent(run) == "failed"
    verdict = verdict_of(run.attempts()[-1])
    assert verdict.cause == "user"
    assert "was committed" in str(verdict.error)
    assert not events(run.attempts()[-1], "training_started")


def test_a_removed_folder_is_made_again_by_the_next_save(tmp_path: Path) -> None:
    run = make_run(tmp_path, checkpoint={"interval_s": None, "interval_steps": 2})
    with held(run, "step", AFTER_FIVE_STEPS), agent_of(run) as agent:
        wait_for_event(agent.attempt, "save_verified", number=2)
        wait_for_event(agent.attempt, "holding")
        shutil.rmtree(run.checkpoints)
        hold(run, "step", NEVER)
        assert agent.outcome() == "finished"
    assert len(events(agent.attempt, "save_committed")) > 2
    assert (run.checkpoints / "step-00000020" / "verified.json").is_file()
