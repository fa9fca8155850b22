"""One checkpoint written by several ranks, which meet in its hidden folder and nowhere else.

Every rank comes to the same plan of files by itself (``layout.plan_files``), writes its own and leaves a
``.share-<rank>.json`` with their digests, or with the reason why it could not. Rank 0 collects these, removes them, and
only then seals and renames the folder: a rank that dies or is late keeps a checkpoint from being, not from being whole.
"""

from __future__ import annotations

import dataclasses
import errno
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from latentwire.checkpoint.layout import FileRecord
from latentwire.run.atomic import read_json, write_json

_LOOK_S = 0.02


def share_path(folder: Path, rank: int) -> Path:
    """Where a rank leaves word of what it wrote."""
    return folder / f".share-{rank}.json"


def tell_written(folder: Path, rank: int, files: dict[str, FileRecord]) -> None:
    """This rank's files are written and fsynced."""
    write_json(share_path(folder, rank), {"files": {name: dataclasses.asdict(r) for name, r in files.items()}})


def tell_failed(folder: Path, rank: int, error: Exception) -> None:
    """This rank's disk refused, or its tensors were torn; rank 0 is not to wait for it."""
    code = error.errno if isinstance(error, OSError) else None
    write_json(share_path(folder, rank), {"errno": code, "error": str(error)})


def collect(folder: Path, ranks: Iterable[int], check: Callable[[], None], patience_s: float) -> list[dict[str, Any]]:
    """What the other ranks tell. Called by rank 0, on its saving thread; blocks until no other writes any more.

    Args:
        folder: the hidden folder.
        ranks: whose shares.
        check: called while waiting; raises where waiting has become pointless.
        patience_s: for all of them together.

    Raises:
        OSError: a rank was not heard of for so long.
    """
    told = []
    until = time.monotonic() + patience_s
    for rank in ranks:
        path = share_path(folder, rank)
        while (share := read_json(path)) is None:
            check()
            if time.monotonic() > until:
                raise OSError(
                    errno.ETIMEDOUT, f"rank {rank} has not written its share in {patience_s:.0f} s", str(path)
                )
            time.sleep(_LOOK_S)
        told.append({"rank": rank} | share)
        path.unlink()
    return told


def records(told: Iterable[dict[str, Any]]) -> dict[str, FileRecord]:
    """The files that the other ranks wrote.

    Raises:
        OSError: what a rank's disk said.
    """
    files: dict[str, FileRecord] = {}
    for share in told:
        if "error" in share:
            raise OSError(
                share["errno"] or errno.EIO, f"rank {share['rank']} could not write its share: {share['error']}"
            )
        files |= {name: FileRecord(**record) for name, record in share["files"].items()}
    return files
