"""Two attempts on one folder: whoever was superseded commits nothing, deletes nothing, and leaves nothing torn."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_parts import (
    Events,
    assert_holds,
    assert_sound,
    commit,
    committed_steps,
    cut,
    next_attempt,
    open_manager,
    snapshot,
)

from latentwire.checkpoint import layout
from latentwire.checkpoint.layout import step_name
from latentwire.checkpoint.manager import CheckpointManager
from latentwire.errors import (
    Fenced,
)
from latentwire.run.directory import Attempt, Run


class Split:
    """A run whose old attempt still saves when a new one, on another node, takes over."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.old = run.claim_attempt("1", "local")
        self.new: Attempt | None = None

    def take_over(self) -> CheckpointManager:
        self.new = self.run.claim_attempt("2", "local")
        manager = open_manager(self.run.checkpoints, self.new.number, self.new.assert_newest)
        manager.sweep()
        return manager

    def take_over_at(self, call: int, before: bool) -> Callable[[], None]:
        """The old attempt's fence, at whose n-th call the new attempt appears: right before it looks, or after."""
        calls: list[int] = []

        def fence() -> None:
            calls.append(len(calls) + 1)
            if before and len(calls) == call:
                self.take_over()
            self.old.assert_newest()
            if not before and len(calls) == call:
                self.take_over()

        return fence


BEFORE_WRITING, BEFORE_THE_RENAME = 1, 2


@pytest.mark.parametrize("call", [BEFORE_WRITING, BEFORE_THE_RENAME])
@pytest.mark.parametrize("before", [True, False], ids=["before the look", "after the look"])
def test_a_superseded_attempt_commits_nothing(run: Run, call: int, before: bool) -> None:
    split, events = Split(run), Events()
    stale = open_manager(run.checkpoints, split.old.number, split.take_over_at(call, before), events)
    stale.save(snapshot(1))
    with pytest.raises(Fenced, match="superseded by attempt 2"):
        stale.close()
    assert os.listdir(run.checkpoints) == []
    assert events.named("save_committed") == []


def test_a_superseded_attempt_prunes_nothing(run: Run) -> None:
    split = Split(run)
    stale = open_manager(
        run.checkpoints, split.old.number, split.take_over_at(3, before=True), keep=1, best_metric=None
    )
    commit(open_manager(run.checkpoints), 1)
    stale.save(snapshot(2))
    with pytest.raises(Fenced):
        stale.close()
    assert committed_steps(stale) == [1, 2], "committed before the other appeared, and whole"
    assert_sound(run.checkpoints / step_name(2))


def test_a_superseded_attempt_quarantines_nothing(run: Run) -> None:
    split = Split(run)
    stale = open_manager(run.checkpoints, split.old.number, split.old.assert_newest)
    commit(stale, 1)
    new = split.take_over()
    cut(run.checkpoints / step_name(1) / layout.STATE)
    with pytest.raises(Fenced):
        stale.restore()
    assert committed_steps(new) == [1]


def test_a_rename_in_the_midst_of_the_sweep_shows_nothing_torn(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stale writer had looked at the fence, and renames while the new attempt is removing its files."""
    old = open_manager(run.checkpoints, token=1)
    commit(old, 1)
    hidden = run.checkpoints / f"{layout.SAVING_PREFIX}0001-00000002"
    final = run.checkpoints / step_name(2)
    shutil.copytree(run.checkpoints / step_name(1), hidden)
    remove_tree = shutil.rmtree

    def interrupted(path: Path, ignore_errors: bool = False) -> None:
        next(path.glob("*.safetensors")).unlink()
        if hidden.exists():
            hidden.rename(final)
        remove_tree(path, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    new = next_attempt(run.checkpoints)
    assert committed_steps(new) == [1]
    assert sorted(os.listdir(run.checkpoints)) == [step_name(1)]


def test_a_sweep_leaves_what_newer_attempts_are_writing(folder: Path) -> None:
    manager = open_manager(folder, token=2)
    mine, newer, older = (folder / f"{layout.SAVING_PREFIX}{token:04d}-00000001" for token in (2, 3, 1))
    for path in (mine, newer, older):
        path.mkdir()
    manager.sweep()
    assert sorted(folder.iterdir()) == [mine, newer]


def test_two_managers_on_one_folder_leave_whole_checkpoints(folder: Path) -> None:
    """Without a fence between them, as two nodes may be for a moment."""
    managers = [open_manager(folder, token, threads=2) for token in (1, 2)]
    for step in (1, 2, 3):
        for manager in managers:
            manager.save(snapshot(step))
    for manager in managers:
        manager.wait()
    assert {1, 2, 3} >= set(committed_steps(managers[0])) >= {2, 3}
    for path in managers[0].committed():
        assert_sound(path)


def test_two_ranks_that_meet_a_damaged_checkpoint_take_the_same_older_one(
    manager: CheckpointManager, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(manager, 1, 2)
    cut(folder / step_name(2) / layout.STATE)
    first, second = next_attempt(folder), next_attempt(folder)
    rename = os.rename

    def overtaken(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        assert_holds(second.restore(), snapshot(1))
        rename(source, target)

    monkeypatch.setattr(os, "rename", overtaken)
    assert_holds(first.restore(), snapshot(1))
    assert len(os.listdir(folder / layout.QUARANTINE)) == 1
