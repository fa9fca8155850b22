"""Bytes that rot on the disk, and what a network file system asks of a writer."""

from __future__ import annotations

import fcntl
import mmap
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_parts import assert_holds, commit, open_manager, snapshot
from fault_matrix import Matrix
from posix_disk import Close, Open, Rename
from recorder import Recorder

from latentwire.checkpoint import layout, reader
from latentwire.errors import CheckpointCorrupt, CheckpointUnsafe
from latentwire.run.directory import Run

NUM_ITEMS = 3000
"""Of each tensor of ``snapshot``: files of some pages."""
PAGE = 4096
PLACES = 40
"""In each file."""


def flip_a_bit(data: bytearray, choose: random.Random) -> None:
    data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)


def zero_a_page(data: bytearray, choose: random.Random) -> None:
    begin = choose.randrange(len(data)) // PAGE * PAGE
    data[begin : begin + PAGE] = bytes(len(data[begin : begin + PAGE]))


@pytest.mark.parametrize("damage", [flip_a_bit, zero_a_page])
def test_rot_at_random_places_of_every_file_is_found(
    tmp_path: Path, matrix: Matrix, damage: Callable[[bytearray, random.Random], None]
) -> None:
    """``verify`` finds each; in each file once, a new attempt takes the older checkpoint instead."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    manager = open_manager(tmp_path / "checkpoints", keep=3, shard_bytes=4 * NUM_ITEMS)
    for step in (1, 2):
        manager.save(snapshot(step, NUM_ITEMS))
        manager.wait()
    newest = manager.folder / layout.step_name(2)
    files = sorted(path for path in newest.iterdir() if path.name != layout.VERIFIED)
    assert len(files) >= 6
    times = 0
    for file in files:
        good = file.read_bytes()
        for _ in range(PLACES):
            bad = bytearray(good)
            damage(bad, choose)
            assert bad != good
            file.write_bytes(bad)
            with pytest.raises((CheckpointCorrupt, CheckpointUnsafe), match=str(newest)):
                reader.verify(newest, threads=1)
            times += 1
        assert_holds(manager.restore(), snapshot(1, NUM_ITEMS))
        [bad_copy] = (manager.folder / layout.QUARANTINE).iterdir()
        bad_copy.rename(newest)
        file.write_bytes(good)
    reader.verify(newest)
    manager.close()
    matrix.count(f"{damage.__name__.replace('_', ' ')}, all found", "written into the files", times)


def test_rot_in_the_mark_of_verification_harms_nothing(tmp_path: Path, matrix: Matrix) -> None:
    """verified.json is the one file without a digest: it comes after the commit. It may cost what retention knows."""
    choose = random.Random(7)
    manager = open_manager(tmp_path / "checkpoints")
    commit(manager, 1, 2)
    mark = manager.folder / layout.step_name(2) / layout.VERIFIED
    good = mark.read_bytes()
    for _ in range(PLACES):
        bad = bytearray(good)
        choose.choice((flip_a_bit, zero_a_page))(bad, choose)
        mark.write_bytes(bad)
        assert_holds(manager.restore(), snapshot(2))
    commit(manager, 3, 4)
    assert manager.failure is None
    manager.close()
    matrix.count("rot in verified.json", "written into the file", PLACES)


def test_close_to_open_is_enough(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS gives it: what is closed is seen by who opens it later. No file is open for writing when it gets its
    visible name, and neither locks nor shared memory are used.
    """

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("locks and mmap mean nothing to another node")

    for module, name in ((fcntl, "flock"), (fcntl, "lockf"), (mmap, "mmap")):
        monkeypatch.setattr(module, name, refused)
    recorder = Recorder(run.path)
    with recorder.recording():
        attempt = run.claim_attempt(job_id="1", scheduler="local")
        manager = open_manager(run.checkpoints, attempt.number, attempt.assert_newest, threads=3)
        manager.sweep()
        manager.restore()
        commit(manager, 1, 2, 3, 4)
        manager.close()

    being_written: dict[int, str] = {}
    renames = 0
    for operation in recorder.operations:
        match operation:
            case Open(handle, path, writes=True):
                being_written[handle] = path
            case Close(handle):
                being_written.pop(handle, None)
            case Rename(source, target):
                renames += 1
                inside = [path for path in being_written.values() if path == source or path.startswith(f"{source}/")]
                assert not inside, f"{inside} was open when it became {target}"
    assert renames >= 1 + 4 + 4, "a claim, four commits, four marks"
