"""What the records of an attempt say of now: the figures that alerts are made from. Pure, with a clock of one's choice.

Moments are those at which a record was taken in, by the reader's own clock. None: not known, or not known any more.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable

from latentwire.monitor.figures import Record, figure_of, gpus_of, host_of, percent
from latentwire.run.figures import whole

FRESH_S = 90.0
"""A reading that is older says nothing of now."""
_STEPS_COUNTED, _STEPS_AT_LEAST = 1000, 100
"""A single skipped step in the first hundred is no rate."""
_SAVES_COUNTED = 5
_BASELINE, _BASELINE_AT_LEAST, _RECENT = 100, 20, 5
_SIGMA = 1.4826
"""The standard deviation of a normal distribution, in median absolute deviations."""
_LEAST_SPREAD = 0.01
"""Of the loss: one that hardly moves may still do so by a hundredth."""
_USUAL_SPREAD = 4.0
"""A loss further above its course is not taken for a part of it."""
_SIGNS_OF_LIFE = frozenset(
    {"attempt_started", "workload_built", "micro_batch_found", "restored", "warmup_started", "warmup_finished",
     "training_started", "evaluation_started", "evaluation_finished"}
)  # fmt: skip
_LEAVING = frozenset({"notice", "draining", "left", "training_finished", "attempt_ended"})


class Vitals:
    """Takes records in and tells figures. Each of its methods without arguments is one figure.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.is_leaving = False
        """A notice came, or training is over: what stands still now is meant to."""
        self._clock = clock
        self._moved_at = clock()
        self._verified_at: float | None = None
        self._is_training = False
        self._gpus: dict[str, tuple[float, Record]] = {}
        self._worked: set[str] = set()
        self._busy: list[float] = []
        self._busy_mean: tuple[float, float] | None = None
        self._disk: tuple[float, float] | None = None
        self._step = self._num_steps = 0
        self._skipped: deque[int] = deque(maxlen=_STEPS_COUNTED)
        self._saves: deque[bool] = deque(maxlen=_SAVES_COUNTED)
        self._save_error = "without a reason"
        self._losses = LossSpread()
        self._warning: str | None = None

    # --- records ------------------------------------------------------------------------------------------------------

    def event(self, record: Record) -> None:
        """Of the agent or of rank 0."""
        name, now = str(record.get("event")), self._clock()
        self.is_leaving = self.is_leaving or name in _LEAVING
        self._is_training = self._is_training or name == "training_started"
        if name in _SIGNS_OF_LIFE:
            self._moved_at = now
        if name in ("restored", "save_verified"):  # what is restored was read back whole
            self._verified_at = now
        elif name == "step_skipped":
            self._skipped.append(whole(record.get("step"), self._step))
        elif name in ("save_committed", "save_failed", "save_torn"):
            self._saves.append(name == "save_committed")
            self._save_error = str(record.get("error") or self._save_error)
        elif name == "forecast":
            self._warning = str(record.get("warning") or "")

    def step(self, record: Record) -> None:
        """A line of ``metrics.jsonl``."""
        self._moved_at = self._clock()
        self._step = whole(record.get("step"), self._step)
        self._num_steps += 1
        if "loss" in record:
            loss = figure_of(record, "loss")
            self._losses.take(math.inf if loss is None else loss)  # NaN and Infinity are words in a journal

    def sample(self, record: Record) -> None:
        """A line of ``gpu_stats.jsonl``."""
        now, host = self._clock(), host_of(record)
        free = percent(figure_of(host, "disk_free_bytes"), figure_of(host, "disk_total_bytes"))
        if free is not None:
            self._disk = (now, free)
        for gpu in gpus_of(record):
            uuid, busy = str(gpu.get("uuid")), figure_of(gpu, "utilisation_percent")
            self._gpus[uuid] = (now, gpu)
            if busy is None or not self._is_training:
                continue
            if busy > 0:
                self._worked.add(uuid)
            if uuid in self._worked:  # others on the node are not this run's
                self._busy.append(busy)

    def judged(self) -> None:
        """All figures were looked at: means and extremes begin anew."""
        if self._busy:
            self._busy_mean, self._busy = (self._clock(), statistics.fmean(self._busy)), []
        self._losses.judged()

    # --- figures ------------------------------------------------------------------------------------------------------

    def utilisation_percent(self) -> float | None:
        """Mean over the GPUs that work, while training, since the last judgement."""
        return statistics.fmean(self._busy) if self._busy else self._fresh(self._busy_mean)

    def memory_percent(self) -> float | None:
        """How full the fullest GPU is."""
        gpus = self._fresh_gpus()
        return _highest(percent(figure_of(g, "memory_used_bytes"), figure_of(g, "memory_total_bytes")) for g in gpus)

    def temperature_c(self) -> float | None:
        """Of the hottest GPU."""
        return _highest(figure_of(gpu, "temperature_c") for gpu in self._fresh_gpus())

    def disk_free_percent(self) -> float | None:
        """Of the file system that the run is on."""
        return self._fresh(self._disk)

    def error_percent(self) -> float | None:
        """Of the last 1000 steps those that were skipped, or of the last five saves those that failed."""
        counted = max(_STEPS_AT_LEAST, min(self._num_steps, _STEPS_COUNTED))
        skipped = sum(step > self._step - _STEPS_COUNTED for step in self._skipped)
        return max(100 * skipped / counted, self._failed_saves_percent())

    def error_words(self) -> str:
        """What the rate of errors is made of; of saves the last error, which names file and cure."""
        words = [f"{len(self._skipped)} steps were skipped lately"] if self._skipped else []
        if False in self._saves:
            words.append(f"{self._saves.count(False)} of the last {len(self._saves)} saves failed: {self._save_error}")
        return ", ".join(words) or "no step was skipped and no save failed lately"

    def _failed_saves_percent(self) -> float:
        return 100 * self._saves.count(False) / len(self._saves) if self._saves else 0.0

    def unverified_s(self) -> float | None:
        """Since a checkpoint was last seen to be whole; from the restore on, also of a run that has none yet."""
        return None if self._verified_at is None else self._clock() - self._verified_at

    def still_s(self) -> float:
        """Since a step ended, or something else showed that the attempt goes on."""
        return self._clock() - self._moved_at

    def loss_spread(self) -> float | None:
        """The highest since the last judgement, see ``LossSpread``."""
        return self._losses.worst

    def does_not_fit(self) -> float | None:
        """1 where a notice would lose something, 0 where it fits, None before a forecast."""
        return None if self._warning is None else float(bool(self._warning))

    def forecast_words(self) -> str:
        """What a notice would lose."""
        return self._warning or "a notice fits into the grace"

    def _fresh(self, seen: tuple[float, float] | None) -> float | None:
        return seen[1] if seen is not None and self._clock() - seen[0] < FRESH_S else None

    def _fresh_gpus(self) -> list[Record]:
        now = self._clock()
        return [gpu for seen_at, gpu in self._gpus.values() if now - seen_at < FRESH_S]


