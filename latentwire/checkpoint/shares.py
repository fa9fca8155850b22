"""One checkpoint written by several ranks, which meet in its hidden folder and nowhere else.

Every rank comes to the same plan of files by itself (``layout.plan_files``), writes its own and leaves a
``.share-<rank>.json`` with their digests, or with the reason why it could not. Rank 0 collects these, removes them, and
only then seals and renames the folder: a rank that dies or is late keeps a checkpoint from being, not from being whole.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from latentwire.checkpoint.layout import FileRecord
from latentwire.errors import CheckpointTorn
from latentwire.run.atomic import read_json, replacing

_LOOK_S, _FENCE_S = 0.05, 1.0


def share_path(folder: Path, rank: int) -> Path:
    """Where a rank leaves word of what it wrote."""
    return folder / f".share-{rank}.json"


def tell_written(folder: Path, rank: int, files: dict[str, FileRecord]) -> None:
    """This rank's files are written and fsynced."""
    _tell(share_path(folder, rank), {"files": {name: dataclasses.asdict(r) for name, r in files.items()}})


def tell_failed(folder: Path, rank: int, error: Exception) -> None:
    """This rank's disk refused, or its tensors were torn; rank 0 is not to wait for it."""
    code = error.errno if isinstance(error, OSError) else None
    word = {"errno": code, "error": str(error), "torn": isinstance(error, CheckpointTorn)}
    _tell(share_path(folder, rank), word)


def _tell(path: Path, word: dict[str, Any]) -> None:
    """The last thing that is done in the folder: from here on rank 0 may rename it, so its name is not fsynced."""
    with replacing(path, fsync=False) as file:
        file.write(json.dumps(word))


def collect(folder: Path, ranks: Iterable[int], check: Callable[[], None], patience_s: float) -> list[dict[str, Any]]:
    """What the other ranks tell. Called by rank 0, on its saving thread; blocks until no other writes any more.

    Args:
        folder: the hidden folder.
        ranks: whose shares.
        check: called every second of waiting; raises where waiting has become pointless.
        patience_s: for all of them together.

    Raises:
        OSError: a rank was not heard of for so long.
    """
    told = []
    began = checked = time.monotonic()
    for rank in ranks:
        path = share_path(folder, rank)
        while path.name not in os.listdir(folder):  # a listing: a network file system then looks anew
            if time.monotonic() - checked > _FENCE_S:
                check()
                checked = time.monotonic()
            if time.monotonic() - began > patience_s:
                said = f"rank {rank} has not written its share in {patience_s:.0f} s"
                raise OSError(errno.ETIMEDOUT, said, str(path))
            time.sleep(_LOOK_S)
        told.append({"rank": rank} | read_json(path))
        path.unlink()
    return told


def records(told: Iterable[dict[str, Any]]) -> dict[str, FileRecord]:
    """The files that the other ranks wrote.

    Raises:
        CheckpointTorn: a rank's part was.
        OSError: what a rank's disk said.
    """
    files: dict[str, FileRecord] = {}
    for share in told:
        if "error" in share:
            said = f"rank {share['rank']} could not write its share: {share['error']}"
            raise CheckpointTorn(said) if share["torn"] else OSError(share["errno"] or errno.EIO, said)
        files |= {name: FileRecord(**record) for name, record in share["files"].items()}
    return files
