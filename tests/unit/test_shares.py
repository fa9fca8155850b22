"""One checkpoint written by several ranks; files that are linked; read-backs that do not fit; how often to save."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from checkpoint_parts import (
    Events,
    assert_holds,
    assert_sound,
    commit,
    committed_steps,
    half_changed,
    open_manager,
    save_on_all,
    shared,
    snapshot,
)
from hypothesis import given
from hypothesis import strategies as st

from latentwire.checkpoint import interval, layout, reader, shares
from latentwire.checkpoint.layout import Snapshot
from latentwire.checkpoint.manager import CheckpointManager
from latentwire.errors import CheckpointError, CheckpointTorn, Fenced

WORLD_SIZE = 3


# ---- Several ranks ---------------------------------------------------------------------------------------------------


class Failing:
    """A tensor that cannot be written: the disk of its rank is full."""

    dtype, shape = "F32", (24,)

    def __init__(self, error: Exception) -> None:
        self._error = error

    def pieces(self) -> Iterator[memoryview]:
        raise self._error


def open_ranks(folder: Path, event: Callable[..., Any], **options: Any) -> list[CheckpointManager]:
    return [open_manager(folder, event=event, rank=r, world_size=WORLD_SIZE, **options) for r in range(WORLD_SIZE)]


def test_every_rank_writes_a_share_and_the_whole_is_one_checkpoint(folder: Path, events: Events) -> None:
    ranks = open_ranks(folder, events)
    shares = [set(manager.share_of(shared(snapshot(1)))) for manager in ranks]
    assert all(shares), "each rank has something to write"
    assert set.union(*shares) == shared(snapshot(1)).replicated
    assert sum(map(len, shares)) == len(shared(snapshot(1)).replicated)
    for step in (1, 2):
        save_on_all(ranks, shared(snapshot(step)))
    assert committed_steps(ranks[0]) == [1, 2]
    for path in ranks[0].committed():
        assert_sound(path)
    assert_holds(ranks[0].restore(), snapshot(2))


def test_what_is_not_replicated_is_rank_0s(folder: Path, events: Events) -> None:
    ranks = open_ranks(folder, events, shard_bytes=1000)
    partly = dataclasses.replace(shared(snapshot(1)), replicated=frozenset({("model", "head.weight")}))
    assert [manager.share_of(partly) for manager in ranks[1:]] == [[], []], "its file has another tensor too"
    save_on_all(ranks, partly)
    assert_sound(ranks[0].committed()[0])


@pytest.mark.parametrize(
    ("error", "event"),
    [(OSError(28, "No space left on device"), "save_failed"), (CheckpointTorn("changed meanwhile"), "save_torn")],
)
def test_a_share_that_fails_costs_one_save(folder: Path, events: Events, error: Exception, event: str) -> None:
    ranks = open_ranks(folder, events)
    save_on_all(ranks, shared(snapshot(1)))
    failing, views = views_with_a_failing_rank(ranks, 2, error)
    save_on_all(ranks, *views)
    assert committed_steps(ranks[0]) == [1]
    assert ranks[0].failure is not None
    [failed] = events.named(event)
    assert f"rank {failing} could not write its share" in failed["error"]
    assert str(error.args[-1]) in failed["error"]
    assert isinstance(ranks[failing].failure, type(error)), "what a rank met itself it knows"
    assert os.listdir(folder) == [layout.step_name(1)], "nothing half done stays"
    save_on_all(ranks, shared(snapshot(3)))
    assert ranks[0].failure is None
    assert_holds(ranks[0].restore(), snapshot(3))


def test_a_full_disk_of_any_rank_makes_rank_0_give_up_the_oldest(folder: Path, events: Events) -> None:
    ranks = open_ranks(folder, events, best_metric=None)
    for step in (1, 2):
        save_on_all(ranks, shared(snapshot(step)))
    _, views = views_with_a_failing_rank(ranks, 3, OSError(errno.EDQUOT, "Disk quota exceeded"))
    save_on_all(ranks, *views, may_give_up_older=True)
    assert [manager.made_room() for manager in ranks] == [True, *[False] * (WORLD_SIZE - 1)]
    assert committed_steps(ranks[0]) == [2]
    save_on_all(ranks, *views, may_give_up_older=True)
    assert not ranks[0].made_room(), "the newest stays"
    assert_holds(ranks[0].restore(), snapshot(2))


def views_with_a_failing_rank(
    ranks: Sequence[CheckpointManager], step: int, error: Exception
) -> tuple[int, list[Snapshot]]:
    """A rank other than 0, and each rank's view of the step, of which that one cannot write its share."""
    whole = shared(snapshot(step))
    failing = next(
        (r for r in range(1, WORLD_SIZE) if ("model", "head.weight") in ranks[r].share_of(whole)),
        1,
    )
    name = next(name for group, name in ranks[failing].share_of(whole) if group == "model")
    model = {**whole.tensors["model"], name: Failing(error)}
    views = [whole] * WORLD_SIZE
    views[failing] = dataclasses.replace(whole, tensors={**whole.tensors, "model": model})
    return failing, views


