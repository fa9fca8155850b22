"""Reading on while a run goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentwire.run.directory import Run

_POLL_S = 0.25
_LAST_OUTCOMES = ("finished", "cancelled", "interrupted")


def follow(run: Run, read: Callable[[], bool]) -> None:
    """Call ``read`` until it finds nothing more and the run is over. Blocks; a preempted run is waited for.

    Args:
        run: whose end is the end.
        read: prints what is new and says whether there was anything.
    """
    follow_until(lambda: _is_over(run), read)


def follow_until(is_over: Callable[[], bool], read: Callable[[], bool]) -> None:
    """Call ``read`` until it finds nothing more and ``is_over`` said so before. Blocks."""
    while True:
        over = is_over()  # asked first: what was written before the end is then read for certain
        anything = read()
        sys.stdout.flush()
        if not anything:
            if over:
                return
            time.sleep(_POLL_S)


def _is_over(run: Run) -> bool:
    attempts = run.attempts()
    ended = attempts[-1].ended() if attempts else None
    return ended is not None and ended.get("outcome") in _LAST_OUTCOMES