class LossSpread:
    """How far the loss is above its usual course, in its usual spread (median absolute deviations, as sigmas).

    The median of the last five is held against the median of the hundred before, so that neither a single bad batch nor
    the slow fall of a loss is a spike. Losses of a spike do not become usual.
    """

    def __init__(self) -> None:
        self.worst: float | None = None
        """The highest since ``judged``; None where there was no loss since, or too few before."""
        self._usual: deque[float] = deque(maxlen=_BASELINE)
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def take(self, loss: float) -> None:
        """The loss of one step, infinite where it was no number."""
        leaving = self._recent[0] if len(self._recent) == _RECENT else None
        self._recent.append(loss)
        spread = self._spread()
        if spread is not None:
            self.worst = spread if self.worst is None else max(self.worst, spread)
        if leaving is not None and math.isfinite(leaving) and (spread is None or spread <= _USUAL_SPREAD):
            self._usual.append(leaving)

    def judged(self) -> None:
        """Begin anew with the next loss."""
        self.worst = None

    def _spread(self) -> float | None:
        if len(self._usual) < _BASELINE_AT_LEAST or len(self._recent) < _RECENT:
            return None
        middle = statistics.median(self._usual)
        deviation = statistics.median(abs(loss - middle) for loss in self._usual)
        least = max(_LEAST_SPREAD * abs(middle), 1e-12)
        return (statistics.median(self._recent) - middle) / max(_SIGMA * deviation, least)


def _highest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