def test_a_rank_touches_nothing_after_its_word(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 may commit the folder as soon as it sees the last share."""
    hidden, final, replace = folder / "hidden", folder / "step", os.replace
    hidden.mkdir(parents=True)

    def replace_and_commit(source: Path, target: Path) -> None:
        replace(source, target)
        os.rename(hidden, final)

    monkeypatch.setattr(os, "replace", replace_and_commit)
    shares.tell_written(hidden, 1, {})
    assert shares.share_path(final, 1).is_file()


def test_ranks_that_track_other_states_commit_nothing(folder: Path, events: Events) -> None:
    """Rank 1 has one tensor less: nobody writes what rank 0 leaves to it."""
    ranks = open_ranks(folder, events)
    views = [shared(snapshot(1)) for _ in range(WORLD_SIZE)]
    for rank in range(1, WORLD_SIZE):
        views[rank] = shared(dataclasses.replace(views[rank], tensors={"model": views[rank].tensors["model"]}))
    save_on_all(ranks, *views)
    assert committed_steps(ranks[0]) == []
    assert "nobody wrote" in events.named("save_failed")[0]["error"]


def test_a_rank_that_cannot_read_what_rank_0_read_blames_no_checkpoint(folder: Path, events: Events) -> None:
    ranks = open_ranks(folder, events)
    save_on_all(ranks, shared(snapshot(1)))
    assert_holds(ranks[1].load_chosen(1, reader.in_host_memory), snapshot(1))
    file = next(ranks[0].committed()[0].glob("optimizer*"))
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(OSError, match="rank 0 read it whole"):
        ranks[1].load_chosen(1, reader.in_host_memory)
    assert committed_steps(ranks[0]) == [1], "not quarantined"


def test_rank_0_that_is_superseded_waits_for_nobody(folder: Path, events: Events) -> None:
    superseded = threading.Event()

    def fence() -> None:
        if superseded.is_set():
            raise Fenced("attempt 2 exists")

    leader = open_ranks(folder, events, fence=fence)[0]
    leader.save(shared(snapshot(1)))  # the other ranks never come
    while not any(name.startswith(layout.SAVING_PREFIX) for name in os.listdir(folder)):
        time.sleep(0.001)
    superseded.set()
    with pytest.raises(Fenced):
        leader.wait()
    assert os.listdir(folder) == []


# ---- Links -----------------------------------------------------------------------------------------------------------


def inodes(path: Path) -> dict[str, int]:
    return {file.name: file.stat().st_ino for file in path.glob("*.safetensors")}


def save_halves(manager: CheckpointManager, *steps: int) -> None:
    for step in steps:
        manager.save(half_changed(step))
        manager.wait()


@pytest.mark.parametrize("link", [True, False])
def test_only_equal_files_are_linked_and_only_where_asked_for(folder: Path, link: bool) -> None:
    manager = open_manager(folder, link_unchanged=link, keep=1, best_metric=None)
    save_halves(manager, 1, 2)
    first = None
    for step in (3, 4):  # the one before is pruned: its files live on
        newest = inodes(manager.committed()[-1])
        save_halves(manager, step)
        same = {name for name, inode in inodes(manager.committed()[-1]).items() if newest.get(name) == inode}
        assert same == ({name for name in newest if name.startswith("model")} if link else set())
        first = first or newest
    assert committed_steps(manager) == [4]
    assert_holds(manager.restore(), half_changed(4))


def test_a_bad_byte_in_a_linked_file_is_found_by_the_next_save_and_mended_by_the_one_after(
    folder: Path, events: Events
) -> None:
    manager = open_manager(folder, link_unchanged=True, event=events, keep=9)
    save_halves(manager, 1)
    shard = sorted(manager.committed()[0].glob("model*"))[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    save_halves(manager, 2)
    assert "other bytes than were written" in events.named("save_failed")[0]["error"]
    save_halves(manager, 3)
    assert manager.failure is None
    assert_holds(manager.restore(), half_changed(3))


# ---- A notice --------------------------------------------------------------------------------------------------------


def test_a_read_back_that_does_not_fit_is_made_good_by_the_next_attempt(folder: Path, events: Events) -> None:
    manager = open_manager(folder, event=events)
    commit(manager, 1)
    manager.leave_by(time.monotonic())
    commit(manager, 2)
    manager.close()
    assert [event["step"] for event in events.named("read_back_skipped")] == [2]
    assert [reader.is_verified(path) for path in manager.committed()] == [True, False]
    after = open_manager(folder, token=2, event=events)
    after.sweep()
    assert_holds(after.restore(), snapshot(2))
    assert all(reader.is_verified(path) for path in after.committed())


def test_a_read_back_that_fits_is_made(folder: Path, events: Events) -> None:
    manager = open_manager(folder, event=events)
    manager.leave_by(time.monotonic() + 3600)
    commit(manager, 1)
    assert reader.is_verified(manager.committed()[0])


# ---- Torn ------------------------------------------------------------------------------------------------------------


def test_a_torn_snapshot_is_never_seen_and_told(folder: Path, events: Events) -> None:
    def settle() -> None:
        raise CheckpointTorn("changed meanwhile")

    manager = open_manager(folder, event=events)
    commit(manager, 1)
    manager.save(dataclasses.replace(snapshot(2), settle=settle))
    manager.wait()
    assert isinstance(manager.failure, CheckpointTorn)
    assert [event["step"] for event in events.named("save_torn")] == [2]
    assert committed_steps(manager) == [1]
    assert os.listdir(folder) == [layout.step_name(1)]
    with pytest.raises(CheckpointError, match="changed meanwhile"):
        manager.close()


# ---- How often -------------------------------------------------------------------------------------------------------


def test_the_interval_follows_young_between_its_bounds() -> None:
    chosen = interval.choose(stall_s=2.0, busy_s=10.0, trained_s=7200.0 - interval.PRIOR_S, num_preemptions=1)
    assert chosen.seconds == pytest.approx(120.0)  # sqrt(2 * 2 * 3600)
    assert "sqrt(2 x 2.000 x 3600) = 120.0 s" in chosen.reason
    assert "held" not in chosen.reason
    assert interval.choose(0.001, 1.0, 0.0, 0).seconds == interval.SHORTEST_S
    assert interval.choose(60.0, 1.0, 1e9, 0).seconds == interval.LONGEST_S
    assert interval.choose(0.001, 600.0, 0.0, 0).seconds == 600.0 / interval.DISK_SHARE, "the disk needs a rest"


@given(*(st.floats(1e-3, 1e6) for _ in range(3)), st.integers(0, 10_000))
def test_more_preemptions_never_mean_a_longer_interval(
    stall_s: float, busy_s: float, trained_s: float, num_preemptions: int
) -> None:
    often, rarely = (
        interval.choose(stall_s, busy_s, trained_s, n).seconds for n in (num_preemptions + 1, num_preemptions)
    )
    assert interval.SHORTEST_S <= often <= rarely
