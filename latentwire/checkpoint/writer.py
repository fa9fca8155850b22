"""Writing a checkpoint: files side by side, digests of what is written, one rename that makes it visible.

The order is the promise. Tensor files and state.json are written and fsynced; the manifest, which names them all, after
them; SHA256SUMS last; then the folder is fsynced, renamed from its hidden name, and its parent fsynced. A crash before
the rename leaves a hidden folder that no reader looks at; a crash after it leaves a whole checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from latentwire.checkpoint import bounded, layout, shares, tensor_file
from latentwire.checkpoint.layout import FileRecord, Manifest, Snapshot, TensorFile
from latentwire.errors import CheckpointError, CheckpointTorn
from latentwire.run.atomic import fsync_directory
from latentwire.run.disk import naming

_CHUNK_BYTES = 8 << 20
"""Hashed and written in one go: small enough to come from the cache the second time."""
_FLUSH_BYTES = 64 << 20
"""The disk is set to work after so many bytes of a file; left alone the kernel would gather gigabytes first."""
_HEAD_BYTES = 1 << 20
"""Of a file, to tell without reading it whole that it has changed since the last save."""
_PATIENCE_S, _PATIENCE_TIMES = 120.0, 10.0
"""How long rank 0 waits for the others' shares: so long, or so many times what its own took."""

Pieces = Iterable[bytes | memoryview]


@dataclasses.dataclass(frozen=True)
class _Written:
    """What linking must know of a file: where it is, what is in it, and a digest of its first bytes."""

    path: Path
    record: FileRecord
    head: bytes


class Writer:
    """Writes checkpoints' files; remembers what is in them, so that an equal one can be linked and not written.

    Args:
        threads: files written side by side.
        shard_bytes: size at which a group is divided into files.
        link: equal files are linked.
        rank, world_size: which part is this one's to write.
    """

    def __init__(self, threads: int, shard_bytes: int, link: bool, rank: int, world_size: int) -> None:
        self._threads = threads
        self._shard_bytes = shard_bytes
        self._link = link
        self._rank = rank
        self._world_size = world_size
        self._written: dict[str, _Written] = {}
        self._linkable: dict[str, _Written] = {}

    def plan(self, snapshot: Snapshot) -> list[TensorFile]:
        """The snapshot's files, of all ranks.

        Raises:
            CheckpointError: a group's name cannot name a file.
        """
        files = layout.plan_files(snapshot, self._shard_bytes, self._world_size)
        for file in files:
            if not layout.is_plain_name(file.name):
                raise CheckpointError(
                    f"the state {file.group!r} cannot name a file of its own: use letters, digits, '_', '-' and '.', "
                    "beginning with a letter, digit or '_'"
                )
        return files

    def share(self, snapshot: Snapshot) -> list[TensorFile]:
        """Those that this rank writes, the largest first: begun last, it alone would keep everybody waiting."""
        mine = (file for file in self.plan(snapshot) if file.rank == self._rank)
        return sorted(mine, key=lambda file: -file.num_bytes)

    def write_share(self, folder: Path, snapshot: Snapshot) -> dict[str, FileRecord]:
        """Write this rank's files of the snapshot into the folder, durably but for their names. Blocks.

        Raises:
            CheckpointTorn: its bytes are not those of one step.
            OSError: the disk refused.
        """
        ordered = self.share(snapshot)
        snapshot.settle()
        self._written = {}
        with ThreadPoolExecutor(self._threads, thread_name_prefix="checkpoint-write") as pool:
            records = list(pool.map(lambda file: self._write_or_link(folder, snapshot, file), ordered))
        return {file.name: record for file, record in zip(ordered, records, strict=True)}

    def write_all(self, folder: Path, snapshot: Snapshot, check: Callable[[], None]) -> dict[str, FileRecord]:
        """Write rank 0's share and gather those of the others. Called by rank 0; blocks.

        Args:
            folder: where all ranks write.
            snapshot: what to write.
            check: raises where waiting for the others has become pointless.

        Raises:
            CheckpointTorn: a rank's bytes are not those of one step.
            OSError: a rank's disk refused, a rank was not heard of, or nobody wrote a file.
        """
        started = time.monotonic()

        def others() -> list[dict[str, Any]]:
            patience_s = max(_PATIENCE_S, _PATIENCE_TIMES * (time.monotonic() - started))
            return shares.collect(folder, range(1, self._world_size), check, patience_s)

        try:
            files = self.write_share(folder, snapshot)
        except (OSError, CheckpointTorn):
            with contextlib.suppress(OSError):  # the first error says more
                others()  # nobody else may be writing when the folder is removed
            raise
        files |= shares.records(others())
        missing = sorted({file.name for file in self.plan(snapshot)} - files.keys())
        if missing:
            said = f"nobody wrote {', '.join(missing[:3])}: the ranks track other states"
            raise OSError(errno.EIO, said, str(folder))
        return files

    def may_link_to(self, folder: Path) -> None:
        """The files of the last ``write_share`` are in this folder now and were read back."""
        self._linkable = {n: dataclasses.replace(written, path=folder / n) for n, written in self._written.items()}

    def forget(self) -> None:
        """What was written last is not to be linked to: write everything anew."""
        self._written, self._linkable = {}, {}

    def _write_or_link(self, folder: Path, snapshot: Snapshot, file: TensorFile) -> FileRecord:
        def pieces() -> Iterator[bytes | memoryview]:
            tensors = snapshot.tensors[file.group]
            return tensor_file.encode_tensors({name: tensors[name] for name in file.tensors})

        path = folder / file.name
        if not self._link:
            return write_file(path, pieces())
        head = _head(pieces())
        old = self._linkable.get(file.name)
        record = None
        if old is not None and old.head == head and _hash(pieces()) == old.record:
            record = _link(old, path)
        if record is None:
            record = write_file(path, pieces())
        self._written[file.name] = _Written(path, record, head)
        return record


