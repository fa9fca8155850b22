"""Reading a checkpoint: every byte that is used was hashed on its way in, and nothing is executed."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import stat
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from latentwire.checkpoint import bounded, layout, tensor_file
from latentwire.checkpoint.layout import FileRecord, Manifest
from latentwire.checkpoint.tensor_file import Destination, HostTensor, Span
from latentwire.errors import CheckpointCorrupt, CheckpointUnsafe
from latentwire.run.disk import naming

_CHUNK_BYTES = 8 << 20

Place = Callable[[str, Span], Destination]
"""Where a group's tensor is to be read to. It may be asked twice for one, and for such as the caller does not know."""


class Interrupted(Exception):
    """There was no time to read to the end."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory: every tensor is where ``place`` said, by default a ``HostTensor`` of its own."""

    path: Path
    manifest: Manifest
    tensors: Mapping[str, Mapping[str, Any]]
    values: Mapping[str, Any]


def in_host_memory(group: str, span: Span) -> HostTensor:
    """The ``Place`` of those who just want to look."""
    return HostTensor.empty(span.dtype, span.shape)


def read_manifest(path: Path) -> Manifest:
    """The manifest, checked against SHA256SUMS; the other files are not read.

    Raises:
        CheckpointCorrupt, CheckpointUnsafe, CheckpointTooNew: what is wrong with it.
        OSError: the disk refused.
    """
    _look_round(path)
    listing = _read_small(path / layout.SUMS, layout.MAX_MANIFEST_BYTES).decode("utf-8", "replace")
    sums = layout.parse_sums(listing, str(path / layout.SUMS))
    text = _read_small(path / layout.MANIFEST, layout.MAX_MANIFEST_BYTES)
    if hashlib.sha256(text).hexdigest() != sums.get(layout.MANIFEST):
        raise CheckpointCorrupt(f"{path / layout.MANIFEST} does not have the SHA-256 that {layout.SUMS} gives")
    manifest = layout.parse_manifest(text.decode("utf-8", "replace"), str(path / layout.MANIFEST))
    if layout.parse_step_name(path.name) not in (None, manifest.step):
        raise CheckpointCorrupt(f"{path} holds step {manifest.step}: it was renamed or copied over another")
    listed = {name: record.sha256 for name, record in manifest.files.items()}
    if listed != {name: digest for name, digest in sums.items() if name != layout.MANIFEST}:
        raise CheckpointCorrupt(f"{path / layout.SUMS} and {layout.MANIFEST} do not name the same files")
    return manifest


def verify(path: Path, threads: int = 4, in_time: Callable[[], bool] = lambda: True) -> Manifest:
    """Read every byte back and compare with the digests. Blocks for a whole read; memory stays small.

    Args:
        path: the checkpoint.
        threads: files read side by side.
        in_time: asked every few megabytes.

    Raises:
        CheckpointCorrupt, CheckpointUnsafe, CheckpointTooNew: what is wrong, in which file.
        Interrupted: it was not in time.
        OSError: the disk refused.
    """
    manifest = read_manifest(path)
    with ThreadPoolExecutor(threads, thread_name_prefix="checkpoint-verify") as pool:
        for _ in pool.map(
            lambda name: _hash_file(path / name, manifest.files[name], in_time), _largest_first(manifest)
        ):
            pass
    return manifest


def load(path: Path, threads: int = 4, place: Place = in_host_memory, max_bytes: int | None = None) -> Loaded:
    """Read a checkpoint straight to where its tensors belong; every byte is hashed on its way. Blocks.

    Where this raises, what ``place`` gave may be half overwritten.

    Args:
        path: the checkpoint.
        threads: files read side by side.
        place: where each tensor is to be.
        max_bytes: one that claims more is refused unread: a file with holes claims terabytes and costs nothing.

    Raises:
        CheckpointCorrupt, CheckpointUnsafe, CheckpointTooNew: what is wrong, in which file.
        OSError: the disk refused.
    """
    manifest = read_manifest(path)
    if max_bytes is not None and manifest.num_bytes > max_bytes:
        raise CheckpointUnsafe(
            f"{path} claims {manifest.num_bytes} bytes, of at most {max_bytes} that can be its run's"
        )
    files = [(group, name) for group, names in manifest.groups.items() for name in names]
    files.sort(key=lambda file: -manifest.files[file[1]].num_bytes)

    def read(file: tuple[str, str]) -> dict[str, Destination]:
        group, name = file
        return _read_tensors(path / name, manifest.files[name], lambda span: place(group, span))

    tensors: dict[str, dict[str, Any]] = {group: {} for group in manifest.groups}
    with ThreadPoolExecutor(threads, thread_name_prefix="checkpoint-load") as pool:
        for (group, name), found in zip(files, pool.map(read, files), strict=True):
            _add(tensors, group, found, path / name)
    return Loaded(path, manifest, tensors, read_values(path, manifest))


