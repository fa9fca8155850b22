"""Checkpoints that somebody removed: noticed, and never answered by a silent start at step 0."""

from __future__ import annotations

import shutil
from pathlib import Path

from running import SLOW_ENOUGH, agent_of, events, make_run, run_agent, wait_for, wait_for_event

from latentwire.run.budget import verdict_of
from latentwire.run.directory import Run


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
    run = make_run(tmp_path, checkpoint={"interval_s": None, "interval_steps": 2}, **SLOW_ENOUGH)
    with agent_of(run) as agent:
        wait_for_event(agent.attempt, "save_verified")
        before = len(events(agent.attempt, "save_committed"))
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        wait_for(lambda: len(events(agent.attempt, "save_committed")) > before + 1, "saves after the removal")
        assert agent.outcome() == "finished"
    assert (run.checkpoints / "step-00000020" / "verified.json").is_file()