def write_state(folder: Path, snapshot: Snapshot) -> FileRecord:
    """Write state.json.

    Raises:
        CheckpointError: it would be more than may be read back.
        OSError: the disk refused.
    """
    return write_file(folder / layout.STATE, [bounded.encode_json(snapshot.values, layout.STATE)])


def seal(folder: Path, manifest: Manifest) -> None:
    """Write what names the files, and make the folder's names durable. All files are there and fsynced."""
    listing = dict(manifest.files)
    listing[layout.MANIFEST] = write_file(folder / layout.MANIFEST, [manifest.to_json().encode()])
    write_file(folder / layout.SUMS, [layout.format_sums(listing).encode()])
    fsync_directory(folder)


def write_file(path: Path, pieces: Pieces) -> FileRecord:
    """Write and fsync one new file; the digest is of the bytes as they go to the disk.

    Raises:
        OSError: the disk refused, or the file exists.
    """
    with naming(path):
        return _write_file(path, pieces)


def _write_file(path: Path, pieces: Pieces) -> FileRecord:
    digest = hashlib.sha256()
    num_bytes = num_flushed = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        for chunk in _chunks(pieces):
            digest.update(chunk)
            _write_all(descriptor, chunk)
            num_bytes += chunk.nbytes
            if num_bytes - num_flushed >= _FLUSH_BYTES:
                # begins to write the dirty pages and drops those of before: the disk is never idle, memory stays free
                os.posix_fadvise(descriptor, max(0, num_flushed - _FLUSH_BYTES), 0, os.POSIX_FADV_DONTNEED)
                num_flushed = num_bytes
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # the read-back is to meet the disk, not our memory
    finally:
        os.close(descriptor)
    return FileRecord(num_bytes, digest.hexdigest())


def _chunks(pieces: Pieces) -> Iterator[memoryview]:
    for piece in pieces:
        view = memoryview(piece).cast("B")
        for start in range(0, view.nbytes, _CHUNK_BYTES):
            yield view[start : start + _CHUNK_BYTES]


def _write_all(descriptor: int, chunk: memoryview) -> None:
    while chunk.nbytes:
        chunk = chunk[os.write(descriptor, chunk) :]


def _head(pieces: Pieces) -> bytes:
    digest = hashlib.sha256()
    left = _HEAD_BYTES
    for chunk in _chunks(pieces):
        digest.update(chunk[:left])
        left -= chunk.nbytes
        if left <= 0:
            break
    return digest.digest()


def _hash(pieces: Pieces) -> FileRecord:
    digest = hashlib.sha256()
    num_bytes = 0
    for chunk in _chunks(pieces):
        digest.update(chunk)
        num_bytes += chunk.nbytes
    return FileRecord(num_bytes, digest.hexdigest())


def _link(old: _Written, path: Path) -> FileRecord | None:
    """Give the file its second name; None where the file system has no hard links, or the old one is gone."""
    try:
        os.link(old.path, path)
    except OSError:
        return None
    return old.record
