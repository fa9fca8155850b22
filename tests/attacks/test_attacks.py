"""Hostile checkpoints: each is refused for what it is, within a bound of memory and processor time.

Every attack is on the newer of two checkpoints, with digests that are right wherever the attacker can make them so. The
reader is a process of its own with little memory (reading_server.py); it has to move the attack to quarantine and take
the older one.
"""

from __future__ import annotations

import functools
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_parts import digest_of, rewrite_manifest

from latentwire.checkpoint import bounded, layout
from latentwire.checkpoint.layout import step_name
from latentwire.checkpoint.tensor_file import MAX_TENSORS

MODEL = "model-00001-of-00002.safetensors"
MAX_RSS_KIB = 512 << 10

BOMB_BYTES = layout.MAX_MANIFEST_BYTES

Restore = Callable[[Path], dict[str, Any]]


def assert_refused(restore: Restore, folder: Path, reason: str) -> None:
    """In bounds, for that reason, and the older checkpoint is taken."""
    outcome = restore(folder)
    assert outcome.get("step") == 1, outcome
    assert outcome["sound"]
    [told] = outcome["quarantined"]
    assert reason in told
    assert len(told) < 1000, "what is said of an attack is not one itself"
    assert outcome["rss_kib"] < MAX_RSS_KIB
    print(f"\nrefused in {outcome['cpu_s']:.2f} s of processor time, {outcome['rss_kib'] >> 10} MB: {told[-100:]!r}")


def test_without_an_attack_the_newest_is_taken(restore: Restore, folder: Path) -> None:
    outcome = restore(folder)
    assert (outcome["step"], outcome["quarantined"], outcome["sound"]) == (2, [], True)


# ---- Names -----------------------------------------------------------------------------------------------------------

NAMES = ["../x", "/etc/passwd", "..", ".hidden", "sub/x", layout.VERIFIED, "\u00e4", "\uff41", "x\u202etxt", "x" * 201]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("place", ["files", "groups", "sums"])
def test_a_name_that_leaves_the_folder_or_deceives(restore: Restore, folder: Path, name: str, place: str) -> None:
    (folder / "x").write_bytes(b"outside")
    record = digest_of(folder / "x")

    def lure(tree: dict[str, Any]) -> None:
        if place != "sums":
            tree["files"][name] = {"bytes": record.num_bytes, "sha256": record.sha256}
        if place == "groups":
            tree["groups"]["model"].append(name)

    rewrite_manifest(folder / step_name(2), lure)
    sums = folder / step_name(2) / layout.SUMS
    if place == "sums":
        sums.write_text(f"{sums.read_text()}{record.sha256}  {name}\n")
    else:
        sums.write_text("".join(line for line in sums.read_text().splitlines(True) if not line.endswith(f"  {name}\n")))
    assert_refused(restore, folder, "only plain names")
    assert (folder / "x").read_bytes() == b"outside"


def test_a_file_that_is_listed_twice(restore: Restore, folder: Path) -> None:
    sums = folder / step_name(2) / layout.SUMS
    sums.write_text(f"{sums.read_text()}{'0' * 64}  {MODEL}\n")
    assert_refused(restore, folder, f"lists {MODEL} twice")


@pytest.mark.parametrize("group", ["model", "other"])
def test_a_file_that_is_to_be_decoded_a_hundred_thousand_times(restore: Restore, folder: Path, group: str) -> None:
    rewrite_manifest(folder / step_name(2), lambda tree: tree["groups"].update({group: [MODEL] * 100_000}))
    assert_refused(restore, folder, "lists a file twice")


def test_a_tensor_that_two_files_hold(restore: Restore, folder: Path) -> None:
    path = folder / step_name(2)
    other = path / "model-00002-of-00002.safetensors"
    forge(other, (path / MODEL).read_bytes())
    assert_refused(restore, folder, "that another file of 'model' holds too")


# ---- Not files -------------------------------------------------------------------------------------------------------


def link(path: Path) -> None:
    path.symlink_to(path.rename(path.parents[2] / "outside"))


