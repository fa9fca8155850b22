"""The report of each run whose attempt has ended, written by a process beside the orchestrator, or else the job."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
import tempfile
import threading
import time
from typing import IO

from latentwire.run.directory import Run

_AT_THE_END_S = 60.0
_LONGEST_S = 300.0
_POLL_S = 0.05

log = logging.getLogger("latentwire.orchestrate")


class _Writing:
    """A report under way, in a process of its own; its words go to a file, which never fills up."""

    def __init__(self, run: Run) -> None:
        """Start it.

        Raises:
            OSError: no process can be started.
        """
        self.name = run.name
        self._began = time.monotonic()
        self._said: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as this
        command = [sys.executable, "-m", "latentwire.views.report", str(run.path)]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=self._said, text=True)

    def failure(self) -> str | None:
        """None while it is written; then what went wrong, empty where nothing did."""
        if time.monotonic() - self._began > _LONGEST_S:
            self.end()
        code = self._process.poll()
        if code is None:
            return None
        self._said.seek(0)
        lines = self._said.read().strip().splitlines()
        self._said.close()
        return (lines[-1][:300] if lines else f"exit {code}") if code else ""

    def end(self) -> None:
        """Write it no more."""
        self._process.kill()
        self._process.wait()


class Reports:
    """Writes ``report.html``, one run after the other: it costs some processor time here.

    One that fails is told of in the log alone: the last line of a run's journal has a meaning of its own. Where plotly
    is not installed nobody asked for pictures, and there are no reports.
    """

    def __init__(self) -> None:
        self._is_possible = importlib.util.find_spec("plotly") is not None
        self._wanted: dict[str, Run] = {}
        self._writing: _Writing | None = None

    def want(self, run: Run) -> None:
        """Note that the run has changed. Does not block."""
        if self._is_possible:
            self._wanted[run.name] = run

    def go_on(self) -> None:
        """Start the next, if none is being written; does not block."""
        if self._writing is not None:
            failure = self._writing.failure()
            if failure is None:
                return
            if failure:
                log.warning("%s: no report was written: %s", self._writing.name, failure)
            self._writing = None
        if self._wanted:
            run = self._wanted.pop(next(iter(self._wanted)))
            try:
                self._writing = _Writing(run)
            except OSError as error:  # the next attempt's end asks again
                log.warning("%s: no report was written: %s", run.name, error)

    def finish(self, stop: threading.Event) -> None:
        """Write those that are still wanted; called when nothing else is left. Blocks until ``stop``, or a minute."""
        deadline = time.monotonic() + _AT_THE_END_S
        self.go_on()
        while self._writing is not None and time.monotonic() < deadline and not stop.wait(_POLL_S):
            self.go_on()
        if self._writing is not None:
            self._writing.end()
