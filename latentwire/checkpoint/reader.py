"""Reading a checkpoint: every byte that is used was hashed on its way in, and nothing is executed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from latentwire.checkpoint import layout
from latentwire.checkpoint.layout import FileRecord, HostTensor, Manifest
from latentwire.errors import CheckpointCorrupt, CheckpointUnsafe
from latentwire.run.atomic import read_json
from latentwire.run.disk import naming

_CHUNK_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory. ``tensors`` are views into buffers that live as long as they do."""

    path: Path
    manifest: Manifest
    tensors: Mapping[str, Mapping[str, HostTensor]]
    values: Mapping[str, Any]


def read_manifest(path: Path) -> Manifest:
    """The manifest, checked against SHA256SUMS; the other files are not read.

    Raises:
        CheckpointCorrupt, CheckpointUnsafe, CheckpointTooNew: what is wrong with it.
        OSError: the disk refused.
    """
    sums = layout.parse_sums(_read_small(path / layout.SUMS).decode("utf-8", "replace"), str(path / layout.SUMS))
    text = _read_small(path / layout.MANIFEST)
    if hashlib.sha256(text).hexdigest() != sums.get(layout.MANIFEST):
        raise CheckpointCorrupt(f"{path / layout.MANIFEST} does not have the SHA-256 that {layout.SUMS} gives")
    manifest = layout.parse_manifest(text.decode("utf-8", "replace"), str(path / layout.MANIFEST))
    if layout.parse_step_name(path.name) not in (None, manifest.step):
        raise CheckpointCorrupt(f"{path} holds step {manifest.step}: it was renamed or copied over another")
    listed = {name: record.sha256 for name, record in manifest.files.items()}
    if listed != {name: digest for name, digest in sums.items() if name != layout.MANIFEST}:
        raise CheckpointCorrupt(f"{path / layout.SUMS} and {layout.MANIFEST} do not name the same files")
    return manifest


def verify(path: Path, threads: int = 4) -> Manifest:
    """Read every byte back and compare with the digests. Blocks for a whole read; memory stays small.

    Raises:
        CheckpointCorrupt, CheckpointUnsafe, CheckpointTooNew: what is wrong, in which file.
        OSError: the disk refused.
    """
    manifest = read_manifest(path)
    with ThreadPoolExecutor(threads, thread_name_prefix="checkpoint-verify") as pool:
        list(pool.map(lambda name: _hash_file(path / name, manifest.files[name]), manifest.files))
    return manifest


def load(path: Path, threads: int = 4) -> Loaded:
    """Read a checkpoint into memory; what is returned is exactly what was hashed.

    Raises:
        CheckpointCorrupt, CheckpointUnsafe, CheckpointTooNew: what is wrong, in which file.
        OSError: the disk refused.
    """
    manifest = read_manifest(path)
    with ThreadPoolExecutor(threads, thread_name_prefix="checkpoint-load") as pool:
        contents = dict(
            zip(
                manifest.files,
                pool.map(lambda name: _read_file(path / name, manifest.files[name]), manifest.files),
                strict=True,
            )
        )
    tensors: dict[str, dict[str, HostTensor]] = {}
    for group, names in manifest.groups.items():
        tensors[group] = {}
        for name in names:
            tensors[group] |= layout.decode_tensors(contents[name], str(path / name))
    try:
        values = json.loads(bytes(contents[layout.STATE]))
    except (ValueError, RecursionError) as error:
        raise CheckpointCorrupt(f"{path / layout.STATE} is not JSON: {error}") from None
    return Loaded(path, manifest, tensors, values)


def read_metrics(path: Path) -> dict[str, float]:
    """What was measured with the checkpoint's weights, before its commit or after.

    Raises:
        CheckpointCorrupt, CheckpointUnsafe, CheckpointTooNew: as ``read_manifest``.
        OSError: the disk refused.
    """
    metrics = dict(read_manifest(path).metrics)
    added = read_json(path / layout.VERIFIED)
    later = added.get("metrics") if isinstance(added, dict) else None
    if isinstance(later, dict):
        metrics |= {str(name): float(value) for name, value in later.items() if isinstance(value, int | float)}
    return metrics


def is_verified(path: Path) -> bool:
    """Whether the checkpoint was read back after it was written."""
    return (path / layout.VERIFIED).is_file()


def _hash_file(path: Path, expected: FileRecord) -> None:
    digest = hashlib.sha256()
    descriptor = _open(path, expected.num_bytes)
    with naming(path), open(descriptor, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    _compare(path, digest.hexdigest(), expected)


def _read_file(path: Path, expected: FileRecord) -> memoryview:
    descriptor = _open(path, expected.num_bytes)
    view = memoryview(bytearray(expected.num_bytes))
    digest = hashlib.sha256()
    position = 0
    with naming(path), open(descriptor, "rb", buffering=0) as file:
        while position < view.nbytes:
            count = file.readinto(view[position : position + _CHUNK_BYTES])
            if not count:
                raise CheckpointCorrupt(f"{path} ends after {position} of {view.nbytes} bytes")
            digest.update(view[position : position + count])
            position += count
    _compare(path, digest.hexdigest(), expected)
    return view


def _compare(path: Path, digest: str, expected: FileRecord) -> None:
    if digest != expected.sha256:
        raise CheckpointCorrupt(f"{path} has SHA-256 {digest[:16]}..., was committed with {expected.sha256[:16]}...")


def _open(path: Path, num_bytes: int) -> int:
    """A descriptor of a plain file of exactly that size; links are refused, they can lead anywhere."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointCorrupt(f"{path} is missing") from None
    except OSError as error:
        if path.is_symlink():
            raise CheckpointUnsafe(f"{path} is a link; a checkpoint holds plain files only") from None
        raise error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size != num_bytes:
        os.close(descriptor)
        raise CheckpointCorrupt(f"{path} has {status.st_size} bytes, was committed with {num_bytes}")
    return descriptor


def _read_small(path: Path) -> bytes:
    try:
        size = os.lstat(path).st_size
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointCorrupt(f"{path} is missing") from None
    if size > layout.MAX_JSON_BYTES:
        raise CheckpointCorrupt(f"{path} has {size} bytes, more than any that latentwire writes")
    with naming(path), open(_open(path, size), "rb") as file:
        return file.read()
