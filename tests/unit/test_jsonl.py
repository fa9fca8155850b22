"""JSON lines files as a stream."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import latentwire
from latentwire.errors import WorkloadError

TEXT = '{"a": 1}\n\n  {"a": "é\\n"}  \n{"a": null}\r\n'


def write(folder: Path, text: str, name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def test_objects_come_in_order_and_reading_goes_on_at_any_offset_that_was_given(tmp_path: Path) -> None:
    files = latentwire.JsonlShards([write(tmp_path, TEXT)])
    (shard,) = files.shards
    found = list(files.read(shard, 0))
    assert [row for row, _ in found] == [{"a": 1}, {"a": "é\n"}, {"a": None}]
    assert found[-1][1] == len(TEXT.encode())
    for number, (_, offset) in enumerate(found):
        assert list(files.read(shard, offset)) == found[number + 1 :]


@given(st.lists(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=5)), max_size=6))
def test_what_was_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_text(text, encoding="utf-8", newline="")
    files = latentwire.JsonlShards([path])
    assert [row for row, _ in files.read(str(path), 0)] == rows


def test_the_last_line_needs_no_end_if_it_is_whole(tmp_path: Path) -> None:
    path = write(tmp_path, '{"a": 1}\n{"a": 2}')
    files = latentwire.JsonlShards([path])
    found = list(files.read(str(path), 0))
    assert [row for row, _ in found] == [{"a": 1}, {"a": 2}]
    assert list(files.read(str(path), found[-1][1])) == []


def test_the_order_of_the_paths_does_not_count(tmp_path: Path) -> None:
    paths = [write(tmp_path, TEXT, name) for name in ("b.jsonl", "a.jsonl", "c.jsonl")]
    assert latentwire.JsonlShards(paths).shards == latentwire.JsonlShards(map(str, reversed(paths))).shards
    assert isinstance(latentwire.JsonlShards(paths), latentwire.ShardedSource)


@pytest.mark.parametrize(
    ("text", "offset", "said"),
    [
        ('{"a": 1}\n{"a": \n{"a": 2}\n', 0, "byte 9: no JSON"),
        ('{"a": 1}\n{"a": 2', 0, "byte 9: the last line is cut off"),
        ('{"a": 1}\n[1]\n', 0, "byte 9: a JSON object was expected"),
        ('{"a": 1}\n\xff\n'.encode("latin-1"), 0, "byte 9: no JSON"),
        ('{"a": 1}\n' + "[" * 100_000 + "\n", 0, "byte 9: no JSON"),
        ('{"a": 1}\n', 4, "byte 4: no line begins here"),
        ('{"a": 1}\n', 99, "byte 99: no line begins here"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, text: str | bytes, offset: int, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(WorkloadError, match=f"^{path}, {said}"):
        list(latentwire.JsonlShards([path]).read(str(path), offset))


def test_a_file_that_is_gone_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, TEXT)
    files = latentwire.JsonlShards([path])
    path.unlink()
    with pytest.raises(WorkloadError, match=f"^{path}, byte 0: No such file"):
        next(files.read(str(path), 0))


def test_files_that_cannot_be_a_stream_are_refused(tmp_path: Path) -> None:
    path, packed = write(tmp_path, TEXT), tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(TEXT.encode()))
    for paths, said in (
        ([], "does a pattern match nothing"),
        ([path, str(path)], f"{path} is given 2 times"),
        ([path, packed], f"{packed} is compressed.*gunzip"),
        ([tmp_path / "b.jsonl"], "b.jsonl is no file"),
        ([tmp_path], "is no file"),
    ):
        with pytest.raises(WorkloadError, match=said):
            latentwire.JsonlShards(paths)
