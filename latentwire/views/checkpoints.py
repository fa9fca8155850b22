"""The checkpoints of a run with what is known of their bytes; no tensor is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from latentwire.checkpoint.layout import QUARANTINE, parse_step_name
from latentwire.checkpoint.reader import is_verified, read_manifest
from latentwire.errors import CheckpointError
from latentwire.run.directory import Run


class CheckpointsView:
    """Lists a run's checkpoints; a manifest is read once."""

    def __init__(self, run: Run) -> None:
        self._folder = run.checkpoints
        self._known: dict[tuple[str, int], dict[str, Any]] = {}

    def read(self) -> list[dict[str, Any]]:
        """One record each, the newest first; those in quarantine last."""
        rows = [self._row(name) for name in _names(self._folder) if parse_step_name(name) is not None]
        rows.sort(key=lambda row: -row["step"])
        quarantined = [
            {"name": name, "state": "quarantined", "step": None} for name in sorted(_names(self._folder / QUARANTINE))
        ]
        return rows + quarantined

    def _row(self, name: str) -> dict[str, Any]:
        path = self._folder / name
        key = (name, _inode(path))
        if key not in self._known:
            self._known[key] = _read(path)
        row = self._known[key]
        verified = row["state"] != "bad" and is_verified(path)
        return {**row, "state": "verified"} if verified else row


def _read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = {"name": path.name, "step": parse_step_name(path.name)}
    try:
        manifest = read_manifest(path)
    except (CheckpointError, OSError) as error:
        return {**record, "state": "bad", "error": str(error)}
    metrics = {key: value for key, value in manifest.metrics.items() if abs(value) < 1e300}
    facts = {"attempt": manifest.attempt, "created": manifest.created, "bytes": manifest.num_bytes, "metrics": metrics}
    return {**record, "state": "committed", **facts}


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # there is none yet, or it vanished
        return []


def _inode(path: Path) -> int:
    try:
        return os.stat(path).st_ino
    except OSError:
        return 0
