"""What the orchestrator shows: a live table on a terminal, plain lines anywhere else."""

from __future__ import annotations

import collections
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from latentwire.cli.drawing import fleet_text
from latentwire.cli.fleet import Row
from latentwire.cli.text import duration, figure, one_line
from latentwire.run.status import RunStatus

_LINES_SHOWN = 8
_PLAIN_EVERY_S = 10.0


class Board(logging.Handler):
    """Shows statuses and the log's lines while it is entered.

    Args:
        log: its lines are shown.
        log_path: where they are written too; told at the start.
    """

    def __init__(self, log: logging.Logger, log_path: Path) -> None:
        super().__init__()
        self._log = log
        self._console = Console()
        self._recent: collections.deque[str] = collections.deque(maxlen=_LINES_SHOWN)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._shown: dict[str, tuple[object, int, float]] = {}
        self._console.print(f"log: {log_path}", highlight=False)

    def __enter__(self) -> Board:
        self._log.addHandler(self)
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        self._log.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line of the log."""
        line = one_line(f"{time.strftime('%H:%M:%S')} {record.getMessage()}")
        if self._live is not None:
            self._recent.append(line)
        else:
            print(line, flush=True)

    def show(self, statuses: Sequence[RunStatus]) -> None:
        """Draw the present state: on a terminal of all runs that there is room for, elsewhere of those that changed."""
        if self._live is not None:
            lines = Text("\n".join(self._recent), style="dim", overflow="ellipsis", no_wrap=True)
            room = self._console.height - _LINES_SHOWN - 1
            runs = fleet_text([Row(status) for status in statuses], time.time(), self._console.width, room)
            self._live.update(Group(runs, lines), refresh=True)
            return
        for status in statuses:
            self._show_plainly(status)

    def _show_plainly(self, status: RunStatus) -> None:
        """A line when the run's state changes, and now and then while it makes steps."""
        state = (status.state, status.phase, status.attempt, status.reason)
        before, step, shown = self._shown.get(status.name, (None, 0, 0.0))
        if state == before and (status.step == step or time.monotonic() - shown < _PLAIN_EVERY_S):
            return
        self._shown[status.name] = (state, status.step, time.monotonic())
        print(f"{time.strftime('%H:%M:%S')} {_line(status)}", flush=True)

    def epilogue(self, statuses: Sequence[RunStatus], max_running: int | None, stopped: bool) -> None:
        """The last words: what became of each run, and what to type next."""
        for status in statuses:
            print(_line(status))
            if status.weights_sha256 is not None:
                print(f"  weights  sha256 {status.weights_sha256}")
                print(f"  files    {status.path}")
        if stopped:
            command = "python -m latentwire.orchestrate --resume"
            command += "" if max_running is None else f" --max-running {max_running}"
            print(f"the orchestrator stopped; jobs go on. Take over again: {command}")
        print("next:")
        for command in _next_commands(statuses[0]):
            print(f"  {command}")
        sys.stdout.flush()


def _next_commands(status: RunStatus) -> list[str]:
    if status.state == "DONE":
        return [
            f"latentwire status {status.name}",
            f"latentwire checkpoints verify {status.name}",
            f"latentwire events {status.name}",
            "latentwire drill",
        ]
    return [f"latentwire status {status.name}", f"latentwire logs {status.name} --stderr"]


def _line(status: RunStatus) -> str:
    words = [f"{status.name}: {status.state}" + (f" ({status.phase})" if status.phase else "")]
    words.append(f"attempt {status.attempt}")
    words.append(f"step {status.step}/{status.total_steps or '?'}")
    if status.loss is not None:
        words.append(f"loss {figure(status.loss)}")
    if status.samples_per_s is not None:
        words.append(f"{figure(status.samples_per_s)} samples/s")
    if status.eta_s is not None:
        words.append(f"ETA {duration(status.eta_s)}")
    if status.num_preemptions:
        words.append(f"{status.num_preemptions} preempted")
    if status.reason or status.warning:
        words.append(status.reason or status.warning or "")
    return one_line(", ".join(words))
