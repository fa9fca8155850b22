"""The table of all runs: that of ``latentwire status``, of ``latentwire watch`` and of the orchestrator's board.

Where there is not room for all columns, those that matter least are left out, and no line is cut. Light: see
``latentwire.cli.main``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from latentwire.cli.gpu_use import gpu_use
from latentwire.cli.text import GAP, NOTHING, aligned, bar, cut, duration, figure, one_line, sparkline
from latentwire.run.directory import Run, list_runs
from latentwire.run.disk import told
from latentwire.run.seen import SeenRun
from latentwire.run.status import RunStatus, status_of

ALIVE = ("RUNNING", "STALLED")
COLOURS = {
    "RUNNING": "green",
    "DONE": "green",
    "STALLED": "yellow",
    "LOST": "yellow",
    "RETRYING": "yellow",
    "PREEMPTED": "cyan",
    "REQUEUED": "cyan",
    "FAILED": "red",
}
"""Preempted is not failed, and has a colour of its own."""
STATE_COLUMN = 1
_IN_TROUBLE = ("STALLED", "LOST", "RETRYING", "FAILED")
_BAR_WIDTH = 10
_LEAST_NOTE = 20
_MOST_OF_A_NAME = 32


@dataclasses.dataclass(frozen=True)
class Row:
    """A run in the table.

    Attributes:
        status: of the run.
        gpu_percent: how busy its GPUs were of late, oldest first; empty where it has none.
        job: what the scheduler says of its job, where it was asked.
    """

    status: RunStatus
    gpu_percent: Sequence[float | None] = ()
    job: str = ""


@dataclasses.dataclass(frozen=True)
class _Column:
    """A column: what it shows, and its rank when there is not room for all (1 is left out last)."""

    title: str
    rank: int
    cell: Callable[[Row, float], str]
    right: bool = False


_COLUMNS = (
    _Column("run", 1, lambda row, now: row.status.name),
    _Column("state", 1, lambda row, now: row.status.state),
    _Column("attempt", 6, lambda row, now: str(row.status.attempt), right=True),
    _Column("preempted", 7, lambda row, now: str(row.status.num_preemptions), right=True),
    _Column("step", 2, lambda row, now: f"{row.status.step}/{figure(row.status.total_steps)}", right=True),
    _Column("progress", 12, lambda row, now: _progress(row.status)),
    _Column("loss", 10, lambda row, now: figure(row.status.loss), right=True),
    _Column("samples/s", 11, lambda row, now: figure(row.status.samples_per_s), right=True),
    _Column("ETA", 5, lambda row, now: duration(row.status.eta_s), right=True),
    _Column("verified", 3, lambda row, now: _age(row.status.verified_at, now), right=True),
    _Column("goodput", 4, lambda row, now: percent(row.status.goodput), right=True),
    _Column("GPU", 8, lambda row, now: sparkline(row.gpu_percent, 0, 100)),
    _Column("job", 2, lambda row, now: row.job),
)
_NOTE = _Column("note", 9, lambda row, now: row.status.reason or row.status.warning or row.status.phase or "")


class Fleet:
    """All runs of a folder, as they were at the last look.

    Attributes:
        runs: that could be read.
        unreadable: in words, why others could not.
    """

    def __init__(self, runs_dir: Path) -> None:
        """Nothing is read yet."""
        self._runs_dir = runs_dir
        self._rows: dict[Path, tuple[SeenRun, Row]] = {}
        self.runs: list[SeenRun] = []
        self.unreadable: list[str] = []

    def look(self, now: float) -> list[Row]:
        """A row for each run, by name. Reads what is new; a run that vanished meanwhile is left out."""
        before, self._rows, self.unreadable = self._rows, {}, []
        for run in list_runs(self._runs_dir):
            try:
                self._rows[run.path] = _look_at(run, before.get(run.path), now)
            except OSError as error:
                self.unreadable.append(f"{run.name} cannot be read: {told(error)}")
        self.runs = [seen for seen, _ in self._rows.values()]
        return [row for _, row in self._rows.values()]


def _look_at(run: Run, before: tuple[SeenRun, Row] | None, now: float) -> tuple[SeenRun, Row]:
    """What was seen before, if nothing was written since and it does not run."""
    seen = before[0] if before else SeenRun(run)
    if before and not seen.look() and before[1].status.state not in ALIVE:
        return before
    status = status_of(seen, now)
    return seen, Row(status, gpu_use(seen.attempts()[-1]) if status.state in ALIVE else [])


def table(rows: Sequence[Row], now: float, width: int | None) -> tuple[list[list[str]], list[str]]:
    """The header and a line for each run, as cells of equal width; and what of a run in trouble found no room.

    Args:
        rows: the runs.
        now: seconds since the epoch.
        width: how many characters a line may have; None: as many as it takes.
    """
    cells = {column.title: _cells(column, rows, now) for column in (*_COLUMNS, _NOTE)}
    if width is not None:
        cells["run"] = [_shortened(name, max(12, min(_MOST_OF_A_NAME, width // 4))) for name in cells["run"]]
    filled = [column for column in (*_COLUMNS, _NOTE) if any(cells[column.title][1:])]
    shown = filled if width is None else _that_fit(filled, cells, width)
    if _NOTE in shown and width is not None:
        room = width - sum(_width(cells[c.title]) + len(GAP) for c in shown if c is not _NOTE)
        cells["note"] = [cut(note, room) for note in cells["note"]]
    right = [index for index, column in enumerate(shown) if column.right]
    lines = aligned(list(zip(*(cells[column.title] for column in shown), strict=True)), right)
    return lines, [] if _NOTE in shown else _notes(rows, width)


def percent(share: float | None) -> str:
    """``93.1 %``."""
    return NOTHING if share is None else f"{100 * share:.1f} %"


def _cells(column: _Column, rows: Sequence[Row], now: float) -> list[str]:
    cells = [one_line(column.cell(row, now)) for row in rows]
    return [column.title, *cells]


def _that_fit(columns: Sequence[_Column], cells: dict[str, list[str]], width: int) -> list[_Column]:
    """Those that matter most, in the order of the table."""
    room = width + len(GAP)
    shown = []
    for column in sorted(columns, key=lambda column: column.rank):
        needs = min(_width(cells[column.title]), _LEAST_NOTE if column is _NOTE else width) + len(GAP)
        if needs <= room or column.rank == 1:
            shown.append(column)
            room -= needs
    return [column for column in columns if column in shown]


def _width(cells: Sequence[str]) -> int:
    return max(map(len, cells))


def _notes(rows: Sequence[Row], width: int | None) -> list[str]:
    told = {row.status.name: row.status.reason or row.status.warning for row in rows if _is_in_trouble(row.status)}
    lines = [one_line(f"{name}: {words}") for name, words in told.items() if words]
    return lines if width is None else [cut(line, width) for line in lines]


def _is_in_trouble(status: RunStatus) -> bool:
    return status.state in _IN_TROUBLE or status.warning is not None


def _age(then: float | None, now: float) -> str:
    """Clocks may differ: what comes from the future is new."""
    return duration(None if then is None else max(0.0, now - then))


def _progress(status: RunStatus) -> str:
    if not status.total_steps:
        return NOTHING
    share = min(1.0, status.step / status.total_steps)
    return f"{bar(share, _BAR_WIDTH)} {int(100 * share):>3} %"


def _shortened(name: str, limit: int) -> str:
    """The beginning and the end of a name: names of a fleet often begin alike."""
    if len(name) <= limit:
        return name
    tail = (limit - 1) // 2
    return f"{name[: limit - 1 - tail]}…{name[-tail:]}"
