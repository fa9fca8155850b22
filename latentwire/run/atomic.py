"""Small files that a reader sees whole or not at all, and how any file of a run is opened."""

from __future__ import annotations

import json
import math
import os
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from latentwire.run.disk import naming


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as JSON: written aside, fsynced, renamed. Blocks for one fsync.

    Raises:
        OSError: the disk refused; the old file stands.
    """
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``, whole or not at all, durably."""
    with replacing(path) as file:
        file.write(text)
    fsync_directory(path.parent)


@contextmanager
def replacing(path: Path, fsync: bool = True, alone: bool = False) -> Iterator[TextIO]:
    """Replace ``path`` by what the block writes, whole or not at all; if the block fails, nothing is left beside it.

    Args:
        path: the file. The new one is durable in its place once its folder is, see ``fsync_directory``.
        fsync: whether the text has to be on the disk before it is in its place.
        alone: whether there is one writer only, ever. It overwrites what it left aside when it was killed; of others
            each writes a file of its own.
    """
    aside = path.with_name(f".{path.name}" if alone else f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with naming(path):
            with open(aside, "w" if alone else "x", encoding="utf-8") as file:
                yield file
                file.flush()
                if fsync:
                    os.fsync(file.fileno())
            os.replace(aside, path)
    except BaseException:
        with suppress(OSError):  # the first error says more
            aside.unlink(missing_ok=True)
        raise


def json_safe(value: Any) -> Any:
    """NaN and infinities as strings: JSON has no word for them and other languages' readers would stop."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): json_safe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(v) for v in value]
    return value


def read_json(path: Path) -> Any:
    """The value in ``path``, or None where the file is missing or is not JSON (a reader never trips over a writer).

    Raises:
        OSError: it is there and cannot be read.
    """
    try:
        with open_to_read(path) as file:
            return json.loads(file.read().decode())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):  # not UTF-8, not JSON, endless brackets
        return None


def open_to_read(path: Path) -> BinaryIO:
    """Open a run's file. Does not block: in its place may stand a FIFO, which would wait for a writer for ever.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no regular file: remove it, or put the file back that belongs there")
    return os.fdopen(descriptor, "rb")


def make_directory(path: Path) -> None:
    """Make a directory and those above it where they are missing, durably: each new name is fsynced in its parent.

    One that is there already is left alone: whoever made it did the same.
    """
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable: a rename is not on disk before its parent is."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
