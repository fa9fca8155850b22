"""Writing a checkpoint: files side by side, digests of what is written, one rename that makes it visible.

The order is the promise. Tensor files and state.json are written and fsynced; the manifest, which names them all, after
them; SHA256SUMS last; then the folder is fsynced, renamed from its hidden name, and its parent fsynced. A crash before
the rename leaves a hidden folder that no reader looks at; a crash after it leaves a whole checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from latentwire.checkpoint import layout
from latentwire.checkpoint.layout import FileRecord, Manifest, Snapshot
from latentwire.errors import CheckpointError
from latentwire.run.atomic import fsync_directory, json_safe
from latentwire.run.disk import naming

_CHUNK_BYTES = 16 << 20


def write_files(
    folder: Path, snapshot: Snapshot, describe: Callable[..., Manifest], shard_bytes: int, threads: int
) -> Manifest:
    """Write all files of a checkpoint into a new folder, durably; not yet visible to readers.

    Args:
        folder: the hidden folder; must not exist.
        snapshot: what to write; hashed from these very bytes.
        describe: makes the manifest from ``files`` and ``groups``.
        shard_bytes: size at which a group is divided into files.
        threads: files written side by side.

    Raises:
        CheckpointError: a group's name cannot name a file.
        OSError: the disk refused; the caller removes the folder.
    """
    groups: dict[str, tuple[str, ...]] = {}
    pieces: dict[str, Iterable[bytes | memoryview]] = {}
    for group, tensors in sorted(snapshot.tensors.items()):
        shards = layout.split_into_files(group, tensors, shard_bytes)
        if not all(map(layout.is_plain_name, shards)):
            raise CheckpointError(
                f"the state {group!r} cannot name a file of its own: use letters, digits, '_', '-' and '.', beginning "
                "with a letter, digit or '_'"
            )
        groups[group] = tuple(shards)
        pieces |= {name: layout.encode_tensors(shard) for name, shard in shards.items()}
    state = json.dumps(json_safe(snapshot.values), indent=1, sort_keys=True, allow_nan=False) + "\n"
    pieces[layout.STATE] = [state.encode()]
    folder.mkdir()
    with ThreadPoolExecutor(min(threads, len(pieces)), thread_name_prefix="checkpoint-write") as pool:
        records = list(pool.map(lambda name: write_file(folder / name, pieces[name]), pieces))
    manifest = describe(files=dict(zip(pieces, records, strict=True)), groups=groups)
    listing = dict(manifest.files)
    listing[layout.MANIFEST] = write_file(folder / layout.MANIFEST, [manifest.to_json().encode()])
    write_file(folder / layout.SUMS, [layout.format_sums(listing).encode()])
    fsync_directory(folder)
    return manifest


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> FileRecord:
    """Write and fsync one new file; the digest is of the bytes as they go to the disk.

    Raises:
        OSError: the disk refused, or the file exists.
    """
    digest = hashlib.sha256()
    num_bytes = 0
    with naming(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            for piece in pieces:
                view = memoryview(piece).cast("B")
                for start in range(0, view.nbytes, _CHUNK_BYTES):
                    chunk = view[start : start + _CHUNK_BYTES]
                    digest.update(chunk)
                    _write_all(descriptor, chunk)
                num_bytes += view.nbytes
            os.fsync(descriptor)
            os.posix_fadvise(
                descriptor, 0, 0, os.POSIX_FADV_DONTNEED
            )  # the read-back is to meet the disk, not our memory
        finally:
            os.close(descriptor)
    return FileRecord(num_bytes, digest.hexdigest())


def _write_all(descriptor: int, chunk: memoryview) -> None:
    while chunk.nbytes:
        chunk = chunk[os.write(descriptor, chunk) :]
