"""One row for each run: its status, and the ends of its curve."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentwire.run.directory import Run, list_runs
from latentwire.run.journal import newest_first
from latentwire.run.status import run_status
from latentwire.views.thinning import plain

Row = dict[str, Any]

_NUM_LOSSES = 40
_SILENT_CHANGES_EVERY_S = 20.0
"""A running run can stall, and a host fall silent, without a new line."""


class FleetPage:
    """Follows all runs of a folder. A run is read again only where one of its files has changed.

    Args:
        runs_dir: the folder of the runs.
        clock: seconds since the epoch.
    """

    def __init__(self, runs_dir: Path, clock: Callable[[], float] = time.time) -> None:
        self._runs_dir = runs_dir
        self._clock = clock
        self._rows: dict[str, Row] = {}
        self._seen: dict[str, tuple[tuple[Any, ...], float]] = {}

    def read(self) -> dict[str, Any] | None:
        """Rows that are new or have changed, and names of runs that are gone; None: all is as it was."""
        runs = list_runs(self._runs_dir)
        gone = sorted(self._rows.keys() - {run.name for run in runs})
        for name in gone:
            del self._rows[name], self._seen[name]
        changed = [row for run in runs if (row := self._changed(run)) is not None]
        return {"rows": changed, "gone": gone} if changed or gone else None

    def snapshot(self) -> dict[str, Any]:
        """All rows as of the last read."""
        return {"rows": list(self._rows.values()), "gone": [], "whole": True}

    def _changed(self, run: Run) -> Row | None:
        now = self._clock()
        stamp = _stamp(run)
        before = self._seen.get(run.name)
        is_silent = before is not None and before[0] == stamp
        if is_silent and (self._rows[run.name]["phase"] is None or now - before[1] < _SILENT_CHANGES_EVERY_S):
            return None
        self._seen[run.name] = (stamp, now)
        row = _row(run, now)
        if self._rows.get(run.name) == row:
            return None
        self._rows[run.name] = row
        return row


def _row(run: Run, now: float) -> Row:
    status = dataclasses.asdict(run_status(run, now))
    losses: list[float | None] = []
    gpu_percent = None
    if status["attempt"]:
        folder = run.path / "attempts" / f"{status['attempt']:04d}"
        records = (r for r in newest_first(folder / "metrics.jsonl") if "loss" in r)
        losses = [_figure(r["loss"]) for r in itertools.islice(records, _NUM_LOSSES)][::-1]
        gpu_percent = _busy(folder / "gpu_stats.jsonl") if status["phase"] else None
    return {**status, "losses": losses, "gpu_percent": gpu_percent}


def _busy(path: Path) -> float | None:
    """Mean utilisation of the GPUs in the last sample."""
    for record in newest_first(path):
        if isinstance(gpus := record.get("gpus"), list):
            busy = [_figure(gpu.get("utilisation_percent")) for gpu in gpus if isinstance(gpu, dict)]
            known = [value for value in busy if value is not None]
            return sum(known) / len(known) if known else None
    return None


def _figure(value: Any) -> float | None:
    return plain(float(value)) if isinstance(value, int | float) and abs(value) < 1e300 else None


def _stamp(run: Run) -> tuple[Any, ...]:
    """Changes whenever a file does that the row is made of."""
    attempts = run.attempts()
    names = ["attempts", "orchestrator.json", "events.orchestrator.jsonl", "cancel.json"]
    paths = [os.path.join(run.path, name) for name in names]
    if attempts:
        folder = str(attempts[-1].path)
        paths += [folder, *(os.path.join(folder, name) for name in sorted(_journals(folder)))]
    return tuple(map(_stat, paths))


def _journals(folder: str) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if name.endswith(".jsonl")]
    except OSError:
        return []


def _stat(path: str) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size
