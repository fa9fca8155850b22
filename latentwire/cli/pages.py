"""What ``latentwire watch`` draws: the fleet, or one run with its progress, loss, GPUs and last events."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from latentwire.cli.drawing import fleet_text, state_text
from latentwire.cli.fleet import ALIVE, Fleet
from latentwire.cli.gpu_use import mean_use, recent_samples
from latentwire.cli.status import facts
from latentwire.cli.text import NOTHING, aligned, bar, cut, figure, one_line, size, sparkline
from latentwire.run.directory import Run
from latentwire.run.disk import told
from latentwire.run.figures import number
from latentwire.run.journal import newest_first, time_of
from latentwire.run.seen import SeenRun
from latentwire.run.status import RunStatus, status_of
from latentwire.run.telling import tell

_BAR_WIDTH = 24
_NUM_LOSSES = 200
_CURVE_WIDTH = 40
_LEAST_EVENTS = 3
_MOST_EVENTS = 100
_LEFT_OUT = ("run", "state", "directory")


class FleetPage:
    """All runs of a folder."""

    def __init__(self, runs_dir: Path) -> None:
        """Nothing is read yet."""
        self._runs_dir = runs_dir
        self._fleet = Fleet(runs_dir)

    def draw(self, now: float, width: int, height: int) -> Text:
        """The table as it is now."""
        rows = self._fleet.look(now)
        page = _head(f"{len(rows)} runs in {self._runs_dir.absolute()}", now, width)
        troubles = [one_line(trouble) for trouble in self._fleet.unreadable[: height // 4]]
        if rows:
            page.append_text(fleet_text(rows, now, width, height - 2 - len(troubles)))
        for trouble in troubles:
            page.append(f"\n{cut(trouble, width)}", style="red")
        return page


class RunPage:
    """One run."""

    def __init__(self, run: Run) -> None:
        """Reads what there is so far."""
        self._run = run
        self._seen = SeenRun(run)

    def draw(self, now: float, width: int, height: int) -> Text:
        """The run as it is now; of the events, as many as there is room for."""
        try:
            return self._draw(now, width, height)
        except OSError as error:
            return _head(one_line(f"{self._run.name} cannot be read: {told(error)}"), now, width)

    def _draw(self, now: float, width: int, height: int) -> Text:
        if not self._run.path.is_dir():
            self._seen = SeenRun(self._run)  # should it come back, it is read from its beginning
            return _head(one_line(f"{self._run.name} has vanished: {self._run.path}"), now, width)
        self._seen.look()
        status = status_of(self._seen, now)
        page = _head(one_line(f"{status.name}  {self._run.path}"), now, width)
        page.append_text(state_text(status.state)).append(f" {status.phase}" if status.phase else "")
        page.append(one_line(f"  attempt {status.attempt}, job {status.job_id}") if status.attempt else "", style="dim")
        known = dict(facts(self._seen, status, now)) | self._with_pictures(status)
        gpus = _gpu_lines(self._seen) if status.state in ALIVE else []
        if gpus:
            known.pop("GPUs", None)
        lines = [*_pairs(known), *(["", *gpus] if gpus else []), ""]
        lines = [cut(line, width) for line in lines[: height - 3 - _LEAST_EVENTS]]
        page.append("\n" + "\n".join(lines))
        room = height - 3 - len(lines)
        for moment, words in reversed(list(itertools.islice(_told(self._seen), max(0, room)))):
            page.append(f"\n{moment}", style="dim").append(
                f"  {cut(words, width - len(moment) - 2)}", style=_style(words)
            )
        return page

    def _with_pictures(self, status: RunStatus) -> dict[str, str]:
        """Progress and loss as a person sees them."""
        pictures = {}
        if status.total_steps:
            share = status.step / status.total_steps
            done = f"{bar(share, _BAR_WIDTH)} {int(100 * share)} %"
            pictures["step"] = f"{status.step} of {status.total_steps}  {done}"
        losses = _losses(self._seen)
        if len(losses) > 1:
            curve = sparkline(_thinned(losses, _CURVE_WIDTH), min(losses), max(losses))
            pictures["loss"] = f"{figure(status.loss)}  {curve} last {len(losses)} steps"
        return pictures


def _head(words: str, now: float, width: int) -> Text:
    right = time.strftime("  %H:%M:%S  q leaves", time.localtime(now))
    left = cut(words, max(0, width - len(right)))
    page = Text(no_wrap=True, overflow="crop")
    page.append(left, style="bold").append(right.rjust(width - len(left)), style="dim")
    return page.append("\n\n")


def _pairs(known: dict[str, str]) -> list[str]:
    rows = [(name, value) for name, value in known.items() if name not in _LEFT_OUT]
    return ["  ".join(cells).rstrip() for cells in aligned(rows)]


def _losses(run: SeenRun) -> list[float]:
    """Of the last steps, oldest first; those of the attempt before come before those of the newest."""
    found: list[float] = []
    below = math.inf
    for attempt in reversed(run.attempts()[-2:]):
        for record in newest_first(attempt.metrics_path):
            loss, step = number(record.get("loss")), number(record.get("step"))
            if loss is not None and step is not None and step < below:  # a step done again counts once
                found.append(loss)
                below = step
    return found[:_NUM_LOSSES][::-1]


def _thinned(values: Sequence[float], most: int) -> list[float]:
    """As many means of neighbours."""
    stride = math.ceil(len(values) / most)
    groups = [values[begin : begin + stride] for begin in range(0, len(values), stride)]
    return [sum(group) / len(group) for group in groups]


def _gpu_lines(run: SeenRun) -> list[str]:
    samples = recent_samples(run.attempts()[-1])
    newest = {gpu["uuid"]: gpu for sample in samples for gpu in sample["gpus"]}
    if not newest:
        return []
    header = ("GPU", "name", "2 min", "busy", "memory", "temperature", "power")
    rows = [_gpu_row(gpu, mean_use(samples, uuid)) for uuid, gpu in newest.items()]
    return ["  ".join(cells).rstrip() for cells in aligned([header, *rows], right=(0, 3, 4, 5, 6))]


def _gpu_row(gpu: dict[str, Any], use: Sequence[float | None]) -> tuple[str, ...]:
    used, total = number(gpu.get("memory_used_bytes")), number(gpu.get("memory_total_bytes"))
    memory = NOTHING if used is None else size(int(used)) + (f" of {size(int(total))}" if total else "")
    return (
        str(gpu.get("index", NOTHING)),
        str(gpu.get("name", NOTHING)),
        sparkline(use, 0, 100),
        _with_unit(gpu.get("utilisation_percent"), "%"),
        memory,
        _with_unit(gpu.get("temperature_c"), "°C"),
        _with_unit(gpu.get("power_w"), "W"),
    )


def _with_unit(value: object, unit: str) -> str:
    reading = number(value)
    return NOTHING if reading is None else f"{reading:.0f} {unit}"


def _told(run: SeenRun) -> Iterator[tuple[str, str]]:
    """The time of day and the words of the last events, the newest first."""
    events = run.own_events()[-_MOST_EVENTS:]
    for attempt in run.attempts()[-2:]:
        events = events + [e for e in attempt.events()[-4 * _MOST_EVENTS :] if e["writer"] in ("agent", "rank0")]
    for event in sorted(events, key=time_of, reverse=True):
        words = tell(event)
        if words is not None:
            yield time.strftime("%H:%M:%S", time.localtime(time_of(event))), one_line(words)


def _style(words: str) -> str:
    return {"ALARM": "red", "WARNING": "yellow"}.get(words.partition(" ")[0], "none")
