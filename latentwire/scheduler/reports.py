"""The report of each run whose attempt has ended, written by a process beside the orchestrator."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import time

from latentwire.scheduler.watched import Watched

_AT_THE_END_S = 60.0
_POLL_S = 0.05


class Reports:
    """Writes ``report.html``, one run after the other: it costs a second of a processor, and no job any time.

    Where plotly is not installed nobody asked for pictures, and there are no reports.
    """

    def __init__(self) -> None:
        self._is_possible = importlib.util.find_spec("plotly") is not None
        self._wanted: dict[str, Watched] = {}
        self._writing: tuple[Watched, subprocess.Popen[str]] | None = None

    def want(self, watched: Watched) -> None:
        """Note that the run has changed. Does not block."""
        if self._is_possible:
            self._wanted[watched.run.name] = watched

    def go_on(self) -> None:
        """Start the next, if none is being written; one that failed becomes an event. Does not block."""
        if self._writing is not None:
            watched, process = self._writing
            if process.poll() is None:
                return
            self._writing = None
            said = process.communicate()[1].strip()
            if process.returncode:
                error = said.splitlines()[-1][:300] if said else f"exit {process.returncode}"
                watched.journal.event("report_failed", error=error)
        if self._wanted:
            watched = self._wanted.pop(next(iter(self._wanted)))
            command = ["nice", sys.executable, "-m", "latentwire.views.report", str(watched.run.path)]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            self._writing = watched, process

    def finish(self, stop: threading.Event) -> None:
        """Write those that are still wanted; called when nothing else is left. Blocks until ``stop``, or a minute."""
        deadline = time.monotonic() + _AT_THE_END_S
        self.go_on()
        while self._writing is not None and time.monotonic() < deadline and not stop.wait(_POLL_S):
            self.go_on()