def endless_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def device(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a device")
    path.unlink()
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # the endless zeros
    except PermissionError as error:
        pytest.skip(f"no device can be made here: {error}")


@pytest.mark.parametrize("name", [layout.MANIFEST, layout.SUMS, layout.STATE, layout.VERIFIED, MODEL])
@pytest.mark.parametrize("replace", [link, endless_link, pipe, directory, device])
def test_what_is_no_plain_file(restore: Restore, folder: Path, replace: Callable[[Path], None], name: str) -> None:
    path = folder / step_name(2) / name
    replace(path)
    assert_refused(restore, folder, "is a link" if path.is_symlink() else "is no plain file")


def test_a_checkpoint_that_is_a_link_out_of_the_folder(restore: Restore, folder: Path) -> None:
    path = folder / step_name(2)
    outside = path.rename(folder.parent / "outside")
    path.symlink_to(outside)
    assert_refused(restore, folder, "is a link")
    assert (outside / layout.MANIFEST).exists()


def test_a_folder_of_very_many_files(restore: Restore, folder: Path) -> None:
    for number in range(2 * layout.MAX_FILES + 1):
        (folder / step_name(2) / f"extra-{number}").touch()
    assert_refused(restore, folder, "more files")


# ---- Claims ----------------------------------------------------------------------------------------------------------


def claim(path: Path, num_bytes: int) -> None:
    """A file with a hole of that size, as large as this file system can have it, listed with any digest."""
    with open(path, "r+b") as file:
        file.truncate(num_bytes)
    forged = {"bytes": num_bytes, "sha256": "0" * 64}
    rewrite_manifest(path.parent, lambda tree: tree["files"].update({path.name: forged}))


@pytest.mark.parametrize("num_bytes", [200 << 20, 1 << 40])
def test_a_hole_that_claims_more_than_the_run_can_have(restore: Restore, folder: Path, num_bytes: int) -> None:
    claim(folder / step_name(2) / MODEL, num_bytes)
    assert_refused(restore, folder, "that can be its run's")


@pytest.mark.parametrize("num_bytes", [1 << 50, 1 << 62, 1 << 63, 1 << 70, -1, 1.0, True, "1"])
def test_a_size_that_the_file_does_not_have(restore: Restore, folder: Path, num_bytes: Any) -> None:
    rewrite_manifest(folder / step_name(2), lambda tree: tree["files"][MODEL].update(bytes=num_bytes))
    assert_refused(restore, folder, "checkpoints")


@pytest.mark.parametrize("name", [layout.MANIFEST, layout.SUMS])
def test_a_hole_in_place_of_a_small_file(restore: Restore, folder: Path, name: str) -> None:
    with open(folder / step_name(2) / name, "r+b") as file:
        file.truncate(1 << 40)
    assert_refused(restore, folder, "more than any that latentwire writes")


def test_a_state_larger_than_any(restore: Restore, folder: Path) -> None:
    claim(folder / step_name(2) / layout.STATE, bounded.MAX_JSON_BYTES + 1)
    assert_refused(restore, folder, "a larger state.json")


# ---- JSON ------------------------------------------------------------------------------------------------------------


def forge(path: Path, content: bytes) -> None:
    """Put other content into a file, with the right size and digest in the manifest."""
    path.write_bytes(content)
    record = digest_of(path)
    forged = {"bytes": record.num_bytes, "sha256": record.sha256}
    rewrite_manifest(path.parent, lambda tree: tree["files"].update({path.name: forged}))


def forge_manifest(path: Path, content: bytes) -> None:
    """Put other content into manifest.json, with its right digest in SHA256SUMS."""
    (path / layout.MANIFEST).write_bytes(content)
    sums = path / layout.SUMS
    others = [line for line in sums.read_text().splitlines(True) if not line.endswith(f"  {layout.MANIFEST}\n")]
    sums.write_text("".join([*others, f"{digest_of(path / layout.MANIFEST).sha256}  {layout.MANIFEST}\n"]))


def forge_header(path: Path, header: bytes, body: bytes = b"abc") -> None:
    forge(path, len(header).to_bytes(8, "little") + header + body)


@functools.cache
def many_names(size: int) -> bytes:
    """Each another, and all of them in memory before it shows that the end is missing."""
    return b"{" + b",".join(b'"%x":0' % n for n in range(size // 12))


BOMBS = {
    "deep lists": lambda size: b"[" * size,
    "deep names": lambda size: b'{"a":' * (size // 5),
    "many lists": lambda size: b"[" + b"[]," * (size // 3 - 1) + b"[]]",
    "many names": many_names,
    "one name, again and again": lambda size: b"{" + b'"a":{},' * 100_000 + b'"a":{}}',
    "a number of very many digits": lambda size: b'{"a":' + b"9" * min(size - 9, 10_000_000) + b"}",
    "a long text": lambda size: b'{"a":"' + b"x" * (size - 9),
    "not UTF-8": lambda size: b'{"\xff":1}',
    "UTF-16": lambda size: '{"a":1}'.encode("utf-16"),
    "a number": lambda size: b"1",
    "nothing": lambda size: b"",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_in_the_manifest(restore: Restore, folder: Path, bomb: str) -> None:
    forge_manifest(folder / step_name(2), BOMBS[bomb](BOMB_BYTES))
    assert_refused(restore, folder, layout.MANIFEST)


def test_a_manifest_of_64_mb(restore: Restore, folder: Path) -> None:
    forge_manifest(folder / step_name(2), b" " * (64 << 20))
    assert_refused(restore, folder, "more than any that latentwire writes")


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_in_the_state(restore: Restore, folder: Path, bomb: str) -> None:
    forge(folder / step_name(2) / layout.STATE, BOMBS[bomb](BOMB_BYTES))
    assert_refused(restore, folder, layout.STATE)


def test_a_state_of_as_many_values_as_are_read(restore: Restore, folder: Path) -> None:
    """What takes the most memory of all."""
    forge(folder / step_name(2) / layout.STATE, many_names((bounded.MAX_JSON_VALUES - 1) * 12))
    assert_refused(restore, folder, layout.STATE)


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_in_a_header(restore: Restore, folder: Path, bomb: str) -> None:
    forge_header(folder / step_name(2) / MODEL, BOMBS[bomb](BOMB_BYTES))
    assert_refused(restore, folder, MODEL)


@pytest.mark.parametrize("content", [b'{"metrics":{"eval/loss":1' + b"0" * 400 + b"}}", b"[" * 1_000_000, b"\xff"])
def test_a_bad_mark_of_verification_costs_nothing(restore: Restore, folder: Path, content: bytes) -> None:
    """It stands outside SHA256SUMS."""
    (folder / step_name(2) / layout.VERIFIED).write_bytes(content)
    outcome = restore(folder)
    assert (outcome["step"], outcome["quarantined"], outcome["sound"]) == (2, [], True)
    assert outcome["rss_kib"] < MAX_RSS_KIB


@pytest.mark.parametrize("line", [b"\n", b"\\" + b"0" * 64 + b"  x\n", b"0" * 64 + b" *x\n", b"0" * 63 + b"g  x\n"])
def test_sums_of_very_many_lines_that_are_none(restore: Restore, folder: Path, line: bytes) -> None:
    (folder / step_name(2) / layout.SUMS).write_bytes(line * (layout.MAX_MANIFEST_BYTES // len(line)))
    assert_refused(restore, folder, layout.SUMS)


# ---- Tensors ---------------------------------------------------------------------------------------------------------


def entry(dtype: Any = "U8", shape: Any = (3,), offsets: Any = (0, 3)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: dict[str, Any] = {
    "overlap": {"a": entry(shape=[2], offsets=[0, 2]), "b": entry(shape=[2], offsets=[1, 3])},
    "the same bytes twice": {"a": entry(), "b": entry()},
    "gap": {"a": entry(shape=[1], offsets=[0, 1]), "b": entry(shape=[1], offsets=[2, 3])},
    "rest": {"a": entry(shape=[2], offsets=[0, 2])},
    "beyond": {"a": entry(shape=[9], offsets=[0, 9])},
    "backwards": {"a": entry(offsets=[3, 0])},
    "before": {"a": entry(shape=[6], offsets=[-3, 3])},
    "unknown type": {"a": entry("F7")},
    "no type": {"a": entry(["U8"])},
    "wrong type": {"a": entry("F32")},
    "shape that overflows to its place": {"a": entry(shape=[2**32, 2**32 + 1, 3])},
    "empty shape that overflows": {"a": entry(), "b": entry(shape=[0, 2**62, 2**62], offsets=[3, 3])},
    "shape of very large numbers": {"a": entry(shape=[10**4000] * 1000)},
    "negative shape": {"a": entry(shape=[-1, -3])},
    "shape of fractions": {"a": entry(shape=[3.0])},
    "shape of very many dimensions": {"a": entry(shape=[1] * 100_000 + [3])},
    "very many tensors": {"a": entry()} | dict.fromkeys(map(str, range(MAX_TENSORS)), entry(shape=[0], offsets=[0, 0])),
}  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
def test_tensors_that_are_not_where_they_say(restore: Restore, folder: Path, header: str) -> None:
    forge_header(folder / step_name(2) / MODEL, json.dumps(HEADERS[header]).encode())
    assert_refused(restore, folder, "is not a safetensors file")


def test_a_header_of_a_million_tensors(restore: Restore, folder: Path) -> None:
    tensors = ",".join(f'"{n}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for n in range(1_000_000))
    forge_header(folder / step_name(2) / MODEL, f"{{{tensors}}}".encode())
    assert_refused(restore, folder, "its header claims")


def test_many_files_of_many_tensors(restore: Restore, folder: Path) -> None:
    """Each by itself is allowed."""
    path = folder / step_name(2)
    for name in (MODEL, "model-00002-of-00002.safetensors"):
        tensors = {f"{name}{n}": entry(shape=[0], offsets=[0, 0]) for n in range(MAX_TENSORS // 2 + 1)}
        forge_header(path / name, json.dumps(tensors).encode(), b"")
    assert_refused(restore, folder, f"more than {MAX_TENSORS} tensors")


@pytest.mark.parametrize("first", [b"\xff" * 8, b"\0" * 7, (2**40).to_bytes(8, "little"), b""])
def test_a_header_longer_than_its_file(restore: Restore, folder: Path, first: bytes) -> None:
    forge(folder / step_name(2) / MODEL, first)
    assert_refused(restore, folder, "its header claims")
