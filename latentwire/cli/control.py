"""``latentwire preempt`` and ``cancel``: a word to a running attempt, sent the way the scheduler sends it."""

from __future__ import annotations

import enum
import signal as signals
from typing import Annotated

import typer

from latentwire.cli import DEFAULT_RUNS_DIR
from latentwire.cli.arguments import RunArgument, RunsDirOption
from latentwire.cli.text import one_line


class Signal(str, enum.Enum):
    """The signals that a scheduler or a person sends to a run."""

    TERM = "TERM"
    USR1 = "USR1"
    USR2 = "USR2"
    INT = "INT"
    KILL = "KILL"


def preempt(
    run: RunArgument,
    signal: Annotated[
        Signal,
        typer.Option(
            metavar="|".join(Signal.__members__),
            case_sensitive=False,
            help="TERM, USR2: the machine is taken away. USR1: save and go on. INT: save and leave. KILL: no warning.",
        ),
    ] = Signal.TERM,
    runs_dir: RunsDirOption = DEFAULT_RUNS_DIR,
) -> None:
    """Send a running attempt the signal of a preemption."""
    from latentwire.run.directory import open_run
    from latentwire.scheduler.control import signal_run

    opened = open_run(run, runs_dir)
    to = signal_run(opened, signals.Signals[f"SIG{signal.value}"])
    print(one_line(f"sent SIG{signal.value} to {to}; what it does with it: latentwire events {opened.name} --follow"))


def cancel(run: RunArgument, runs_dir: RunsDirOption = DEFAULT_RUNS_DIR) -> None:
    """Let a run save and leave; nobody starts it again."""
    from latentwire.run.directory import open_run
    from latentwire.scheduler.control import cancel_run

    for line in cancel_run(open_run(run, runs_dir)):
        print(one_line(line))
    print(one_line(f"nobody starts it again; to take that back: python -m latentwire.orchestrate --resume {run}"))
