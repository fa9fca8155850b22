"""Every call of ``os`` that changes the disk goes past one watcher, which may count, record or kill."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable
from typing import Any

KINDS = (
    "open", "close", "write", "pwrite", "writev", "ftruncate", "fsync", "fdatasync",
    "rename", "replace", "link", "unlink", "remove", "mkdir", "rmdir",
)  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

Around = Callable[..., Any]
"""Called as ``around(kind, function, *args, **kwargs)`` in the place of the function, which it calls itself."""


class WatchedOs:
    """Puts ``around`` in the place of the functions of ``os``, and under ``open``, which does not go through them."""

    def __init__(self, around: Around) -> None:
        self._around = around
        self._real = {kind: getattr(os, kind) for kind in KINDS}
        self._real_open = builtins.open

    def __enter__(self) -> None:
        for kind, function in self._real.items():
            setattr(os, kind, self._watched(kind, function))
        io.open = builtins.open = self._open  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        for kind, function in self._real.items():
            setattr(os, kind, function)
        io.open = builtins.open = self._real_open

    def _watched(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            return self._around(kind, function, *args, **kwargs)

        return watched

    def _open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode != "x":
            assert not set(mode) & set("wa+x"), f"open(..., {mode!r}) would not be seen"
            return self._real_open(file, mode, *args, **kwargs)
        raw = _File(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        return io.TextIOWrapper(io.BufferedWriter(raw), **kwargs)


class _File(io.RawIOBase):
    """A file whose writes go through ``os.write``, as those of ``open`` do not."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return os.write(self._descriptor, data)

    def close(self) -> None:
        if not self.closed:
            super().close()  # flushes
            os.close(self._descriptor)
