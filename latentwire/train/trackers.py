"""The experiment trackers beside the ranks of the leader's node: a process each, that only the end waits for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from latentwire.run.directory import Attempt
from latentwire.run.journal import Journal

LOG = "tracker.log"
_POLL_S = 0.05


class Trackers:
    """Starts them, tells of one that died, and ends them. Training goes on whatever they do.

    Args:
        attempt: during which they run; they send the curve of all attempts.
        names: as in the config.
        journal: the agent's.
    """

    def __init__(self, attempt: Attempt, names: Sequence[str], journal: Journal) -> None:
        self._attempt, self._names, self._journal = attempt, names, journal
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._is_ending = False

    def start(self) -> None:
        """Start them all. Called with the signals blocked that the agent hears.

        Raises:
            OSError: a process could not be started, or the log not be opened.
        """
        for name in self._names:
            log = os.open(self._attempt.path / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            options = ["--with", name, "--until-stdin-closes"]
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "latentwire", "track", str(self._attempt.run.path), *options],
                env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},  # it imports torch and shall leave the GPUs alone
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            os.close(log)

    def look(self) -> None:
        """Tell of those that ended by themselves, once."""
        for name, process in list(self._processes.items()):
            if process.poll() is not None and not (self._is_ending and process.returncode == 0):
                self._tell_ended(name)

    def begin_to_end(self) -> None:
        """Tell them to send what is there and to end. Does not block."""
        self._is_ending = True
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.close()

    def end(self, within_s: float, is_urgent: Callable[[], bool]) -> None:
        """Wait for what is there to be sent; what is not is sent by those of the next attempt. Blocks.

        Args:
            within_s: so long at most.
            is_urgent: the machine is to be given back: not a moment longer.
        """
        self.begin_to_end()
        began = time.monotonic()
        while self._running() and time.monotonic() - began < within_s and not is_urgent():
            time.sleep(_POLL_S)
        for name, process in list(self._processes.items()):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # some have helpers of their own
                process.wait()
                self._journal.event("tracker_cut_short", tracker=name, after_s=round(time.monotonic() - began, 1))
            elif process.returncode:
                self._tell_ended(name)
        self._processes.clear()

    def _running(self) -> bool:
        return any(process.poll() is None for process in self._processes.values())

    def _tell_ended(self, name: str) -> None:
        process = self._processes.pop(name)
        assert process.stdin is not None
        process.stdin.close()
        cure = f"see {LOG}; what it did not send is sent by the next attempt, or: latentwire track RUN --with {name}"
        self._journal.event("tracker_ended", tracker=name, exit_code=process.returncode, cure=cure)
