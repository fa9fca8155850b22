"""Model folders: made once and shared by runs, whole or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def has_weights(folder: Path) -> bool:
    """Whether there are weights in it, in one file or several."""
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Make a folder so that it is whole or absent, whoever is killed and however many try at once.

    A maker that is killed leaves a draft behind, ``.<name>.<random>``, which nobody reads.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        make(draft)
        for file in draft.iterdir():
            _fsync(file)
        draft.rename(folder)
        _fsync(folder.parent)
    except OSError:
        if not folder.is_dir():  # else another process was first, and what it made is the same
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
