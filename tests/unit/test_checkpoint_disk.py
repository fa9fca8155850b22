"""Disks that are full, and what the saving thread runs into: told, and never a checkpoint lost."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from checkpoint_parts import (
    BEST_STEP,
    Events,
    assert_holds,
    commit,
    committed_steps,
    open_manager,
    plain,
    snapshot,
    tensor,
)

from latentwire.checkpoint import layout
from latentwire.checkpoint.layout import Snapshot, step_name
from latentwire.checkpoint.manager import CheckpointManager
from latentwire.errors import (
    CheckpointError,
    NoSpace,
)


def test_a_full_disk_costs_one_save(small_disk: Path) -> None:
    events = Events()
    manager = open_manager(small_disk / "checkpoints", event=events)
    manager.save(large(1))
    manager.wait()
    filler = small_disk / "filler"
    fill(filler)

    manager.save(large(2))
    manager.wait()
    [failure] = events.named("save_failed")
    assert (failure["step"], failure["errno"]) == (2, "ENOSPC")
    assert manager.failure is not None
    assert manager.committed_step == 1
    assert os.listdir(manager.folder) == [step_name(1)], "no half-written remains take up the space"
    assert_holds(open_manager(manager.folder, 2).restore(), large(1))

    filler.unlink()
    manager.save(large(3))
    manager.wait()
    assert manager.failure is None
    assert_holds(open_manager(manager.folder, 2).restore(), large(3))
    manager.close()


def test_a_last_save_that_failed_is_told_at_the_end(small_disk: Path) -> None:
    manager = open_manager(small_disk / "checkpoints")
    manager.save(large(1))
    manager.wait()
    fill(small_disk / "filler")
    manager.save(large(2))
    with pytest.raises(CheckpointError, match=r"No space left on device; free some space there.*Step 1 is the newest"):
        manager.close()


def test_older_checkpoints_make_room_for_one_that_nobody_could_make_later(small_disk: Path) -> None:
    events = Events()
    manager = open_with_three(small_disk, best_metric=None, event=events)
    fill(small_disk / "filler")

    manager.save(third(4))
    assert not manager.made_room(), "an ordinary save can be made later"
    assert committed_steps(manager) == [1, 2, 3]

    manager.save(third(4), may_give_up_older=True)
    assert manager.made_room()
    assert committed_steps(manager) == [2, 3]
    manager.save(third(4), may_give_up_older=True)
    assert not manager.made_room(), "it fitted"
    manager.close()
    assert [event["step"] for event in events.named("checkpoint_given_up")] == [1]
    assert_holds(open_manager(manager.folder, 2).restore(), third(4))


def test_the_newest_and_the_best_make_no_room(small_disk: Path) -> None:
    manager = open_with_three(small_disk)
    made_room = []
    for number in range(3):
        fill(small_disk / f"filler-{number}")  # another program takes what was freed
        manager.save(third(4), may_give_up_older=True)
        made_room.append(manager.made_room())
    assert made_room == [True, False, False]
    assert committed_steps(manager) == [BEST_STEP, 3]


def open_with_three(disk: Path, **options: Any) -> CheckpointManager:
    """With checkpoints of steps 1, 2 and 3, all of which retention keeps."""
    manager = open_manager(disk / "checkpoints", keep=3, **options)
    for step in (1, 2, 3):
        manager.save(third(step))
        manager.wait()
    assert committed_steps(manager) == [1, 2, 3]
    return manager


def third(step: int) -> Snapshot:
    """Of which the disk has room for three and a filler."""
    return snapshot(step, num_items=15_000)


def large(step: int) -> Snapshot:
    return snapshot(step, num_items=30_000)


def fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)


def test_too_little_space_is_refused_with_figures(small_disk: Path) -> None:
    manager = open_manager(small_disk / "checkpoints")
    manager.check_space(1 << 19)
    with pytest.raises(NoSpace, match=r"needs about 2\.1 MB and .* has 1\.\d MB free"):
        manager.check_space(1 << 21)


def test_what_the_background_ran_into_surfaces_at_the_next_poll_save_and_close(folder: Path) -> None:
    def broken() -> CheckpointManager:
        manager = open_manager(folder)
        manager.save(Snapshot(1, {}, {"value": object()}))
        return manager

    manager = broken()
    while manager.busy:
        threading.Event().wait(0.001)
    with pytest.raises(TypeError, match="not JSON serializable"):
        manager.poll()
    with pytest.raises(TypeError, match="not JSON serializable"):
        broken().save(snapshot(2))
    with pytest.raises(TypeError, match="not JSON serializable"):
        broken().close()
    assert os.listdir(folder) == []


@pytest.mark.parametrize("group", ["modèle", "../x", ".hidden", "a b", ""])
def test_a_group_that_could_not_be_read_back_is_not_written(folder: Path, group: str) -> None:
    manager = open_manager(folder)
    manager.save(Snapshot(1, {group: {"w": tensor("f", [1.0])}}, {}))
    with pytest.raises(CheckpointError, match="name"):
        manager.close()
    assert os.listdir(folder) == []


def test_equal_snapshots_give_equal_files(folder: Path) -> None:
    """Else the digest of the weights would say nothing about the weights."""
    digests = []
    for name in ("a", "b"):
        manager = open_manager(folder / name)
        commit(manager, 1)
        manager.close()
        digests.append(json.loads((folder / name / step_name(1) / layout.MANIFEST).read_text())["files"])
    assert digests[0] == digests[1]
    assert plain(snapshot(1).tensors) == plain(snapshot(1).tensors)
