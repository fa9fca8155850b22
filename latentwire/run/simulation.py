"""What a policy would make of a machine that is taken away again and again. Pure: a replay, second by second in steps.

It follows the rules of the real thing: a save is begun when its interval is over and none is under way, and counts from
its commit on; a notice lets the step under way end if step and save fit into the grace, else drops it; a kill costs all
since the last commit.
"""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Iterable, Iterator

from latentwire.errors import ConfigError
from latentwire.run.goodput import NOT_ALLOTTED, PRODUCTIVE

_MOST_STARTS_WITHOUT_A_STEP = 1000


@dataclasses.dataclass(frozen=True)
class Window:
    """A stretch of machine time, as the cluster gives it.

    Attributes:
        queued_s: waited for it.
        seconds: from the start of the attempt to the notice, or to the kill where there is none.
        grace_s: from the notice to the kill; 0: none comes.
        dead_s: after a kill, until somebody noticed.
    """

    queued_s: float
    seconds: float
    grace_s: float = 0.0
    dead_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Costs:
    """What things take, in seconds.

    Attributes:
        start_s: of an attempt, until it trains: processes, models, checkpoint, warm-up.
        step_s: a step.
        first_step_s: so much more the first step of an attempt takes.
        stall_s: what training waits for a save.
        commit_s: from the begin of a save to its commit.
        evaluation_s: an evaluation.
        drain_s: on a notice, what is needed beside the step and the save.
        end_s: after the last step, until the attempt has ended.
    """

    start_s: float
    step_s: float
    first_step_s: float = 0.0
    stall_s: float = 0.0
    commit_s: float = 0.0
    evaluation_s: float = 0.0
    drain_s: float = 0.0
    end_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is chosen.

    Attributes:
        total_steps: of the run.
        interval_s: between two saves; None: no saves by time.
        interval_steps: also save after so many steps.
        evaluate_every: steps.
    """

    total_steps: int
    interval_s: float | None = 300.0
    interval_steps: int | None = None
    evaluate_every: int | None = None


@dataclasses.dataclass(frozen=True)
class Expected:
    """What comes out.

    Attributes:
        seconds: in each class of ``latentwire.run.goodput.KINDS`` that occurs.
        num_attempts: starts that it took.
    """

    seconds: dict[str, float]
    num_attempts: int

    @property
    def wall_s(self) -> float:
        """From the submission to the end."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Seconds of training that stood, over those allotted."""
        allotted_s = sum(s for kind, s in self.seconds.items() if kind not in NOT_ALLOTTED)
        return self.seconds[PRODUCTIVE] / allotted_s


def windows(mtbp_s: float, queued_s: float, grace_s: float, seed: int) -> Iterator[Window]:
    """Without end: preemptions as a Poisson process, of so many seconds between two in the mean."""
    draw = random.Random(seed)
    while True:
        yield Window(queued_s, draw.expovariate(1 / mtbp_s), grace_s)


def simulate(policy: Policy, costs: Costs, trace: Iterable[Window]) -> Expected:
    """Replay a trace against a policy; after its last window the machine stays.

    Raises:
        ConfigError: the windows are too short to ever make a step.
    """
    replay = _Replay(policy, costs)
    for window in trace:
        if replay.attempt(window):
            return replay.expected()
    replay.attempt(Window(0.0, float("inf")))
    return replay.expected()