def read_values(path: Path, manifest: Manifest) -> dict[str, Any]:
    """What the checkpoint holds besides tensors.

    Raises:
        CheckpointCorrupt, CheckpointUnsafe: state.json is not as it was committed.
        OSError: the disk refused.
    """
    text = _read_small(path / layout.STATE, bounded.MAX_JSON_BYTES)
    _compare(path / layout.STATE, hashlib.sha256(text).hexdigest(), manifest.files[layout.STATE])
    values = bounded.parse_json(text, str(path / layout.STATE))
    if not isinstance(values, dict):
        raise CheckpointCorrupt(f"{path / layout.STATE} holds no names")
    return values


def _largest_first(manifest: Manifest) -> list[str]:
    return sorted(manifest.files, key=lambda name: -manifest.files[name].num_bytes)


def _add(tensors: dict[str, dict[str, Any]], group: str, found: dict[str, Destination], path: Path) -> None:
    if tensors[group].keys() & found.keys():
        raise CheckpointCorrupt(f"{path} holds a tensor that another file of {group!r:.100} holds too")
    tensors[group] |= found
    if sum(map(len, tensors.values())) > tensor_file.MAX_TENSORS:
        raise CheckpointCorrupt(f"{path.parent} holds more than {tensor_file.MAX_TENSORS} tensors")


def read_metrics(path: Path) -> dict[str, float]:
    """What was measured with the checkpoint's weights, before its commit or after.

    Raises:
        CheckpointCorrupt, CheckpointUnsafe, CheckpointTooNew: as ``read_manifest``.
        OSError: the disk refused.
    """
    metrics = dict(read_manifest(path).metrics)
    added = _read_mark(path / layout.VERIFIED)
    later = added.get("metrics") if isinstance(added, dict) else None
    if isinstance(later, dict):
        numbers = {name: value for name, value in later.items() if isinstance(value, int | float)}
        metrics |= {name: float(value) for name, value in numbers.items() if abs(value) <= sys.float_info.max}
    return metrics


def _read_mark(path: Path) -> Any:
    """verified.json, or None: it stands outside SHA256SUMS, and lost or damaged it costs nothing."""
    try:
        return bounded.parse_json(_read_small(path, layout.MAX_MANIFEST_BYTES), str(path))
    except CheckpointCorrupt:
        return None


def is_verified(path: Path) -> bool:
    """Whether the checkpoint was read back after it was written."""
    return (path / layout.VERIFIED).is_file()


def _look_round(path: Path) -> None:
    """Refuse a folder that holds anything but plain files, before one is opened: to open a device may do harm."""
    if path.is_symlink() and layout.parse_step_name(path.name) is not None:
        raise CheckpointUnsafe(f"{path} is a link; a checkpoint is a folder of its own")
    try:
        with os.scandir(path) as entries:
            for number, entry in enumerate(entries):
                if number > 2 * layout.MAX_FILES:
                    raise CheckpointUnsafe(f"{path} holds more files than latentwire ever writes")
                if not entry.is_file(follow_symlinks=False):
                    kind = "a link" if entry.is_symlink() else "no plain file"
                    raise CheckpointUnsafe(f"{entry.path} is {kind}; a checkpoint holds plain files only")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointCorrupt(f"{path} is no folder, or gone") from None


def _hash_file(path: Path, expected: FileRecord, in_time: Callable[[], bool] = lambda: True) -> None:
    digest = hashlib.sha256()
    with naming(path), open(_open(path, expected.num_bytes), "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if not in_time():
                raise Interrupted(path)
    _compare(path, digest.hexdigest(), expected)


def _read_tensors(path: Path, expected: FileRecord, place: Callable[[Span], Destination]) -> dict[str, Destination]:
    """The tensors of a file. Its header is used before the digest is known, so that it may be a hostile one."""
    digest = hashlib.sha256()
    tensors = {}
    with naming(path), open(_open(path, expected.num_bytes), "rb", buffering=0) as file:
        first = bytearray(min(8, expected.num_bytes))
        _read_into(file, path, memoryview(first), digest)
        header = bytearray(tensor_file.header_bytes(bytes(first), expected.num_bytes, str(path)))
        _read_into(file, path, memoryview(header), digest)
        body_bytes = expected.num_bytes - 8 - len(header)
        for span in tensor_file.parse_header(bytes(header), body_bytes, str(path)):
            tensors[span.name] = place(span)
            for view in tensors[span.name].fill():
                _read_into(file, path, view, digest)
    _compare(path, digest.hexdigest(), expected)
    return tensors


def _read_into(file: io.FileIO, path: Path, view: memoryview, digest: Any) -> None:
    position = 0
    while position < view.nbytes:
        count = file.readinto(view[position : position + _CHUNK_BYTES])
        if not count:
            raise CheckpointCorrupt(f"{path} became shorter while it was read")
        digest.update(view[position : position + count])
        position += count


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


def _read_small(path: Path, max_bytes: int) -> bytes:
    try:
        size = os.lstat(path).st_size
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointCorrupt(f"{path} is missing") from None
    if size > max_bytes:
        raise CheckpointCorrupt(f"{path} has {size} bytes, more than any that latentwire writes")
    with naming(path), open(_open(path, size), "rb") as file:
        return file.read(size)
