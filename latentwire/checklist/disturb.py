"""What is done to the drill's run, and how: by signals on this machine, or by Slurm's own commands from outside a job.

Whether it fell where it was meant to, and what it cost, is judged in ``drill``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol

from latentwire.config import SchedulerSection
from latentwire.errors import ConfigError, LatentWireError, SchedulerError
from latentwire.run.directory import Attempt, Run
from latentwire.scheduler import slurm
from latentwire.scheduler.jobs import list_jobs
from latentwire.scheduler.queue import run_command
from latentwire.scheduler.submission import scheduler_kind

Deed = Literal["TERM", "KILL", "requeue", "preemption"]


@dataclasses.dataclass(frozen=True)
class Disturbance:
    """One thing that is done to the run.

    Attributes:
        name: for the table.
        deed: a signal, ``scontrol requeue``, or another job that takes the node.
        begins: the event that opens the window, or None: after ``steps`` steps of the attempt.
        ends: events that close the window.
        steps: training steps to wait for in the attempt first.
        corrupt: flip a byte of the newest checkpoint afterwards.
        may_lose: intervals of saving that may be lost.
    """

    name: str
    deed: Deed
    begins: str | None = None
    ends: tuple[str, ...] = ()
    steps: int = 0
    corrupt: bool = False
    may_lose: int = 0


_IN_WARMUP = Disturbance("TERM in warm-up", "TERM", begins="warmup_started", ends=("warmup_finished",))
_IN_TRAINING = Disturbance("TERM in training", "TERM", steps=2)
_KILL = Disturbance("SIGKILL", "KILL", steps=3, may_lose=1)
_CORRUPTED = Disturbance("newest checkpoint corrupted", "KILL", begins="save_verified", corrupt=True, may_lose=2)
_REQUEUE = Disturbance("scontrol requeue", "requeue", steps=2)
DISTURBANCES: tuple[Disturbance, ...] = (
    _IN_WARMUP,
    _IN_TRAINING,
    Disturbance("TERM in evaluation", "TERM", begins="evaluation_started", ends=("evaluation_finished",)),
    Disturbance("TERM during a save", "TERM", begins="save_started", ends=("save_verified", "save_failed")),
    _KILL,
    _CORRUPTED,
    Disturbance("TERM, first of two in an epoch", "TERM", steps=1),
    Disturbance("TERM, second of two in an epoch", "TERM", steps=1),
)
"""Of the drill without Slurm."""


class Place(Protocol):
    """Where the drill's runs are, and how they are reached there.

    Attributes:
        overrides: of their config.
        side_by_side: the undisturbed run may go on beside the disturbed one.
        poll_s: pause between two looks at the run's files.
        patience_s: the longest wait for anything.
    """

    overrides: tuple[str, ...]
    side_by_side: bool
    poll_s: float
    patience_s: float

    def outlook(self, disturbances: Sequence[Disturbance]) -> str:
        """What a person is told before it begins."""

    def disturbing(self, deed: Deed, attempt: Attempt) -> AbstractContextManager[None]:
        """Do it; what it takes is given back when the block is left."""

    def is_over(self, attempt: Attempt) -> bool:
        """Whether the attempt runs no more, with or without a last word."""

    def end(self, run: Run) -> None:
        """Leave nothing of the run behind. Its orchestrator has ended."""


class Local:
    """Runs of the local executor: signals go to the attempt's agent."""

    overrides: tuple[str, ...] = ("scheduler.kind=local",)
    side_by_side = False  # they would share the cores
    poll_s = 0.002
    patience_s = 600.0

    def outlook(self, disturbances: Sequence[Disturbance]) -> str:
        """What a person is told before it begins."""
        return f"{len(disturbances)} disturbances: some minutes"

    @contextlib.contextmanager
    def disturbing(self, deed: Deed, attempt: Attempt) -> Iterator[None]:
        """Send a signal."""
        agent = attempt.agent()
        assert agent is not None
        assert deed in ("TERM", "KILL")
        agent.send(signal.Signals[f"SIG{deed}"])
        yield

    def is_over(self, attempt: Attempt) -> bool:
        """Whether its agent is gone."""
        agent = attempt.agent()
        return agent is None or not agent.is_alive()

    def end(self, run: Run) -> None:
        """Kill what runs."""
        for attempt in run.attempts()[-1:]:
            agent = attempt.agent()
            if agent is not None and attempt.ended() is None:
                agent.send(signal.SIGKILL)


_ASK_EVERY_S = 1.0
_START_S = 20.0
_CRED_EXPIRE_S = 120.0
_PREEMPTION_MIN = 5


