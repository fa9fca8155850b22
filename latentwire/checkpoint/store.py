"""Checkpoints under a URL: folders of files on another disk or in an object store, through fsspec.

An object store has no rename, so a folder becomes visible by its last file: one without a manifest is none. fsspec,
and the client of the store with it, is imported when the store is first asked for something.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import stamina

from latentwire.checkpoint import bounded, layout
from latentwire.checkpoint.layout import FileRecord
from latentwire.errors import CheckpointCorrupt, ConfigError, LatentWireError, MirrorError
from latentwire.run.atomic import fsync_directory

CLIENTS = {"file": ("fsspec", "latentwire"), "s3": ("s3fs", "latentwire[s3]"), "gs": ("gcsfs", "latentwire[gs]")}
"""Scheme of a URL -> the module that speaks to it, and what to install."""

_CHUNK_BYTES = 16 << 20
_ASIDE = ".part"


class Stopped(Exception):
    """The copy was called off; nothing is wrong."""


class Store:
    """Folders of files under a URL. Thread-safe; every method blocks, and tries three times before it gives up.

    Args:
        url: ``file:///folder``, ``s3://bucket/prefix`` or ``gs://bucket/prefix``.
        options: for fsspec: ``endpoint_url`` and the like.
        threads: files copied side by side.
        on_chunk: called for every piece that is uploaded; may raise ``Stopped``.

    Raises:
        ConfigError: the client of that scheme is not installed.
    """

    def __init__(self, url: str, options: Mapping[str, Any], threads: int, on_chunk: Callable[[], None]) -> None:
        self.url = url.rstrip("/")
        self._scheme, _, self._root = self.url.partition("://")
        self._options = dict(options)
        self._threads = threads
        self._on_chunk = on_chunk
        self._patiently = stamina.RetryingCaller(attempts=3, wait_initial=1.0, wait_max=20.0).on(MirrorError)
        module, package = CLIENTS[self._scheme]
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"checkpoint.mirror: {url} needs {module}: pip install '{package}'")

    def folders(self) -> dict[str, dict[str, int]]:
        """Folder -> file -> bytes, of all folders and the files right in them; asks anew each time.

        Raises:
            MirrorError: the disk or the client refused.
        """
        return self._patiently(self._folders)

    def read(self, folder: str, name: str) -> bytes:
        """A small file.

        Raises:
            CheckpointCorrupt: it is gone, or larger than any that latentwire writes.
            MirrorError: the disk or the client refused.
        """
        data = b"".join(self._patiently(lambda: list(self._chunks(folder, name, bounded.MAX_JSON_BYTES + 1))))
        if len(data) > bounded.MAX_JSON_BYTES:
            raise CheckpointCorrupt(f"{self.url}/{folder}/{name} is larger than any that latentwire writes")
        return data

    def upload(self, sources: Iterable[Path], folder: str, records: Mapping[str, FileRecord]) -> None:
        """Copy files into a folder, side by side; each is hashed on its way and held against its record, if any.

        Raises:
            CheckpointCorrupt: a source has other bytes than its record says.
            MirrorError: the disk or the client refused.
            Stopped: the copy was called off.
        """

        def upload(source: Path) -> None:
            self._patiently(self._upload, source, folder, records.get(source.name))

        side_by_side(upload, sources, self._threads)

    def download(self, folder: str, records: Mapping[str, FileRecord], target: Path) -> None:
        """Copy files into a local folder, side by side, fsynced; no more is taken than a record allows.

        Raises:
            CheckpointCorrupt: a file is gone, or has other bytes than its record says.
            MirrorError: a disk or the client refused.
        """

        def download(name: str) -> None:
            self._patiently(self._download, folder, name, records[name], target)

        side_by_side(download, records, self._threads)

    def delete(self, folder: str, names: Iterable[str]) -> None:
        """Remove a folder that has these files: its manifest first, so that nobody sees half of it.

        Raises:
            MirrorError: the disk or the client refused.
        """
        with _named(f"{self.url}/{folder}"):
            if layout.MANIFEST in names:
                self._fs.rm_file(self._path(folder, layout.MANIFEST))
            self._fs.rm(f"{self._root}/{folder}", recursive=True)

    # --- inside -------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _fs(self) -> Any:
        import fsspec

        ours = {"auto_mkdir": True} if self._scheme == "file" else {"use_listings_cache": False}
        return fsspec.filesystem(self._scheme, skip_instance_cache=True, **{**ours, **self._options})

    def _path(self, folder: str, name: str) -> str:
        return f"{self._root}/{folder}/{name}"

    def _folders(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        with _named(self.url):
            self._refuse_a_missing_disk()
            self._fs.invalidate_cache()
            files = self._fs.find(self._root, detail=True)
        for path, info in files.items():
            folder, _, name = str(path).removeprefix(f"{self._root}/").rpartition("/")
            if folder and "/" not in folder:
                found.setdefault(folder, {})[name] = int(info["size"])
        return found

    def _refuse_a_missing_disk(self) -> None:
        base = Path(self._root).parent
        if self._scheme == "file" and not base.is_dir():
            raise FileNotFoundError(f"there is no folder {base}: make it, or mount the disk that it is on")

    def _upload(self, source: Path, folder: str, record: FileRecord | None) -> None:
        final = self._path(folder, source.name)
        target = final + _ASIDE if self._scheme == "file" else final  # an object appears whole, a file grows
        digest = hashlib.sha256()
        with _named(f"{self.url}/{folder}/{source.name}"):
            with (
                open(source, "rb", buffering=0) as ours,
                self._fs.open(target, "wb", block_size=_CHUNK_BYTES) as theirs,
            ):
                while chunk := ours.read(_CHUNK_BYTES):
                    self._on_chunk()
                    digest.update(chunk)
                    theirs.write(chunk)
            if record is not None and digest.hexdigest() != record.sha256:
                raise CheckpointCorrupt(f"{source} does not have the SHA-256 that it was committed with")
            if self._scheme == "file":
                _rename_durably(Path(target), Path(final))

    def _download(self, folder: str, name: str, record: FileRecord, target: Path) -> None:
        digest, num_bytes = hashlib.sha256(), 0
        with open(target / name, "wb", buffering=0) as ours:
            for chunk in self._chunks(folder, name, record.num_bytes + 1):
                ours.write(chunk)
                digest.update(chunk)
                num_bytes += len(chunk)
            os.fsync(ours.fileno())
        if (num_bytes, digest.hexdigest()) != (record.num_bytes, record.sha256):
            raise CheckpointCorrupt(f"{self.url}/{folder}/{name} does not have the bytes that were committed")

    def _chunks(self, folder: str, name: str, limit: int) -> Iterator[bytes]:
        """The file's first bytes, ``limit`` at most."""
        with _named(f"{self.url}/{folder}/{name}"):
            try:
                with self._fs.open(self._path(folder, name), "rb", block_size=_CHUNK_BYTES) as file:
                    while limit and (chunk := file.read(min(limit, _CHUNK_BYTES))):
                        limit -= len(chunk)
                        yield chunk
            except FileNotFoundError:
                raise CheckpointCorrupt(f"{self.url}/{folder}/{name} is missing") from None


def side_by_side(work: Callable[[Any], None], items: Iterable[Any], threads: int) -> None:
    """``work`` on each item, a few at a time; raises what the first that failed raised, once all have ended.

    In daemon threads: those of a pool are waited for when the process leaves, and after a notice nothing may be.
    """
    waiting = collections.deque(items)
    failures: list[Exception] = []

    def take_some() -> None:
        while waiting and not failures:
            try:
                work(waiting.popleft())
            except Exception as error:  # raised below, in the caller's thread
                failures.append(error)

    workers = [Thread(target=take_some, name="mirror-copy", daemon=True) for _ in range(min(threads, len(waiting)))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Turn whatever a client raises, which has no common base, into one error that names the file."""
    try:
        yield
    except (LatentWireError, Stopped):
        raise
    except Exception as error:
        raise MirrorError(f"{where}: {type(error).__name__}: {error}") from error


def _rename_durably(aside: Path, final: Path) -> None:
    descriptor = os.open(aside, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(aside, final)
    fsync_directory(final.parent)
