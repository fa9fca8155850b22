"""``latentwire timeline``: the course of a run, line by line."""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from latentwire.cli import DEFAULT_RUNS_DIR
from latentwire.cli.arguments import RunArgument, RunsDirOption
from latentwire.cli.text import GAP, NOTHING, aligned, cut, duration, painted, terminal_width

if TYPE_CHECKING:
    from collections.abc import Sequence

    from latentwire.run.course import Entry

_COLOURS = {
    "training": "green",
    "queued": "cyan",
    "draining": "cyan",
    "notice": "cyan",
    "redoing": "yellow",
    "failed": "red",
}
_KIND_COLUMN = 3


def timeline(
    run: RunArgument,
    every: Annotated[bool, typer.Option("--all", help="Each save and evaluation on a line of its own.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line, times in unix seconds.")] = False,
    runs_dir: RunsDirOption = DEFAULT_RUNS_DIR,
) -> None:
    """Show the course of a run: queued, started, restored, trained, preempted, and how long each took."""
    from latentwire.run.course import course_of
    from latentwire.run.directory import open_run
    from latentwire.run.seen import SeenRun
    from latentwire.run.status import account_of

    seen, now = SeenRun(open_run(run, runs_dir)), time.time()
    entries = course_of(seen, account_of(seen, now), now, whole=every)
    if json:
        _print_json(entries)
    elif entries:
        _print_lines(entries)
    else:
        print(f"{seen.name} has not been started yet", file=sys.stderr)


def _print_json(entries: Sequence[Entry]) -> None:
    from json import dumps

    for entry in entries:
        print(dumps(dataclasses.asdict(entry)))


def _print_lines(entries: Sequence[Entry]) -> None:
    rows = [("when", "took", "attempt", "what", "")]
    day = ""
    for entry in entries:
        begun = time.localtime(entry.time)
        today = time.strftime("%Y-%m-%d", begun)
        rows.append(_row(entry, f"{'' if today == day else today} {time.strftime('%H:%M:%S', begun)}"))
        day = today
    width = terminal_width()
    header, *lines = aligned(rows, right=(0, 1, 2))
    print(GAP.join(header).rstrip())
    for cells, entry in zip(lines, entries, strict=True):
        room = sum(map(len, cells[:-1])) + len(GAP) * (len(cells) - 1)
        words = cells[-1] if width is None else cut(cells[-1].rstrip(), max(8, width - room))
        colour = _COLOURS.get(entry.kind) or {"ALARM": "red", "WARNING": "yellow"}.get(words.partition(" ")[0], "")
        cells[_KIND_COLUMN] = painted(cells[_KIND_COLUMN], colour)
        print(GAP.join([*cells[:-1], words]).rstrip())


def _row(entry: Entry, moment: str) -> tuple[str, str, str, str, str]:
    number = NOTHING if entry.attempt is None else str(entry.attempt)
    took = "" if entry.seconds is None else _seconds(entry.seconds)
    return moment, took, number, "" if entry.seconds is None else entry.kind, entry.words


def _seconds(seconds: float) -> str:
    """Short ones with a decimal: a restart takes seconds."""
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)
