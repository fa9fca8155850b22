"""The CheckpointManager on a real disk: what is committed comes back, what is damaged or hostile never does."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_parts import (
    BEST_STEP,
    METRIC,
    Events,
    assert_holds,
    assert_sound,
    commit,
    committed_steps,
    cut,
    digest_of,
    next_attempt,
    open_manager,
    rewrite_manifest,
    snapshot,
    tensor,
)

from latentwire.checkpoint import layout, reader, tensor_file
from latentwire.checkpoint.layout import Snapshot, step_name
from latentwire.checkpoint.manager import CheckpointManager
from latentwire.errors import (
    CheckpointError,
    CheckpointTooNew,
    NoUsableCheckpoint,
)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- Save and restore ------------------------------------------------------------------------------------------------


def test_what_is_saved_is_restored(manager: CheckpointManager, folder: Path) -> None:
    commit(manager, 7)
    loaded = next_attempt(folder).restore()
    assert_holds(loaded, snapshot(7))
    assert loaded is not None
    assert loaded.manifest.attempt == 1
    assert loaded.manifest.identity == manager.identity
    assert_sound(folder / step_name(7))


def test_a_run_without_checkpoints_starts_at_nothing(manager: CheckpointManager) -> None:
    assert manager.restore() is None
    assert manager.committed_step is None


def test_events_tell_the_story_of_a_save(manager: CheckpointManager, events: Events) -> None:
    commit(manager, 1)
    assert [event["event"] for event in events] == ["save_started", "save_committed", "save_verified"]
    assert {event["step"] for event in events} == {1}
    assert events[0]["bytes"] == snapshot(1).num_bytes
    assert manager.committed_step == 1
    assert not manager.busy


def test_a_state_without_tensors_and_with_empty_ones(manager: CheckpointManager, folder: Path) -> None:
    state = Snapshot(1, {"model": {}, "ema": {"empty": tensor("f", []), "one": tensor("q", [3])}}, {})
    manager.save(state)
    manager.wait()
    assert_holds(next_attempt(folder).restore(), state)


def test_the_background_does_not_hold_the_caller_up(folder: Path) -> None:
    may_write, is_writing = threading.Event(), threading.Event()

    def fence() -> None:
        is_writing.set()
        may_write.wait()

    manager = open_manager(folder, fence=fence)
    manager.save(snapshot(1))
    is_writing.wait()
    assert manager.busy
    assert manager.committed() == []
    may_write.set()
    manager.wait()
    assert not manager.busy
    assert committed_steps(manager) == [1]
    manager.close()


@pytest.mark.parametrize("threads", [1, 4])
def test_a_group_in_several_files_comes_back_whole(folder: Path, threads: int) -> None:
    manager = open_manager(folder, threads=threads, shard_bytes=1)
    commit(manager, 1)
    manager.close()
    names = reader.read_manifest(folder / step_name(1)).groups
    assert names["model"] == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert_holds(next_attempt(folder, threads=threads).restore(), snapshot(1))


def test_the_digest_of_the_model_is_that_of_its_file(folder: Path) -> None:
    manager = open_manager(folder, shard_bytes=1 << 20)
    commit(manager, 1)
    manager.close()
    manifest = reader.read_manifest(folder / step_name(1))
    assert manifest.group_sha256("model") == digest_of(folder / step_name(1) / "model.safetensors").sha256
    assert manifest.group_sha256("nothing") is None


def test_the_digest_of_a_divided_model_changes_with_any_of_its_files(manager: CheckpointManager, folder: Path) -> None:
    commit(manager, 1, 2)
    first, second = (reader.read_manifest(folder / step_name(step)).group_sha256("model") for step in (1, 2))
    assert first is not None
    assert len(first) == 64
    assert first != second


def test_the_files_open_with_the_safetensors_library(folder: Path) -> None:
    official = pytest.importorskip("safetensors.numpy")
    manager = open_manager(folder, shard_bytes=1 << 20)
    commit(manager, 3)
    manager.close()
    for group, expected in snapshot(3).tensors.items():
        arrays = official.load_file(folder / step_name(3) / f"{group}.safetensors")
        assert {name: (array.shape, array.tobytes()) for name, array in arrays.items()} == {
            name: (t.shape, bytes(t.data)) for name, t in expected.items()
        }


def test_the_files_of_the_safetensors_library_read_here(tmp_path: Path) -> None:
    official = pytest.importorskip("safetensors.numpy")
    numpy = pytest.importorskip("numpy")
    arrays = {"a": numpy.arange(6, dtype=numpy.int64).reshape(2, 3), "b": numpy.ones((), numpy.float16)}
    decoded = tensor_file.decode_tensors(memoryview(official.save(arrays, {"who": "the library"})), "here")
    assert {n: (t.dtype, t.shape, bytes(t.data)) for n, t in decoded.items()} == {
        "a": ("I64", (2, 3), arrays["a"].tobytes()),
        "b": ("F16", (), arrays["b"].tobytes()),
    }


# ---- Which ones stay -------------------------------------------------------------------------------------------------


def test_the_newest_and_the_best_stay(manager: CheckpointManager, events: Events) -> None:
    commit(manager, 1, 2, 3, 4, 5, 6)
    assert committed_steps(manager) == [BEST_STEP, 5, 6]
    assert [event["step"] for event in events.named("checkpoint_pruned")] == [1, 3, 4]


@pytest.mark.parametrize(
    ("options", "stay"),
    [({"best_metric": None}, [4, 5]), ({"best_mode": "max"}, [4, 5]), ({"keep": 3}, [2, 3, 4, 5]),
     ({"best_metric": "never/measured"}, [4, 5])],
)  # fmt: skip
def test_retention_follows_the_config(folder: Path, options: dict[str, Any], stay: list[int]) -> None:
    manager = open_manager(folder, **options)
    commit(manager, 1, 2, 3, 4, 5)
    manager.close()
    assert committed_steps(manager) == stay


def test_a_metric_that_is_no_number_is_never_the_best(folder: Path) -> None:
    manager = open_manager(folder)
    for step in (1, 2, 3, 4):
        state = snapshot(step)
        manager.save(Snapshot(step, state.tensors, state.values, {METRIC: float("nan") if step == 1 else 5.0 - step}))
        manager.wait()
    manager.close()
    assert committed_steps(manager) == [3, 4]


def test_nothing_is_pruned_before_the_new_one_is_verified(folder: Path) -> None:
    order = Events()
    manager = open_manager(folder, event=order, best_metric=None, keep=1)
    commit(manager, 1, 2)
    manager.close()
    story = [(event["event"], event["step"]) for event in order if event["event"] != "save_started"]
    assert story == [
        ("save_committed", 1), ("save_verified", 1),
        ("save_committed", 2), ("save_verified", 2), ("checkpoint_pruned", 1),
    ]  # fmt: skip


def test_a_save_that_reads_back_wrong_replaces_nothing(folder: Path) -> None:
    """A disk that gives back other bytes: the damaged one goes to quarantine and the older one stays."""

    def event(name: str, **fields: Any) -> None:
        events(name, **fields)
        if name == "save_committed" and fields["step"] == 2:
            flip_a_bit(folder / step_name(2) / layout.STATE)

    events = Events()
    manager = open_manager(folder, event=event, keep=1, best_metric=None)
    commit(manager, 1, 2)
    assert committed_steps(manager) == [1]
    assert [e["step"] for e in events.named("save_failed")] == [2]
    assert len(events.named("checkpoint_quarantined")) == 1
    with pytest.raises(CheckpointError, match="could not be written"):
        manager.close()


# ---- Damage ----------------------------------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def remove(path: Path) -> None:
    path.unlink()


FILES = [
    layout.MANIFEST, layout.SUMS, layout.STATE, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors",
]  # fmt: skip


def test_the_damaged_files_below_are_all_that_there_are(manager: CheckpointManager, folder: Path) -> None:
    commit(manager, 1)
    assert {path.name for path in (folder / step_name(1)).iterdir()} == {*FILES, layout.VERIFIED}


@pytest.mark.parametrize("damage", [flip_a_bit, cut, empty, lengthen, remove])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_is_quarantined_and_the_next_older_taken(
    manager: CheckpointManager, folder: Path, damage: Callable[[Path], None], name: str
) -> None:
    commit(manager, 1, 2)
    damage(folder / step_name(2) / name)
    damaged = listing(folder / step_name(2))
    events = Events()
    again = next_attempt(folder, events)
    assert_holds(again.restore(), snapshot(1))
    assert again.committed_step == 1
    assert committed_steps(again) == [1]
    [record] = events.named("checkpoint_quarantined")
    assert record["path"] == step_name(2)
    assert record["reason"]
    assert listing(Path(record["moved_to"])) == damaged, "kept as it was, for a look"

    commit(again, 2)
    assert committed_steps(again) == [1, 2]
    assert_sound(folder / step_name(2))


def test_when_all_are_damaged_nothing_starts_over_in_silence(manager: CheckpointManager, folder: Path) -> None:
    commit(manager, 1, 2)
    for step in (1, 2):
        flip_a_bit(folder / step_name(step) / layout.STATE)
    for token in (2, 3):
        with pytest.raises(NoUsableCheckpoint, match="step 0"):
            next_attempt(folder, token=token).restore()
    good = next((folder / layout.QUARANTINE).glob(f"{step_name(1)}*"))
    flip_a_bit(good / layout.STATE)
    good.rename(folder / step_name(1))
    assert_holds(next_attempt(folder, token=4).restore(), snapshot(1))


def test_a_lost_mark_of_verification_costs_nothing(manager: CheckpointManager, folder: Path) -> None:
    commit(manager, 1)
    (folder / step_name(1) / layout.VERIFIED).unlink()
    again = next_attempt(folder)
    assert_holds(again.restore(), snapshot(1))
    assert reader.is_verified(folder / step_name(1))


def test_a_plain_file_in_the_place_of_a_checkpoint_is_moved_away(manager: CheckpointManager, folder: Path) -> None:
    commit(manager, 1)
    (folder / step_name(2)).write_text("not a folder")
    assert_holds(next_attempt(folder).restore(), snapshot(1))


def test_saving_over_a_damaged_checkpoint_of_that_step_mends_it(manager: CheckpointManager, folder: Path) -> None:
    commit(manager, 1)
    cut(folder / step_name(1) / layout.STATE)
    commit(manager, 1)
    assert_sound(folder / step_name(1))
    assert len(os.listdir(folder / layout.QUARANTINE)) == 1


def test_the_same_step_twice_leaves_the_first(manager: CheckpointManager, folder: Path, events: Events) -> None:
    commit(manager, 1)
    before = listing(folder)
    commit(manager, 1)
    assert listing(folder) == before
    assert len(events.named("save_committed")) == 2
    assert events.named("save_failed") == []


# ---- Those that attempts died of -------------------------------------------------------------------------------------


def test_each_checkpoint_is_marked_before_it_is_read(manager: CheckpointManager, folder: Path) -> None:
    commit(manager, 1, 2)
    cut(folder / step_name(2) / layout.STATE)
    marks: list[tuple[str, bool]] = []
    again = next_attempt(folder)
    again.restore(attempting=lambda name: marks.append((name, (folder / name).exists())))
    assert marks == [(step_name(2), True), (step_name(1), True)]


def test_a_deadly_checkpoint_is_skipped_and_stays(manager: CheckpointManager, folder: Path) -> None:
    commit(manager, 1, 2)
    events = Events()
    again = next_attempt(folder, events)
    assert_holds(again.restore(skip={step_name(2)}), snapshot(1))
    assert [event["path"] for event in events.named("checkpoint_skipped")] == [step_name(2)]
    assert committed_steps(again) == [1, 2]


def test_a_deadly_checkpoint_is_better_than_none(manager: CheckpointManager, folder: Path) -> None:
    commit(manager, 1, 2)
    flip_a_bit(folder / step_name(1) / layout.STATE)
    assert_holds(next_attempt(folder).restore(skip={step_name(2)}), snapshot(2))


# ---- Foreign checkpoints (hostile ones: tests/attacks) ---------------------------------------------------------------


def test_a_newer_format_stops_and_is_left_in_its_place(manager: CheckpointManager, folder: Path) -> None:
    commit(manager, 1, 2)
    rewrite_manifest(folder / step_name(2), lambda tree: tree.update(format=layout.FORMAT + 1))
    before = listing(folder)
    with pytest.raises(CheckpointTooNew, match="upgrade latentwire"):
        next_attempt(folder).restore()
    assert listing(folder) == before
