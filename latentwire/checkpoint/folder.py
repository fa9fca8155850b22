"""The folder of a run's checkpoints: what is committed, what may go, what is bad, what was left half done."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from latentwire.checkpoint import layout, reader
from latentwire.checkpoint.layout import step_name
from latentwire.checkpoint.retention import Kept, to_delete
from latentwire.errors import CheckpointError, NoSpace
from latentwire.run.atomic import fsync_directory, make_directory, write_json
from latentwire.run.disk import naming

_SAVING = re.compile(re.escape(layout.SAVING_PREFIX) + r"(\d+)-.*")


class CheckpointFolder:
    """The committed checkpoints of a run, as seen by one attempt. What it changes stands behind the fence.

    Args:
        folder: ``runs/<run>/checkpoints``; made if missing.
        token: the attempt's number.
        fence: raises ``Fenced`` once the attempt is superseded.
        event: called as ``event(name, **fields)``.
        keep, best_metric, best_mode: retention.
    """

    def __init__(
        self,
        folder: Path,
        token: int,
        fence: Callable[[], None],
        event: Callable[..., Any],
        keep: int,
        best_metric: str | None,
        best_mode: Literal["min", "max"],
    ) -> None:
        self.folder = folder
        self._token = token
        self._fence = fence
        self._event = event
        self._keep = keep
        self._best_metric = best_metric
        self._best_mode: Literal["min", "max"] = best_mode
        make_directory(folder)

    def committed(self) -> list[Path]:
        """All committed checkpoints, oldest first."""
        names = [n for n in os.listdir(self.folder) if layout.parse_step_name(n) is not None]
        return [self.folder / n for n in sorted(names, key=lambda n: layout.parse_step_name(n) or 0)]

    def expendable(self, keep: int | None = None) -> list[Path]:
        """The checkpoints that retention lets go, oldest first; ``keep``: if it kept so many."""
        return [self.folder / step_name(step) for step in to_delete(self._kept(), keep or self._keep, self._best_mode)]

    def _kept(self) -> list[Kept]:
        kept = []
        for path in self.committed():
            try:
                metrics = reader.read_metrics(path)
            except CheckpointError:
                continue  # not ours to judge here: restore quarantines it
            step = layout.parse_step_name(path.name)
            assert step is not None
            kept.append(Kept(step, reader.is_verified(path), metrics.get(self._best_metric or "")))
        return kept

    def delete(self, path: Path) -> None:
        """Out of sight by one rename, then gone: nobody sees half a checkpoint."""
        self._fence()
        hidden = path.with_name(f"{layout.DELETING_PREFIX}{self._token:04d}-{path.name}")
        os.rename(path, hidden)
        fsync_directory(self.folder)  # else a power cut may keep the removals and not the rename
        with naming(hidden):
            shutil.rmtree(hidden)
        self._event("checkpoint_pruned", step=layout.parse_step_name(path.name))

    def mark_verified(self, path: Path, seconds: float) -> None:
        """Record that the checkpoint was read back whole."""
        if not reader.is_verified(path):
            write_json(path / layout.VERIFIED, {"time": time.time(), "attempt": self._token, "metrics": {}})
        self._event("save_verified", step=layout.parse_step_name(path.name), path=path.name, seconds=round(seconds, 4))

    def quarantine(self, path: Path, reason: str) -> None:
        """Move a bad checkpoint out of the way, kept for a look, never used again."""
        self._fence()
        place = self.folder / layout.QUARANTINE / f"{path.name}.attempt-{self._token:04d}-{time.time_ns()}"
        make_directory(place.parent)
        try:
            os.rename(path, place)
        except FileNotFoundError:  # another rank met it too and was faster
            return
        fsync_directory(place.parent)  # first: that there was a checkpoint must not be forgotten
        fsync_directory(self.folder)
        self._event("checkpoint_quarantined", path=path.name, moved_to=str(place), reason=reason)

    def quarantined(self) -> list[str]:
        """Names of what was moved there."""
        folder = self.folder / layout.QUARANTINE
        return os.listdir(folder) if folder.is_dir() else []

    def check_space(self, num_bytes: int) -> None:
        """Refuse to start where one more checkpoint of that size would not fit.

        Raises:
            NoSpace: with figures.
        """
        free = shutil.disk_usage(self.folder).free
        if free < num_bytes:
            raise NoSpace(
                f"a checkpoint needs about {num_bytes / 1e6:,.1f} MB and {self.folder} has {free / 1e6:,.1f} MB free: "
                "free some space, or put the runs folder on another file system"
            )

    def sweep(self) -> None:
        """Remove what older attempts left half done. Called once, by a new attempt, before ``restore``."""
        for entry in os.listdir(self.folder):
            saving = _SAVING.fullmatch(entry)
            older = saving is not None and int(saving.group(1)) < self._token
            if older or entry.startswith(layout.DELETING_PREFIX):
                self._sweep_away(self.folder / entry)
        for path in self.committed():
            for half_written in path.glob(f".{layout.VERIFIED}.*"):
                half_written.unlink(missing_ok=True)

    def _sweep_away(self, path: Path) -> None:
        """Take the name away before the files: a stale writer's rename finds the whole folder, or none."""
        away = path
        if not path.name.startswith(layout.DELETING_PREFIX):
            away = path.with_name(f"{layout.DELETING_PREFIX}{self._token:04d}{path.name}")
            try:
                os.rename(path, away)
            except FileNotFoundError:
                return
        shutil.rmtree(away, ignore_errors=True)
        self._event("swept", path=path.name)
