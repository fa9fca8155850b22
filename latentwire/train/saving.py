"""When a session saves and what it stages: the state of the last step boundary, whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from latentwire.checkpoint import interval
from latentwire.checkpoint.layout import Snapshot
from latentwire.checkpoint.manager import CheckpointManager
from latentwire.config import CheckpointSection
from latentwire.errors import CheckpointTorn
from latentwire.monitor.host import free_memory_bytes
from latentwire.preemption.deadline import Pace
from latentwire.run.budget import History
from latentwire.train import randomness
from latentwire.train.ranks import Ranks
from latentwire.train.staging import Staging
from latentwire.train.state import TrainingState

REASONS = ("", "interval", "steps", "best", "asked", "last", "notice")
"""Why a checkpoint is made; an index is what ranks agree on."""

_RETRY_FAILED_S = 30.0
_LAST_SAVE_TRIES = 20
_LAST_SAVE_PAUSES = 60
_MIRROR_LOOK_S = 0.5
_TRAINING_WAITS = ("last", "notice")
"""Nothing is gained by a copy here: the state is written from where it is. What these do not save is lost."""


class Saving:
    """The saves of one attempt. Every rank has one, decides alike and writes its share.

    Args:
        manager: writes and keeps the checkpoints.
        state: what is tracked.
        section: the config's.
        ranks: this one among all.
        history: how the run went so far.
        event: writes to the rank's journal.
    """

    def __init__(
        self,
        manager: CheckpointManager,
        state: TrainingState,
        section: CheckpointSection,
        ranks: Ranks,
        history: History,
        event: Callable[..., None],
    ) -> None:
        self.manager = manager
        self.pace = Pace()
        """Seconds that the writing of each save took, up to its commit."""
        self._state = state
        self._section = section
        self._ranks = ranks
        self._history = history
        self._event = event
        self._best_is_new = False
        self._began = self._last_save = time.monotonic()
        self._stalls = Pace()
        self._interval_s = section.interval_s if section.interval_s != "auto" else interval.SHORTEST_S
        self._chosen: interval.Interval | None = None
        self._random: dict[str, Any] = {}
        self._versions: tuple[int, ...] = ()
        self._updated = False
        self._may_overlap = section.overlap
        limit_gb = section.host_memory_gb
        self._staging = Staging(int(limit_gb * 1e9) if limit_gb else free_memory_bytes() // 2 // ranks.world_size)
        for optimizer in state.optimizers():
            optimizer.register_step_pre_hook(lambda *_: self._before_update())

    def reserve(self, num_bytes: int) -> None:
        """Take memory for the first save's copy in the background."""
        self._staging.reserve(num_bytes // self._ranks.world_size, self._state.is_on_gpu())

    def remember_boundary(self) -> None:
        """Keep what a save in the middle of the next step needs: the generators now, and a way to see changes."""
        self._random = randomness.capture()
        self._versions = self._state.versions()
        self._updated = False

    def is_boundary_intact(self) -> bool:
        """Whether the tracked tensors are still those of the last boundary."""
        return not self._updated and self._state.versions() == self._versions

    def _before_update(self) -> None:
        self._updated = True  # some fused kernels count no change
        self._staging.before_update()

    def new_best(self) -> None:
        """The state at this boundary is the best so far: it is worth a save of its own."""
        self._best_is_new = True

    def reason(self, step: int, last: bool, asked: bool) -> int:
        """Index in ``REASONS`` of why to save at this boundary; 0: do not. Rank 0's clock counts."""
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
        return REASONS.index("interval") if self._ranks.rank == 0 and self._interval_is_over() else 0

    def poll(self) -> None:
        """Take in what the last save came to, without waiting. Called at every boundary.

        Raises:
            Fenced, CheckpointError: what it ran into, other than a disk error.
        """
        self.manager.poll()
        self._time_last_save()

    def save(self, step: int, reason: str, values: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Stage the last boundary and hand it to the background writer; blocks for the copy, and for a save before it.

        Where training waits for the save anyhow, or memory is short, nothing is copied: the state is written from where
        it is, and in the second case this blocks until it is. Every rank.

        Raises:
            Fenced, CheckpointError: what the save before this one ran into, other than a disk error.
        """
        self._last_save = time.monotonic()
        self.manager.wait()  # its buffers are about to be written again
        self._time_last_save()
        waited = time.monotonic() - self._last_save
        live = self._state.snapshot(step, self._random, values, metrics)
        staged = None if reason in _TRAINING_WAITS else self._stage(live)
        if staged is None:
            self._state.wait_for_devices()  # other threads are going to read them
        self.manager.save(staged or live, may_give_up_older=reason in _TRAINING_WAITS)
        if staged is None and reason not in _TRAINING_WAITS:
            self.manager.wait()
        stall = time.monotonic() - self._last_save
        if reason not in _TRAINING_WAITS:
            self._stalls.add(stall)
        how = {"reason": reason, "copied": staged is not None, "waited_s": round(waited, 4)}
        self._event("save_staged", step=step, **how, seconds=round(stall, 4))

    def finish(self, save: Callable[[], None], safe_point: Callable[[], None]) -> None:
        """Wait for the last save; where the disk refuses it, try again for ten minutes, or until a notice comes.

        Every rank. Ends with the last copy to the mirror.

        Args:
            save: begins it anew.
            safe_point: the session's, passed while it waits.

        Raises:
            CheckpointError: it could not be written.
        """
        for _ in range(_LAST_SAVE_TRIES):
            self.save_where_room_was_made(save)
            self.manager.wait()
            (failed,) = self._ranks.highest([float(self.manager.failure is not None)])
            if not failed:
                break
            for _ in range(_LAST_SAVE_PAUSES):  # counted, as every safe point is one of all ranks
                safe_point()
                time.sleep(0.5)
            save()
        while self._ranks.highest([float(not self.manager.wait_for_mirror(_MIRROR_LOOK_S))])[0]:
            safe_point()  # a notice is not kept waiting by a copy, and the next attempt makes it
        self.manager.close()

    def save_where_room_was_made(self, save: Callable[[], None]) -> None:
        """Wait for a save; on a full disk older checkpoints go, one for each try more, rather than the last steps."""
        while self._ranks.highest([float(self.manager.made_room())])[0]:
            save()

    def _stage(self, live: Snapshot) -> Snapshot | None:
        if isinstance(self.manager.failure, CheckpointTorn):
            self._may_overlap = False  # a loop that does this once does it again
        try:
            return self._staging.stage(live, self.manager.share_of(live), self._may_overlap)
        except (RuntimeError, MemoryError) as error:  # no memory to pin, or none at all: streaming needs little
            self._event("staging_failed", step=live.step, error=str(error))
            return None

    def _time_last_save(self) -> None:
        seconds = self.manager.take_last_save_s()
        if seconds is not None:
            self.pace.add(seconds)
            if self._section.interval_s == "auto":
                self._choose_interval()

    def _choose_interval(self) -> None:
        trained_s = self._history.seconds + time.monotonic() - self._began
        stall_s = max(self._stalls.p95, 1e-3)
        chosen = interval.choose(stall_s, self.pace.p95 * 2, trained_s, self._history.num_preemptions)
        if self._chosen is None or abs(chosen.seconds - self._chosen.seconds) > 0.1 * self._chosen.seconds:
            self._event("interval_chosen", seconds=round(chosen.seconds, 1), reason=chosen.reason)
            self._chosen, self._interval_s = chosen, chosen.seconds

    def _interval_is_over(self) -> bool:
        seconds = self._interval_s
        if self.manager.failure is not None:
            seconds = min(seconds or _RETRY_FAILED_S, _RETRY_FAILED_S)
        if seconds is None or self.manager.busy:
            return False
        return time.monotonic() - self._last_save >= seconds
