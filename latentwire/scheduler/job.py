"""TrainingJob: what submitit starts, once on each node of the allocation."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from latentwire.run.budget import next_move
from latentwire.run.directory import Attempt, Run
from latentwire.run.journal import Journal
from latentwire.run.process import node_name
from latentwire.scheduler import slurm


@dataclasses.dataclass(frozen=True)
class LocalAllocation:
    """A job of the local executor: one node, and nobody takes it away but a person."""

    job_id: str
    scheduler: str = "local"
    restart: int = 0
    node_rank: int = 0
    num_nodes: int = 1
    num_gpus: int | None = None

    def address(self) -> str:
        """Of this machine, for itself."""
        return "127.0.0.1"

    def grace_s(self) -> float | None:
        """Not known: it is for the person to say."""
        return None

    def end_unix_s(self) -> float | None:
        """Not known."""
        return None


@dataclasses.dataclass(frozen=True)
class SlurmAllocation:
    """A Slurm job, as the task on one of its nodes sees it."""

    job_id: str
    restart: int = 0
    node_rank: int = 0
    num_nodes: int = 1
    num_gpus: int | None = None
    scheduler: str = "slurm"

    @classmethod
    def of_this_task(cls, environ: Mapping[str, str]) -> SlurmAllocation:
        """What Slurm has put into the environment of a task that srun started."""
        job_id = slurm.own_job_id(environ)
        assert job_id is not None
        return cls(
            job_id=job_id,
            restart=slurm.restart_count(environ),
            node_rank=int(environ.get("SLURM_NODEID", 0)),
            num_nodes=int(environ.get("SLURM_STEP_NUM_NODES", 1)),
            num_gpus=_num_gpus(environ),
        )

    def address(self) -> str:
        """NodeAddr of this node, by which Slurm's own daemons reach it; else the host's name."""
        return slurm.node_address(node_name()) or socket.gethostname()

    def grace_s(self) -> float | None:
        """The partition's GraceTime."""
        return slurm.grace_time(self.job_id)

    def end_unix_s(self) -> float | None:
        """EndTime as Slurm gives it now: during grace that is its end."""
        return slurm.end_time(self.job_id)


def _num_gpus(environ: Mapping[str, str]) -> int | None:
    """Slurm sets both with ``--gres=gpu:2``, and neither for a job without GPUs."""
    if "SLURM_GPUS_ON_NODE" in environ:
        return int(environ["SLURM_GPUS_ON_NODE"])
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    return len(visible.split(",")) if visible else None


@dataclasses.dataclass(frozen=True)
class TrainingJob:
    """A picklable job that knows nothing but the run's directory: everything else it reads from the disk.

    It has no ``checkpoint`` method on purpose: submitit's would run inside a signal handler and again on the requeue's
    own TERM. The handlers of ours take over inside ``__call__``, and a restart resumes from the disk.
    """

    run_path: str
    scheduler: str = "local"

    def __call__(self) -> str:
        """Run this node's agent until it is done with the allocation; returns the last attempt's outcome. Main thread.

        A Slurm job that starts again, here or elsewhere, does not return: what submitit wrote after a return would end
        it for good.
        """
        from latentwire.train.agent import Agent  # the one place where the scheduler's side meets the training side
        from latentwire.train.follower import Follower

        run = Run(Path(self.run_path))
        if self.scheduler != "slurm":
            return Agent(run, LocalAllocation(str(os.getppid()))).main().outcome
        allocation = SlurmAllocation.of_this_task(os.environ)
        if allocation.node_rank == 0:
            return _lead(run, allocation)
        outcome = Follower(run, allocation).main()
        if outcome in _STARTS_AGAIN:
            os._exit(0)
        return outcome


_STARTS_AGAIN = ("preempted", "lost", "fenced")
"""Outcomes after which the job, or a newer one, goes on with the run."""


def _lead(run: Run, allocation: SlurmAllocation) -> str:
    from latentwire.train.agent import Agent

    attempt, outcome = None, "failed"
    try:
        if slurm.is_being_preempted(allocation.job_id):  # the notice came before anybody could hear it
            outcome = "preempted"
        else:
            agent = Agent(run, allocation)
            outcome = agent.main().outcome
            attempt = agent.attempt
    finally:
        if allocation.num_nodes > 1:
            run.end_job(allocation.job_id, allocation.restart, outcome)
    if attempt is not None and not attempt.is_newest():
        os._exit(0)  # the run goes on elsewhere, perhaps as this very job: its requeue and its result are not ours
    if outcome == "preempted" or (outcome == "lost" and next_move(run, run.config().retry).again):
        _requeue(allocation, attempt)
    return outcome


def _requeue(allocation: SlurmAllocation, attempt: Attempt | None) -> None:
    result = slurm.requeue(allocation.job_id, allocation.restart)
    if attempt is not None:
        _write_down(attempt, result)
    if result.done:
        os._exit(0)


def _write_down(attempt: Attempt, result: slurm.Requeue) -> None:
    end = attempt.end_unix_s()
    journal = Journal(attempt.path / "events.agent.jsonl")
    given_back_s = None if end is None else round(end - time.time(), 1)
    journal.event("requeue", done=result.done, reason=result.reason, given_back_s=given_back_s)
    journal.sync()
    journal.close()
