"""Disk errors for people: which file, what the disk said, and the cure."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_CURES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "delete something of yours there, or have the quota raised",
    errno.EROFS: "it was mounted read-only, often after an error of the disk: have it mended and mounted again",
    errno.EIO: "the disk or its server fails: see `dmesg` on the node and tell its administrator",
    errno.EMFILE: "too many open files: raise `ulimit -n`, or look for what leaves files open",
    errno.ENFILE: "the node has too many open files: tell its administrator",
    errno.EACCES: "make it readable and writable for this user",
    errno.EPERM: "make it readable and writable for this user",
    errno.ENOENT: "see whether the path is right",
    errno.ENOTDIR: "see whether the path is right",
    errno.EISDIR: "give the path of a file",
    errno.ETIMEDOUT: "see the other ranks' logs and the load of their disks",
    errno.ESTALE: "the file server has lost it: have it mounted again on this node",
}

_PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EAGAIN}
_PASSING |= {errno.ETIMEDOUT, errno.ESTALE}
"""What may be over in a while, when somebody has made room or a server is back."""


def is_passing(error: OSError) -> bool:
    """Whether it is worth while to try again later."""
    return error.errno in _PASSING


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of reading, writing and fsync name no file, those of removing a tree a bare name: give them this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and not os.path.isabs(error.filename or ""):  # else it is ours, with its own words
            error.filename = os.fspath(path)
        raise


def complain(text: str) -> None:
    """Print to stderr. Where that is a log on a full disk there is nobody to tell, and the program goes on."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def told(error: Exception, folder: Path | None = None) -> str:
    """``<file>: No space left on device; free some space there``.

    Args:
        error: what the disk said; one of ours keeps its own words.
        folder: named where the error names no file; None: such an error is not of a disk, and keeps its own words too.
    """
    if not isinstance(error, OSError):
        return str(error)
    where = error.filename or folder
    if error.errno is None or where is None:
        return str(error)
    cure = _CURES.get(error.errno, "see whether the file system is well")
    return f"{os.fsdecode(where)}: {error.strerror}; {cure}"