class _Replay:
    """A run in the middle of its trace."""

    def __init__(self, policy: Policy, costs: Costs) -> None:
        self._policy, self._costs = policy, costs
        self._seconds: dict[str, float] = collections.defaultdict(float)
        self._num_attempts = self._in_vain = 0
        self._committed = self._most_steps = self._evaluated = 0
        self._pending: tuple[int, float] | None = None
        """A step whose save is under way, and when it is committed."""

    def expected(self) -> Expected:
        return Expected(dict(self._seconds), self._num_attempts)

    def attempt(self, window: Window) -> bool:
        """One window; whether the run is done with it."""
        before = self._committed
        self._num_attempts += 1
        self._seconds["queued"] += window.queued_s
        clock = _Clock(window.seconds, self._seconds)
        self._pending = None
        step = self._committed
        if clock.spend("starting", self._costs.start_s):
            step = self._train(clock, step)
        if clock.cut_off is None:
            self._seconds["saving"] += self._costs.end_s
            return True
        self._take_in_commit(clock.end)
        self._leave(window, clock, step)
        self._most_steps = max(self._most_steps, step, self._committed)
        self._count_in_vain(before)
        return False

    def _train(self, clock: _Clock, step: int) -> int:
        """Steps, evaluations and saves until the last step or the window's end; completed steps."""
        costs, total = self._costs, self._policy.total_steps
        saved_at, more_s = clock.now, costs.first_step_s
        while self._evaluate(clock, step) and step < total:
            kind = "redoing" if step < self._most_steps else PRODUCTIVE
            if not clock.spend(kind, costs.step_s + more_s):
                break
            step, more_s = step + 1, 0.0
            self._take_in_commit(clock.now)
            if step < total and self._is_due(step, clock.now - saved_at):  # after the last step it is waited for
                saved_at = clock.now
                self._wait_for_save(clock)
                self._pending = (step, clock.now + costs.commit_s)
                clock.spend("saving", costs.stall_s)
        return step

    def _evaluate(self, clock: _Clock, step: int) -> bool:
        """Evaluate if it is due, again if it was cut off; whether training goes on."""
        every = self._policy.evaluate_every
        if every and step and step % every == 0 and step != self._evaluated:
            if not clock.spend("evaluating", self._costs.evaluation_s):
                return False
            self._evaluated = step
        return True

    def _is_due(self, step: int, since_s: float) -> bool:
        policy = self._policy
        by_time = policy.interval_s is not None and since_s >= policy.interval_s and self._pending is None
        return by_time or (policy.interval_steps is not None and step % policy.interval_steps == 0)

    def _wait_for_save(self, clock: _Clock) -> None:
        """The one before, if it is under way."""
        if self._pending is not None and clock.spend("saving", max(0.0, self._pending[1] - clock.now)):
            self._committed, self._pending = self._pending[0], None

    def _take_in_commit(self, now: float) -> None:
        if self._pending is not None and self._pending[1] <= now:
            self._committed, self._pending = self._pending[0], None

    def _leave(self, window: Window, clock: _Clock, step: int) -> None:
        """The notice, if there is one, and what can still be saved then."""
        costs = self._costs
        if not window.grace_s:
            self._seconds["failed"] += window.dead_s
            return
        save_s = costs.drain_s + (costs.commit_s if step > self._committed else 0.0)
        in_step = clock.cut_off in ("redoing", PRODUCTIVE)
        rest_s = max(0.0, costs.step_s - clock.into) if in_step else 0.0
        if in_step and rest_s + save_s < window.grace_s:
            self._committed = step + 1
            self._seconds["draining"] += rest_s + save_s
        elif save_s < window.grace_s:
            self._committed = step
            self._seconds["draining"] += save_s
        else:
            self._seconds["draining"] += window.grace_s

    def _count_in_vain(self, before: int) -> None:
        self._in_vain = 0 if self._committed > before else self._in_vain + 1
        if self._in_vain == _MOST_STARTS_WITHOUT_A_STEP:
            raise ConfigError(
                f"{self._in_vain} starts in a row commit no step: the machine is taken away before a save is due "
                f"(a start takes {self._costs.start_s:g} s); save more often, or make starts shorter"
            )


class _Clock:
    """Time in a window; what does not fit is cut off at its end, and counts for its class all the same."""

    def __init__(self, end: float, seconds: dict[str, float]) -> None:
        self.now = 0.0
        self.end = end
        self.cut_off: str | None = None
        """What was under way at the end."""
        self.into = 0.0
        """For how long."""
        self._seconds = seconds

    def spend(self, kind: str, seconds: float) -> bool:
        """Whether it fitted."""
        fits = self.now + seconds <= self.end
        spent = seconds if fits else max(0.0, self.end - self.now)
        self._seconds[kind] += spent
        self.now += spent
        if not fits and self.cut_off is None:
            self.cut_off, self.into = kind, spent
        return fits
