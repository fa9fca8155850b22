"""When a session saves and what it stages: the state of the last step boundary, whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from latentwire.checkpoint.manager import CheckpointManager
from latentwire.config import CheckpointSection
from latentwire.preemption.deadline import Pace
from latentwire.train import randomness
from latentwire.train.state import TrainingState

REASONS = ("", "interval", "steps", "best", "asked", "last", "notice")
"""Why a checkpoint is made; an index is what ranks agree on."""

_RETRY_FAILED_S = 30.0


class Saving:
    """The saves of one attempt. Every rank has one and decides alike; only the writer's reach the disk.

    Args:
        manager: writes and keeps the checkpoints.
        state: what is tracked.
        section: the config's.
        is_writer: rank 0.
        event: writes to the rank's journal.
    """

    def __init__(
        self,
        manager: CheckpointManager,
        state: TrainingState,
        section: CheckpointSection,
        is_writer: bool,
        event: Callable[..., None],
    ) -> None:
        self.manager = manager
        self.pace = Pace()
        """Seconds that the writing of each save took, up to its commit."""
        self._state = state
        self._section = section
        self._is_writer = is_writer
        self._event = event
        self._best_is_new = False
        self._last_save = time.monotonic()
        self._random: dict[str, Any] = {}
        self._versions: tuple[int, ...] = ()

    def remember_boundary(self) -> None:
        """Keep what a save in the middle of the next step needs: the generators now, and a way to see changes."""
        self._random = randomness.capture()
        self._versions = self._state.versions()

    def is_boundary_intact(self) -> bool:
        """Whether the tracked tensors are still those of the last boundary."""
        return self._state.versions() == self._versions

    def new_best(self) -> None:
        """The state at this boundary is the best so far: it is worth a save of its own."""
        self._best_is_new = True

    def reason(self, step: int, last: bool, asked: bool) -> int:
        """Index in ``REASONS`` of why to save at this boundary; 0: do not."""
        section = self._section
        best, self._best_is_new = self._best_is_new, False
        if last:
            return REASONS.index("last")
        if asked:
            return REASONS.index("asked")
        if best:
            return REASONS.index("best")
        if section.interval_steps and step and step % section.interval_steps == 0:
            return REASONS.index("steps")
        return REASONS.index("interval") if self._interval_is_over() else 0

    def poll(self) -> None:
        """Take in what the last save came to, without waiting. Called at every boundary.

        Raises:
            Fenced, CheckpointError: what it ran into, other than a disk error.
        """
        self.manager.poll()
        self._time_last_save()

    def save(self, step: int, reason: str, values: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Stage the last boundary and hand it to the background writer; blocks for the copy, and for a save before it.

        Raises:
            Fenced, CheckpointError: what the save before this one ran into, other than a disk error.
        """
        self._last_save = time.monotonic()
        if not self._is_writer:
            return
        self.manager.wait()  # its buffers are about to be written again
        self._time_last_save()
        snapshot = self._state.capture(step, self._random, values, metrics)
        self.manager.save(snapshot)
        self._event("save_staged", step=step, reason=reason, seconds=round(time.monotonic() - self._last_save, 4))

    def _time_last_save(self) -> None:
        seconds = self.manager.take_last_save_s()
        if seconds is not None:
            self.pace.add(seconds)

    def _interval_is_over(self) -> bool:
        interval = self._section.interval_s
        if self.manager.failure is not None:
            interval = min(interval or _RETRY_FAILED_S, _RETRY_FAILED_S)
        if interval is None or self.manager.busy:
            return False
        return time.monotonic() - self._last_save >= interval
