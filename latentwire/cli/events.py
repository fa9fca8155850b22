"""``latentwire events``: what happened to a run, told by all who took part."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentwire.cli import DEFAULT_RUNS_DIR
from latentwire.cli.arguments import (
    AttemptOption,
    FollowOption,
    RunArgument,
    RunsDirOption,
    find_attempt,
)
from latentwire.cli.following import follow as follow_run
from latentwire.cli.text import NOTHING, figure, one_line
from latentwire.run.journal import Follower, time_of

if TYPE_CHECKING:
    from pathlib import Path

    from latentwire.run.directory import Run

_SHOWN_APART = ("time", "attempt", "writer", "event")


def events(
    run: RunArgument,
    attempt: AttemptOption = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    follow: FollowOption = False,
    runs_dir: RunsDirOption = DEFAULT_RUNS_DIR,
) -> None:
    """Show what happened, from all attempts and the orchestrator."""
    from latentwire.run.directory import open_run

    opened = open_run(run, runs_dir)
    if attempt is not None:
        find_attempt(opened, attempt)
    stream = _Stream(opened, attempt)

    def print_new() -> bool:
        records = stream.read()
        for record in records:
            print(_as_json(record) if json else _as_line(record))
        return bool(records)

    if follow:
        follow_run(opened, print_new)
    else:
        print_new()


class _Stream:
    """The journals of a run, merged; one that begins later joins in."""

    def __init__(self, run: Run, attempt: int | None) -> None:
        self._run = run
        self._attempt = attempt
        self._followers: dict[Path, Follower] = {}

    def read(self) -> list[dict[str, Any]]:
        """What was written since the last call, in order of time."""
        records = [{"attempt": None} | r for r in self._new(self._run.orchestrator_events, {"writer": "orchestrator"})]
        for attempt in self._run.attempts():
            for path in sorted(attempt.path.glob("events.*.jsonl")):
                records += self._new(path, {"attempt": attempt.number, "writer": path.name.split(".")[1]})
        wanted = [r for r in records if self._attempt is None or r["attempt"] == self._attempt]
        return sorted(wanted, key=time_of)

    def _new(self, path: Path, origin: dict[str, Any]) -> list[dict[str, Any]]:
        follower = self._followers.setdefault(path, Follower(path))
        return [record | origin for record in follower.read()]


def _as_json(record: dict[str, Any]) -> str:
    from json import dumps

    return dumps(record)


def _as_line(record: dict[str, Any]) -> str:
    seconds, milliseconds = divmod(round(time_of(record) * 1000), 1000)
    moment = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))}.{milliseconds:03d}"
    fields = " ".join(f"{key}={_value(value)}" for key, value in record.items() if key not in _SHOWN_APART)
    number = NOTHING if record["attempt"] is None else str(record["attempt"])
    line = f"{moment}  {number:>3}  {record['writer']:<12}  {record.get('event', NOTHING)!s:<22}  {fields}"
    return one_line(line.rstrip())


def _value(value: Any) -> str:
    """A word or number as it is, anything with spaces or structure as JSON."""
    from json import dumps

    if isinstance(value, str):
        return value if value and not any(c.isspace() or c in '"=' for c in value) else dumps(value, ensure_ascii=False)
    return figure(value) if isinstance(value, float) and abs(value) < 1e4 else dumps(value, ensure_ascii=False)