class Slurm:
    """Runs that are jobs of a cluster. Nothing is known of their processes: Slurm and the run's own files tell.

    Args:
        section: where the runs go.
        preempting_partition: jobs of it preempt those of the section's partition; None: no preemption is made.

    Raises:
        ConfigError: there is no Slurm here, no partition is named or none of that name exists, or the one does not
            preempt the other.
        SchedulerError: Slurm does not answer.
    """

    poll_s = 0.05
    patience_s = 3600.0

    def __init__(self, section: SchedulerSection, preempting_partition: str | None) -> None:
        if section.partition is None:
            raise ConfigError("which partition is the drill to run in? give --partition P; `sinfo -s` lists them all")
        scheduler_kind(section)
        self._section = section
        self._preempting = preempting_partition
        self._grace_s = int(_partition(section.partition).get("GraceTime", 0))
        if preempting_partition is not None:
            _refuse_unless_it_preempts(preempting_partition, section.partition)
        # The job that preempts takes a whole node: neither the undisturbed run nor another user's job may be on it.
        self.side_by_side = preempting_partition is None
        self.overrides: tuple[str, ...] = ("scheduler.extra.exclusive=user",) if preempting_partition else ()
        self._ask_again = 0.0

    def disturbances(self, everything: bool) -> tuple[Disturbance, ...]:
        """Those that prove most, first; or all.

        By default only what needs no luck and fits into ten minutes: after each notice Slurm holds the job back for
        cred_expire (120 s), and a window as short as a save may be over before a signal has come all the way.
        """
        first = [_IN_TRAINING, _KILL, _CORRUPTED, _REQUEUE]
        if self._preempting is not None:
            may_lose = 0 if self._grace_s > 0 else 1
            first.insert(1, Disturbance(f"preempted by {self._preempting}", "preemption", steps=2, may_lose=may_lose))
        if not everything:
            return tuple(first)
        first.insert(0, _IN_WARMUP)  # which only a run that has just begun has still before it
        return (*first, *(each for each in DISTURBANCES if each not in first))

    def outlook(self, disturbances: Sequence[Disturbance]) -> str:
        """How long it is going to take, as far as that depends on Slurm."""
        wait_s = _cred_expire_s()
        num_requeues = sum(each.deed != "KILL" for each in disturbances)
        minutes = math.ceil((num_requeues * wait_s + len(disturbances) * 2 * _START_S) / 60)
        return (
            f"{len(disturbances)} disturbances in partition {self._section.partition}: an undisturbed run and about "
            f"{minutes} minutes where there is room ({num_requeues} requeues, each held back {wait_s:g} s: cred_expire)"
        )

    def disturbing(self, deed: Deed, attempt: Attempt) -> AbstractContextManager[None]:
        """Give Slurm the command, or submit the job that preempts, which is cancelled when the block is left."""
        job_id = _job_id(attempt)
        if deed == "preemption":
            return self._preempting_job(attempt)
        if deed == "requeue":
            run_command(["scontrol", "requeue", job_id])
        else:
            run_command(["scancel", "-s", deed, slurm.signal_target(job_id, signal.Signals[f"SIG{deed}"])])
        return contextlib.nullcontext()

    def is_over(self, attempt: Attempt) -> bool:
        """Whether the job waits again or is gone; Slurm is asked once a second at most."""
        if not attempt.is_newest():
            return True
        if time.monotonic() < self._ask_again:
            return False
        self._ask_again = time.monotonic() + _ASK_EVERY_S
        state = slurm.show_job(_job_id(attempt), run_command).get("JobState")
        return state not in ("RUNNING", "COMPLETING")

    def end(self, run: Run) -> None:
        """Cancel its jobs; those that have ended do not mind."""
        job_ids = {job.job_id for job in list_jobs(run)} | {_job_id(attempt) for attempt in run.attempts()}
        if job_ids:
            run_command(["scancel", *sorted(job_ids)])

    @contextlib.contextmanager
    def _preempting_job(self, attempt: Attempt) -> Iterator[None]:
        """A job that wants the run's node for itself, until the block is left."""
        assert self._preempting is not None
        section, node = self._section, slurm.show_job(_job_id(attempt), run_command)["NodeList"]
        name = f"preempting-{attempt.run.path.parent.name}"
        options = ["-p", self._preempting, "-w", node, "--exclusive", f"--time={_PREEMPTION_MIN}", "--no-requeue"]
        options += [f"--job-name={name}", "--output=/dev/null"]
        options += [f"--account={section.account}"] if section.account is not None else []
        options += [f"--gres=gpu:{section.ladder[0] // section.nodes}"] if section.ladder[0] else []
        try:
            run_command(["sbatch", *options, "--wrap", f"sleep {_PREEMPTION_MIN * 60}"])
            yield
        except LatentWireError as error:
            waiting = ["squeue", "--noheader", "--me", f"--name={name}", "-t", "PENDING", "-o", "%i (%r)"]
            job = run_command(waiting).strip()
            if not job:
                raise
            raise SchedulerError(
                f"{error}\njob {job} still waits for {node}: does partition {self._preempting} preempt "
                f"{section.partition}? scontrol show partition: a higher PriorityTier there, PreemptMode not OFF here"
            ) from error
        finally:
            run_command(["scancel", "--me", f"--name={name}"])  # by its name: a killed sbatch told no number


def _job_id(attempt: Attempt) -> str:
    return str(attempt.record()["job_id"])


def _partition(name: str) -> dict[str, str]:
    """The fields that Slurm has for it; GraceTime is in seconds."""
    named = slurm.partitions(run_command)
    if name not in named:
        raise ConfigError(f"there is no partition {name!r}; there are: {', '.join(sorted(named)) or 'none'}")
    return named[name]


def _refuse_unless_it_preempts(preempting: str, partition: str) -> None:
    """Where Slurm preempts by partition, known before anything starts; by QOS, only once the job waits in vain."""
    ours, theirs = _partition(partition), _partition(preempting)
    if slurm.settings(run_command).get("PreemptType") == "preempt/qos":
        return
    if int(theirs["PriorityTier"]) <= int(ours["PriorityTier"]) or ours["PreemptMode"] == "OFF":
        raise ConfigError(
            f"jobs of partition {preempting} (PriorityTier {theirs['PriorityTier']}) do not preempt those of "
            f"{partition} (PriorityTier {ours['PriorityTier']}, PreemptMode {ours['PreemptMode']}): name a partition "
            "that does, or leave --preempting-partition out"
        )


def _cred_expire_s() -> float:
    """So long Slurm holds a requeued job back."""
    found = re.search(r"\bcred_expire=(\d+)", slurm.settings(run_command).get("AuthInfo", ""))
    return float(found.group(1)) if found else _CRED_EXPIRE_S
