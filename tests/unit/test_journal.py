"""Files that are whole or absent, and journals."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_parts import NOW, Start

from latentwire.run.atomic import read_json, write_json, write_text
from latentwire.run.journal import Follower, Journal, last_record, read_journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    journal = Journal(path, clock=lambda: NOW)
    yield journal
    journal.close()


def test_a_file_is_replaced_whole_and_leaves_nothing_beside(tmp_path: Path) -> None:
    for value in ({"a": 1}, [1, 2], "π", None):
        write_json(tmp_path / "x.json", value)
        assert read_json(tmp_path / "x.json") == value
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_failed_write_leaves_the_old_file(small_disk: Path) -> None:
    write_text(small_disk / "x", "old")
    with pytest.raises(OSError, match="No space left"):
        write_text(small_disk / "x", "new" * (1 << 20))
    assert (small_disk / "x").read_text() == "old"
    assert os.listdir(small_disk) == ["x"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"\0" * 100])
def test_json_that_is_none_reads_as_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    assert read_json(tmp_path / "x") is None
    assert read_json(tmp_path / "missing") is None
    assert read_json(tmp_path / "x" / "below a file") is None


# ---- Journals --------------------------------------------------------------------------------------------------------


def test_a_journal_reads_back_in_order(journal: Journal, path: Path) -> None:
    journal.event("one", step=1, text="π\n", nothing=None)
    journal.record(step=2, loss=0.5)
    assert list(read_journal(path)) == [
        {"time": NOW, "event": "one", "step": 1, "text": "π\n", "nothing": None},
        {"time": NOW, "step": 2, "loss": 0.5},
    ]
    assert last_record(path, "loss") == {"time": NOW, "step": 2, "loss": 0.5}
    assert last_record(path, "event") == {"time": NOW, "event": "one", "step": 1, "text": "π\n", "nothing": None}
    assert last_record(path, "never") is None


def test_numbers_that_json_does_not_know_are_words(journal: Journal, path: Path) -> None:
    journal.record(a=float("nan"), b=[float("inf"), {"c": -float("inf")}], d=(1, 2))
    [record] = read_journal(path)
    assert record == {"time": NOW, "a": "nan", "b": ["inf", {"c": "-inf"}], "d": [1, 2]}


def test_a_value_that_is_not_json_does_not_stop_the_journal(journal: Journal, path: Path) -> None:
    journal.event("odd", path=Path("/x"), error=ValueError("why"), key={1: {2}})
    journal.event("next")
    assert [record["event"] for record in read_journal(path)] == ["odd", "next"]
    assert next(read_journal(path))["path"] == "/x"


def test_a_missing_journal_is_empty(path: Path) -> None:
    assert list(read_journal(path)) == []
    assert last_record(path) is None
    assert Follower(path).read() == []


@pytest.mark.parametrize("foreign", [b"{", b"\0" * 50, b"\xff\xfe", b"[1, 2]", b"7", b'{"a": 1}}', b"", b"[" * 100_000])
def test_foreign_lines_are_skipped(path: Path, foreign: bytes) -> None:
    path.write_bytes(b'{"time": 1}\n' + foreign + b'\n{"time": 2}\n')
    assert [record["time"] for record in read_journal(path)] == [1, 2]
    assert [record["time"] for record in Follower(path).read()] == [1, 2]
    assert last_record(path) == {"time": 2}


def test_the_last_record_is_found_at_the_end_of_a_large_file(path: Path) -> None:
    path.write_bytes(b'{"time": 1, "text": "' + b"x" * 200_000 + b'"}\n{"time": 2}\n{"tim')
    assert last_record(path) == {"time": 2}


def test_a_writer_killed_in_mid_line_costs_that_line(path: Path, start: Start) -> None:
    program = f"""
import os, signal
from pathlib import Path
from latentwire.run.journal import Journal
journal = Journal(Path({str(path)!r}))
journal.event("whole")
write = os.write
def die(descriptor, data):
    write(descriptor, data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
os.write = die
journal.event("torn")
"""
    assert start(program).wait() == -signal.SIGKILL
    assert not path.read_bytes().endswith(b"\n")
    follower = Follower(path)
    assert [record["event"] for record in follower.read()] == ["whole"]

    successor = Journal(path)
    successor.event("after")
    successor.close()
    assert [record["event"] for record in read_journal(path)] == ["whole", "after"]
    assert [record["event"] for record in follower.read()] == ["after"]


def test_a_follower_waits_for_the_end_of_a_line(path: Path) -> None:
    follower = Follower(path)
    with open(path, "ab", buffering=0) as file:
        file.write(b'{"a": 1}\n{"a"')
        assert follower.read() == [{"a": 1}]
        assert follower.read() == []
        file.write(b": 2}")
        assert follower.read() == []
        file.write(b"\n")
        assert follower.read() == [{"a": 2}]


def test_a_full_disk_delays_events_and_drops_records_and_says_so(small_disk: Path) -> None:
    path = small_disk / "events.jsonl"
    journal = Journal(path, clock=lambda: NOW)
    journal.event("before")
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    for step in range(200):
        journal.event("during", step=step)
        journal.record(step=step)
    assert len(list(read_journal(path))) < 200
    filler.unlink()
    journal.record(step=200)
    journal.event("after")
    journal.close()
    events = [record for record in read_journal(path) if "event" in record]
    assert [e["step"] for e in events if e["event"] == "during"] == list(range(200))
    assert [e["event"] for e in events if e["event"] != "during"] == ["before", "records_lost", "after"]
    records = [record for record in read_journal(path) if "event" not in record]
    [loss] = [event for event in events if event["event"] == "records_lost"]
    assert loss["num_records"] + len(records) == 201
    assert "No space left" in loss["reason"] or "part of a line" in loss["reason"]


def test_a_follower_reads_a_file_that_took_the_place_of_another_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    path.write_text('{"time": 1}\n{"time": 2}\n')
    follower = Follower(path)
    assert [record["time"] for record in follower.read()] == [1, 2]
    path.rename(tmp_path / "old.jsonl")
    assert follower.read() == []
    path.write_text('{"time": 3}\n')
    assert [record["time"] for record in follower.read()] == [3]


def test_a_follower_reads_a_file_that_has_become_shorter_from_its_start(path: Path) -> None:
    path.write_text('{"time": 1}\n{"time": 2}\n')
    follower = Follower(path)
    assert [record["time"] for record in follower.read()] == [1, 2]
    path.write_text('{"time": 3}\n')  # the same inode, as a new file may get it
    assert [record["time"] for record in follower.read()] == [3]
