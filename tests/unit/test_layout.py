"""Properties of the formats: what is written reads back, and no bytes whatever upset a reader."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_parts import commit, open_manager, plain, snapshot
from hypothesis import given
from hypothesis import strategies as st

from latentwire.checkpoint import bounded, layout, reader, tensor_file
from latentwire.checkpoint.layout import FileRecord, Manifest, Snapshot
from latentwire.checkpoint.tensor_file import HostTensor
from latentwire.errors import CheckpointCorrupt, CheckpointError, CheckpointTooNew, CheckpointUnsafe
from latentwire.run.atomic import json_safe

SHA = st.binary(max_size=8).map(lambda data: hashlib.sha256(data).hexdigest())
FILE_NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,30}", fullmatch=True).filter(
    lambda name: name not in (layout.SUMS, layout.VERIFIED, layout.MANIFEST)
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, HostTensor]:
    named = {}
    for name in draw(st.sets(st.text(max_size=12).filter(lambda n: n != tensor_file.METADATA), max_size=6)):
        dtype = draw(st.sampled_from(sorted(tensor_file.DTYPE_BYTES)))
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
        num_bytes = tensor_file.DTYPE_BYTES[dtype] * math.prod(shape)
        named[name] = HostTensor(dtype, shape, memoryview(draw(st.binary(min_size=num_bytes, max_size=num_bytes))))
    return named


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    names = draw(st.sets(FILE_NAMES, max_size=5))
    records = {name: FileRecord(draw(st.integers(0, 2**60)), draw(SHA)) for name in names - {layout.STATE}}
    group_of = {name: draw(st.sampled_from(["", "model", "a/ä"])) for name in records}
    groups = {group: tuple(n for n in sorted(records) if group_of[n] == group) for group in set(group_of.values())}
    records[layout.STATE] = FileRecord(draw(st.integers(0, bounded.MAX_JSON_BYTES)), draw(SHA))
    return Manifest(
        step=draw(st.integers(0, 10**9)),
        attempt=draw(st.integers(1, 10**5)),
        created=draw(st.floats(0, 1e10)),
        version=draw(st.text(max_size=10)),
        identity=draw(st.dictionaries(st.text(max_size=8), st.text(max_size=8) | st.integers(), max_size=3)),
        metrics=draw(st.dictionaries(st.text(max_size=8), st.floats(allow_nan=False), max_size=3)),
        groups=groups,
        files=records,
    )


def encoded(named: dict[str, HostTensor]) -> bytes:
    return b"".join(bytes(piece) for piece in tensor_file.encode_tensors(named))


def with_header(header: str, body: bytes = b"") -> memoryview:
    text = header.encode("utf-8", "surrogatepass")
    return memoryview(len(text).to_bytes(8, "little") + text + body)


# ---- Round trips -----------------------------------------------------------------------------------------------------


@given(tensors())
def test_tensors_read_back(named: dict[str, HostTensor]) -> None:
    data = encoded(named)
    assert plain({"g": tensor_file.decode_tensors(memoryview(data), "here")}) == plain({"g": named})
    assert encoded(dict(reversed(named.items()))) == data, "the same tensors in another order give the same bytes"


@given(tensors())
def test_every_tensor_begins_at_a_multiple_of_its_item(named: dict[str, HostTensor]) -> None:
    data = encoded(named)
    length = int.from_bytes(data[:8], "little")
    assert (8 + length) % 8 == 0
    header = json.loads(data[8 : 8 + length])
    for name, tensor in named.items():
        assert header[name]["data_offsets"][0] % tensor_file.DTYPE_BYTES[tensor.dtype] == 0


def test_a_tensor_may_not_have_the_name_that_the_format_keeps_for_itself() -> None:
    named = {tensor_file.METADATA: HostTensor("U8", (1,), memoryview(b"x"))}
    with pytest.raises(CheckpointError, match=tensor_file.METADATA):
        encoded(named)


@given(tensors(), st.integers(1, 64), st.integers(1, 4), st.data())
def test_the_files_hold_every_tensor_once_on_one_rank_and_stay_small(
    named: dict[str, HostTensor], shard_bytes: int, world_size: int, data: st.DataObject
) -> None:
    replicated = frozenset(("model", n) for n in data.draw(st.sets(st.sampled_from(sorted(named) or [""]))) if named)
    snapshot = Snapshot(1, {"model": named, "other": named}, {}, replicated=replicated)
    files = layout.plan_files(snapshot, shard_bytes, world_size)
    assert sorted((f.group, n) for f in files for n in f.tensors) == sorted(
        (g, n) for g in snapshot.tensors for n in named
    )
    loads = [0] * world_size
    for file in files:
        assert layout.check_name(file.name, "here") == file.name
        sizes = [size for name in file.tensors if (size := tensor_file.num_bytes_of(named[name]))]
        assert file.num_bytes == sum(sizes)
        assert sum(sizes) <= shard_bytes or len(sizes) == 1
        assert file.rank == 0 or all((file.group, name) in replicated for name in file.tensors)
        loads[file.rank] += file.num_bytes
    assert max(loads[1:], default=0) <= loads[0] + max((f.num_bytes for f in files), default=0)


@given(manifests())
def test_a_manifest_reads_back(manifest: Manifest) -> None:
    assert layout.parse_manifest(manifest.to_json(), "here") == manifest


@given(st.dictionaries(FILE_NAMES, st.builds(FileRecord, st.integers(0, 9), SHA), max_size=6))
def test_sums_read_back(files: dict[str, FileRecord]) -> None:
    assert layout.parse_sums(layout.format_sums(files), "here") == {n: r.sha256 for n, r in files.items()}


@given(st.integers(0, 10**12))
def test_step_names_read_back_and_sort_as_their_steps(step: int) -> None:
    assert layout.parse_step_name(layout.step_name(step)) == step


@pytest.mark.parametrize(
    "name",
    [
        "step-1",
        "step-0000000a",
        "step-000000001",
        "step-" + "\u0660" * 8,
        ".saving-0001-00000002",
        "step-00000001.attempt-0002-9",
        "quarantine",
        "",
    ],
)
def test_other_names_are_no_steps(name: str) -> None:
    assert layout.parse_step_name(name) is None


# ---- Foreign and damaged input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/b", "..", ".", ".hidden", "", "a\nb", "a b", "x" * 201, "ä", "a\0", "-rf",
     layout.SUMS, layout.VERIFIED, 7, None],
)  # fmt: skip
def test_only_plain_names_may_be_listed(name: Any) -> None:
    with pytest.raises(CheckpointUnsafe):
        layout.check_name(name, "here")


def a_manifest() -> dict[str, Any]:
    record = FileRecord(3, "0" * 64)
    files = {layout.STATE: record, "model.safetensors": record}
    manifest = Manifest(5, 1, 1.0, "v", {"config": "x"}, {"loss": 1.0}, {"model": ("model.safetensors",)}, files)
    tree = json.loads(manifest.to_json())
    assert isinstance(tree, dict)
    return tree


def paths_in(tree: Any) -> Iterator[tuple[str | int, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (key,)
        yield from ((key, *rest) for rest in paths_in(value))


@given(st.sampled_from(sorted(paths_in(a_manifest()), key=str)), JSON)
def test_a_manifest_with_any_value_replaced_is_read_or_refused(path: tuple[str | int, ...], value: Any) -> None:
    tree = a_manifest()
    node: Any = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    read_or_refuse_manifest(json.dumps(tree))


@given(st.text() | JSON.map(json.dumps) | st.binary().map(lambda data: data.decode("utf-8", "replace")))
def test_any_text_is_refused_as_a_manifest(text: str) -> None:
    with pytest.raises(CheckpointError):
        layout.parse_manifest(text, "here")


@pytest.mark.parametrize("number", ["Infinity", "-Infinity", "NaN", "9" * 400, "9" * 5000, "1e999", "[]", "null"])
@pytest.mark.parametrize("key", ["format", "step", "attempt", "created"])
def test_numbers_that_are_none_are_refused(key: str, number: str) -> None:
    read_or_refuse_manifest(json.dumps(a_manifest() | {key: "NUMBER"}).replace('"NUMBER"', number))


def read_or_refuse_manifest(text: str) -> None:
    try:
        manifest = layout.parse_manifest(text, "here")
    except CheckpointError:
        return
    assert layout.STATE in manifest.files
    assert all(name in manifest.files for names in manifest.groups.values() for name in names)
    assert isinstance(manifest.step, int)


def test_a_newer_format_is_named_as_such_whatever_else_it_holds() -> None:
    with pytest.raises(CheckpointTooNew, match="upgrade latentwire"):
        layout.parse_manifest(json.dumps({"format": layout.FORMAT + 1, "chunks": "who knows"}), "here")


@given(st.text() | st.lists(st.tuples(SHA, st.text(max_size=5))).map(lambda rows: "\n".join(map("  ".join, rows))))
def test_any_text_as_sums_is_read_or_refused(text: str) -> None:
    try:
        sums = layout.parse_sums(text, "here")
    except CheckpointError:
        return
    assert all(layout.check_name(name, "here") == name for name in sums)


@given(st.binary(max_size=64) | JSON.map(lambda value: bytes(with_header(json.dumps(value), b"12345678"))))
def test_any_bytes_as_tensors_are_read_or_refused(data: bytes) -> None:
    read_or_refuse_tensors(memoryview(data))


@given(
    st.dictionaries(
        st.text(max_size=4),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from([*tensor_file.DTYPE_BYTES, "F7"]) | JSON,
                "shape": st.lists(st.integers(-2, 4) | JSON, max_size=3) | JSON,
                "data_offsets": st.lists(st.integers(-2, 16) | JSON, min_size=1, max_size=3) | JSON,
            }
        ),
        max_size=3,
    ),
    st.binary(max_size=16),
)
def test_any_header_is_read_or_refused(header: dict[str, Any], body: bytes) -> None:
    read_or_refuse_tensors(with_header(json.dumps(header), body))


def read_or_refuse_tensors(data: memoryview) -> None:
    try:
        named = tensor_file.decode_tensors(data, "here")
    except CheckpointError:
        return
    body = data.nbytes - 8 - int.from_bytes(data[:8], "little")
    assert sum(map(tensor_file.num_bytes_of, named.values())) == body
    for tensor in named.values():
        assert tensor.data.nbytes == tensor_file.num_bytes_of(tensor)
        assert all(size >= 0 for size in tensor.shape)


@given(JSON, JSON)
def test_a_name_that_is_there_twice_is_refused(first: Any, second: Any) -> None:
    with pytest.raises(CheckpointCorrupt, match="there twice"):
        bounded.parse_json(f'{{"a":{json.dumps(first)},"a":{json.dumps(second)}}}', "here")


@given(st.dictionaries(st.text(max_size=8), JSON, max_size=4))
def test_the_state_reads_back_as_it_was_written(values: dict[str, Any]) -> None:
    assert bounded.parse_json(bounded.encode_json(values, "here"), "here") == json_safe(values)


@pytest.mark.parametrize("values", [[0] * (bounded.MAX_JSON_VALUES + 1), "x" * bounded.MAX_JSON_BYTES])
def test_a_state_that_would_be_refused_is_not_written(values: Any) -> None:
    with pytest.raises(CheckpointError, match="into tensors"):
        bounded.encode_json(values, "here")


def test_more_tensors_than_are_read_are_not_written() -> None:
    named = dict.fromkeys(map(str, range(tensor_file.MAX_TENSORS + 1)), HostTensor("U8", (0,), memoryview(b"")))
    with pytest.raises(CheckpointError, match="more than the"):
        encoded(named)


# ---- With the digests ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    manager = open_manager(tmp_path_factory.mktemp("digests"))
    commit(manager, 1)
    manager.close()
    return manager.committed()[0]


@given(data=st.data())
def test_no_flipped_bit_and_no_cut_passes_the_digests(checkpoint: Path, data: st.DataObject) -> None:
    """Other bytes are never other tensors: not in a header, not in the data, not in the manifest or the sums."""
    path = data.draw(st.sampled_from(sorted(p for p in checkpoint.iterdir() if p.name != layout.VERIFIED)))
    sound = path.read_bytes()
    position = data.draw(st.integers(0, len(sound) - 1))
    bit = data.draw(st.none() | st.integers(0, 7))
    if bit is None:
        path.write_bytes(sound[:position])
    else:
        path.write_bytes(sound[:position] + bytes([sound[position] ^ 1 << bit]) + sound[position + 1 :])
    try:
        with pytest.raises((CheckpointCorrupt, CheckpointUnsafe)):
            reader.load(checkpoint)
        with pytest.raises((CheckpointCorrupt, CheckpointUnsafe)):
            reader.verify(checkpoint)
    finally:
        path.write_bytes(sound)
    assert plain(reader.load(checkpoint).tensors) == plain(snapshot(1).tensors)
