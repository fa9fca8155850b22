"""Records what real code does to a folder, in the words of posix_disk.py. It knows the functions of ``os`` only."""

from __future__ import annotations

import fcntl
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posix_disk import (
    Close,
    Fsync,
    Link,
    Mkdir,
    Open,
    Operation,
    Rename,
    Rmdir,
    Told,
    Tree,
    Truncate,
    Unlink,
    Write,
)
from watched_os import WRITING, WatchedOs


class Recorder:
    """``with recorder.recording(): ...`` keeps the operations below ``root``, of all threads, in one order."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.operations: list[Operation] = []
        self._handles: dict[int, int] = {}
        self._numbers = itertools.count()
        self._lock = threading.RLock()

    def recording(self) -> WatchedOs:
        """The functions of ``os`` are watched inside of this context."""
        return WatchedOs(self._around)

    def tell(self, event: str, **fields: Any) -> None:
        """Note what the code said; to be given to it as its ``event`` callable."""
        with self._lock:
            self.operations.append(Told(event, fields.get("step")))

    def _around(self, kind: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return getattr(self, f"_{kind}")(function, *args, **kwargs)

    def _path(self, path: Any, dir_fd: int | None) -> str | None:
        """Relative to the root, which is ``.``; None for what is outside."""
        folder = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        whole = os.path.normpath(os.path.join(folder, os.fspath(path)))
        inside = os.path.relpath(whole, self.root)
        return None if inside.split("/")[0] == ".." else inside

    def _note(self, operation: Operation) -> None:
        self.operations.append(operation)

    # --- files ----------------------------------------------------------------------------------------------------

    def _open(
        self, function: Callable[..., int], path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None
    ) -> int:
        inside = self._path(path, dir_fd)
        creates = bool(flags & os.O_CREAT) and inside is not None and not os.path.lexists(self.root / inside)
        descriptor = function(path, flags, mode, dir_fd=dir_fd)
        self._handles.pop(descriptor, None)
        if inside is not None:
            handle = self._handles[descriptor] = next(self._numbers)
            self._note(Open(handle, inside, creates, bool(flags & WRITING)))
            if flags & os.O_TRUNC:
                self._note(Truncate(handle, 0))
        return descriptor

    def _close(self, function: Callable[..., None], descriptor: int) -> None:
        function(descriptor)
        handle = self._handles.pop(descriptor, None)
        if handle is not None:
            self._note(Close(handle))

    def _write(self, function: Callable[..., int], descriptor: int, data: Any) -> int:
        if descriptor not in self._handles:
            return function(descriptor, data)
        appends = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND
        offset = os.fstat(descriptor).st_size if appends else os.lseek(descriptor, 0, os.SEEK_CUR)
        return self._wrote(descriptor, offset, function(descriptor, data), bytes(memoryview(data).cast("B")))

    def _pwrite(self, function: Callable[..., int], descriptor: int, data: Any, offset: int) -> int:
        return self._wrote(descriptor, offset, function(descriptor, data, offset), bytes(memoryview(data).cast("B")))

    def _writev(self, function: Callable[..., int], descriptor: int, buffers: Any) -> int:
        data = b"".join(bytes(memoryview(buffer).cast("B")) for buffer in buffers)
        return self._write(lambda descriptor, _: function(descriptor, buffers), descriptor, data)

    def _wrote(self, descriptor: int, offset: int, count: int, data: bytes) -> int:
        if descriptor in self._handles:
            self._note(Write(self._handles[descriptor], offset, data[:count]))
        return count

    def _ftruncate(self, function: Callable[..., None], descriptor: int, length: int) -> None:
        function(descriptor, length)
        if descriptor in self._handles:
            self._note(Truncate(self._handles[descriptor], length))

    def _fsync(self, function: Callable[..., None], descriptor: int) -> None:
        function(descriptor)
        if descriptor in self._handles:
            self._note(Fsync(self._handles[descriptor]))

    _fdatasync = _fsync

    # --- names ----------------------------------------------------------------------------------------------------

    def _mkdir(self, function: Callable[..., None], path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        function(path, mode, dir_fd=dir_fd)
        self._named(Mkdir, self._path(path, dir_fd))

    def _rmdir(self, function: Callable[..., None], path: Any, *, dir_fd: int | None = None) -> None:
        function(path, dir_fd=dir_fd)
        self._named(Rmdir, self._path(path, dir_fd))

    def _unlink(self, function: Callable[..., None], path: Any, *, dir_fd: int | None = None) -> None:
        function(path, dir_fd=dir_fd)
        self._named(Unlink, self._path(path, dir_fd))

    _remove = _unlink

    def _rename(
        self,
        function: Callable[..., None],
        source: Any,
        target: Any,
        *,
        src_dir_fd: int | None = None,
        dst_dir_fd: int | None = None,
    ) -> None:
        function(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        self._named(Rename, self._path(source, src_dir_fd), self._path(target, dst_dir_fd))

    _replace = _rename

    def _link(self, function: Callable[..., None], source: Any, target: Any, **kwargs: Any) -> None:
        function(source, target, **kwargs)
        self._named(Link, self._path(source, kwargs.get("src_dir_fd")), self._path(target, kwargs.get("dst_dir_fd")))

    def _named(self, make: Callable[..., Operation], *paths: str | None) -> None:
        if all(path is None for path in paths):
            return
        assert all(path is not None for path in paths), f"{make} between the recorded folder and another place"
        self._note(make(*paths))


def read_tree(root: Path) -> Tree:
    """What is below a real folder."""
    found = sorted(root.rglob("*"))
    return {str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in found}


def write_tree(root: Path, tree: Tree) -> None:
    """Make it so, in a new folder."""
    root.mkdir()
    for path in sorted(tree):
        content = tree[path]
        if content is None:
            os.mkdir(f"{root}/{path}")
        else:
            with open(f"{root}/{path}", "wb") as file:
                file.write(content)
