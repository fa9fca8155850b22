"""One row for each run: its status, and the ends of its curve."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentwire.monitor.figures import gpus_of
from latentwire.run.directory import Run, list_runs
from latentwire.run.disk import told
from latentwire.run.journal import newest_first
from latentwire.run.seen import SeenRun
from latentwire.run.status import status_of
from latentwire.views.thinning import figure

Row = dict[str, Any]

log = logging.getLogger("latentwire.dashboard")

_NUM_LOSSES = 40
_AT_A_TIME_S = 0.25
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
        self._looks: dict[str, _Look] = {}
        self._seen: dict[str, SeenRun] = {}

    def read(self) -> dict[str, Any] | None:
        """Rows that are new or have changed, and names of runs that are gone; None: all is as it was.

        Blocks for about a quarter of a second at most. Where that was too short, ``unfinished`` is true: read again.
        """
        began = time.monotonic()
        runs = {run.name: run for run in list_runs(self._runs_dir)}
        gone = sorted(self._rows.keys() - runs.keys())
        for name in gone:
            del self._rows[name]
            self._looks.pop(name, None)
            self._seen.pop(name, None)
        changed = {name: {"name": name, "state": None} for name in runs if name not in self._rows}
        self._rows |= changed
        unfinished = False
        for name in sorted(runs, key=lambda name: self._looks.get(name, _NEVER).at):  # the longest not looked at first
            if time.monotonic() - began > _AT_A_TIME_S:
                unfinished = True
                break
            row = self._look(runs[name])
            if row != self._rows[name]:
                self._rows[name] = changed[name] = row
        message = {"rows": list(changed.values()), "gone": gone, "unfinished": unfinished}
        return message if changed or gone or unfinished else None

    def snapshot(self) -> dict[str, Any]:
        """All rows as of the last read."""
        return {"rows": list(self._rows.values()), "gone": [], "whole": True}

    def _look(self, run: Run) -> Row:
        now = self._clock()
        before = self._looks.get(run.name, _NEVER)
        row = self._rows[run.name]
        try:
            stamp = _stamp(run)
        except OSError as error:
            self._looks[run.name] = dataclasses.replace(before, at=time.monotonic())
            return {"name": run.name, "state": "UNREADABLE", "reason": told(error)}
        is_running = row.get("phase") is not None
        if before.stamp == stamp and not (is_running and now - before.read_at > _SILENT_CHANGES_EVERY_S):
            self._looks[run.name] = dataclasses.replace(before, at=time.monotonic())
            return row
        self._looks[run.name] = _Look(stamp, now, time.monotonic())
        try:
            seen = self._seen.pop(run.name, None)
            if seen is None:
                seen = SeenRun(run)
            else:
                seen.look()
            row = _row(seen, now)
            if row["phase"] is not None:  # it goes on: what was read of it is kept
                self._seen[run.name] = seen
            return row
        except Exception as error:  # whatever one run's files hold, the others are shown
            log.exception("%s cannot be read", run.path)
            return {"name": run.name, "state": "UNREADABLE", "reason": _in_words(error)}


@dataclasses.dataclass(frozen=True)
class _Look:
    stamp: tuple[Any, ...] | None
    read_at: float
    at: float


_NEVER = _Look(None, 0.0, 0.0)


def _in_words(error: Exception) -> str:
    return told(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


def _row(run: SeenRun, now: float) -> Row:
    status = dataclasses.asdict(status_of(run, now))
    losses: list[float | None] = []
    gpu_percent = None
    for newest in run.attempts()[-1:]:
        records = (r for r in newest_first(newest.metrics_path) if "loss" in r)
        losses = [figure(r["loss"]) for r in itertools.islice(records, _NUM_LOSSES)][::-1]
        gpu_percent = _busy(newest.path / "gpu_stats.jsonl") if status["phase"] else None
    return {**status, "losses": losses, "gpu_percent": gpu_percent}


def _busy(path: Path) -> float | None:
    """Mean utilisation of the GPUs in the last sample."""
    for record in newest_first(path):
        if isinstance(record.get("gpus"), list):
            busy = [figure(gpu.get("utilisation_percent")) for gpu in gpus_of(record)]
            known = [value for value in busy if value is not None]
            return sum(known) / len(known) if known else None
    return None


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
