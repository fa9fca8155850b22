"""``latentwire watch``: all runs, or one of them, drawn anew about once a second."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from latentwire.cli import DEFAULT_RUNS_DIR
from latentwire.cli.arguments import RunsDirOption
from latentwire.errors import TerminalNeeded

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_EVERY_S = 1.0
_REST = 4.0
"""After a look it rests at least so many times as long as the look took: a large fleet is looked at less often."""


def watch(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run's name or directory; without one: all.")
    ] = None,
    runs_dir: RunsDirOption = DEFAULT_RUNS_DIR,
) -> None:
    """Watch the runs, or one of them, live. Leave with q or Ctrl-C; the runs go on.

    Reads only what is new; where there is no terminal, `latentwire status` shows the same once.
    """
    from rich.console import Console

    from latentwire.cli.pages import FleetPage, RunPage
    from latentwire.run.directory import open_run

    console = Console()
    page: _Page = FleetPage(runs_dir) if run is None else RunPage(open_run(run, runs_dir))
    if not (console.is_terminal and sys.stdout.isatty() and sys.stdin.isatty()) or console.is_dumb_terminal:
        again = "latentwire status" if run is None else f"latentwire status {run}"
        raise TerminalNeeded(f"`latentwire watch` draws on a terminal, and this is none: use `{again}`")
    _draw_until_left(console, page)


class _Page(Protocol):
    def draw(self, now: float, width: int, height: int) -> Text: ...


def _draw_until_left(console: Console, page: _Page) -> None:
    from rich.live import Live

    with _keys() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            began = time.monotonic()
            live.update(page.draw(time.time(), console.width, console.height), refresh=True)
            if keys.wait_for_q(max(_EVERY_S, _REST * (time.monotonic() - began))):
                return


class _Keys:
    """The keyboard, and the news that the terminal has another size."""

    def __init__(self, news: int) -> None:
        self._keyboard = sys.stdin.fileno()
        self._news = news

    def wait_for_q(self, seconds: float) -> bool:
        """Whether ``q`` is pressed, or the terminal goes away; ends early where the terminal has another size."""
        readable, _, _ = select.select([self._keyboard, self._news], [], [], seconds)
        if self._news in readable:
            os.read(self._news, 4096)
        if self._keyboard not in readable:
            return False
        pressed = os.read(self._keyboard, 4096)
        return not pressed or b"q" in pressed.lower()


@contextlib.contextmanager
def _keys() -> Iterator[_Keys]:
    """Keys come at once and are not echoed, until it is left; the terminal is then as it was."""
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    quiet = termios.tcgetattr(keyboard)
    quiet[3] &= ~(termios.ICANON | termios.ECHO)
    quiet[6][termios.VSUSP] = b"\0"  # Ctrl-Z would leave a terminal that is drawn upon
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    handlers = {
        signal.SIGWINCH: signal.signal(signal.SIGWINCH, lambda *_: None),  # so that it is heard on the pipe
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)),
    }
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    termios.tcsetattr(keyboard, termios.TCSADRAIN, quiet)
    try:
        yield _Keys(reading)
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(reading)
        os.close(writing)
