"""PreemptionHandler: signal handlers that store what came and when, and nothing else.

========  ===========================================================
TERM      notice: the machine is about to be taken away
USR2      notice (or save and go on, where ``save_signal`` says so)
USR1      save and go on (``save_signal``)
INT       save and leave; a second one: leave now
========  ===========================================================

What was stored is acted on at safe points of the training loop, on all ranks at the same one.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""The signals that a launcher blocks before it starts a rank, so that none is lost before the rank's handlers stand."""

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: not a failure, start me again."""


@dataclasses.dataclass(frozen=True)
class Notice:
    """The first word that the machine is to be given back.

    Attributes:
        signal: its name, ``SIGTERM``.
        monotonic_s: ``time.monotonic()`` when it came; compare deadlines with this.
        unix_s: the wall clock then, for people.
    """

    signal: str
    monotonic_s: float
    unix_s: float


class Preempted(SystemExit):
    """The machine is to be given back: the state is committed, unwind and leave. Let it pass; it exits with 75.

    Attributes:
        step: completed steps that are safe on disk; None where the run has none yet.
        error: why the last steps could not be saved, None if they are.
    """

    def __init__(self, step: int | None, error: str | None = None) -> None:
        super().__init__(EXIT_CODE)
        self.step = step
        self.error = error


class PreemptionHandler:
    """Records notices of this process. Install it in the main thread; ask it at safe points.

    Args:
        save_signal: ``"USR1"``, ``"USR2"`` or ``"none"``.
        clock, wall: seconds, monotonic and since the epoch.
    """

    def __init__(
        self,
        save_signal: str = "USR1",
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._save_signal = None if save_signal == "none" else signal.Signals[f"SIG{save_signal}"]
        self._clock = clock
        self._wall = wall
        self._pid = os.getpid()
        self._previous: dict[signal.Signals, Any] = {}
        self._notice: Notice | None = None
        self._saves_requested = 0
        self._saves_taken = 0
        self._interrupts = 0

    @property
    def notice(self) -> Notice | None:
        """The first notice; later ones change nothing."""
        return self._notice

    @property
    def leave_now(self) -> bool:
        """INT came twice: leave without saving."""
        return self._interrupts >= 2

    def take_save_request(self) -> bool:
        """Whether a save was asked for since the last call."""
        requested, taken = self._saves_requested, self._saves_taken
        self._saves_taken = requested
        return requested != taken

    def install(self) -> None:
        """Bind the signals and unblock them: one that came while blocked is recorded now. Main thread only."""
        self._pid = os.getpid()
        for signum in HANDLED:
            self._previous[signum] = signal.signal(signum, self._record)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)

    def uninstall(self) -> None:
        """Put back what was bound before."""
        for signum, previous in self._previous.items():
            signal.signal(signum, previous if previous is not None else signal.SIG_DFL)
        self._previous.clear()

    def __enter__(self) -> PreemptionHandler:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.uninstall()

    def _record(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked child that never asked for this handler
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        if signum == self._save_signal:
            self._saves_requested += 1
            return
        if signum == signal.SIGINT:
            self._interrupts += 1
        if signum == signal.SIGUSR1:
            return  # not bound to a meaning here; its default would kill us
        if self._notice is None:
            self._notice = Notice(signal.Signals(signum).name, self._clock(), self._wall())


def ignore_signals(*_: object) -> None:
    """For DataLoader workers (``worker_init_fn``): Slurm signals them too, and a dead worker ends the epoch."""
    for signum in HANDLED:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)


@contextmanager
def blocked() -> Iterator[None]:
    """Hold the handled signals back in this thread and in the processes started inside; they are delivered after."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
