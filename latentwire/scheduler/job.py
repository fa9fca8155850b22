"""TrainingJob: what submitit starts, once on each node of the allocation."""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentwire.preemption.handler import blocked
from latentwire.run.budget import next_move, verdict_of
from latentwire.run.directory import Attempt, Run
from latentwire.run.disk import complain
from latentwire.run.journal import Journal
from latentwire.run.lease import Lease
from latentwire.run.process import node_name
from latentwire.scheduler import slurm
from latentwire.scheduler.jobs import list_jobs
from latentwire.scheduler.reports import Reports

if TYPE_CHECKING:
    from latentwire.train.agent import Agent
    from latentwire.train.allocation import Allocation

_STARTS_AGAIN = ("preempted", "lost", "fenced")
"""Outcomes after which the job, or a newer one, goes on with the run."""
_LEAVES_A_REPORT = ("finished", "failed", "lost")
"""Outcomes, without a notice, after which this job does nothing more and nobody waits for its machine."""


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
        """What Slurm says now: the end of the grace, or of KillWait where the job is being ended."""
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
            agent = Agent(run, LocalAllocation(str(os.getppid())))
            outcome = agent.main().outcome
            _report(agent, outcome)
            return outcome
        allocation = SlurmAllocation.of_this_task(os.environ)
        if allocation.node_rank == 0:
            return _lead(Agent(run, allocation))
        outcome = Follower(run, allocation).main()
        if outcome in _STARTS_AGAIN:
            os._exit(0)
        return outcome


def _lead(agent: Agent) -> str:
    outcome = "failed"
    try:
        with blocked():  # the agent's handlers unblock them, so that a notice is either found here or heard there
            if _is_finished(agent.run):  # a successor that is not needed
                outcome = "finished"
            elif _waited_for_a_cancelled_job(agent.run, agent.allocation):
                outcome = "cancelled"
            else:
                is_late = slurm.is_ending(agent.allocation.job_id)
                outcome = "preempted" if is_late else agent.main().outcome
    finally:
        if agent.allocation.num_nodes > 1:
            _tell_followers(agent.run, agent.allocation, outcome)
    if agent.attempt is not None and not agent.attempt.is_newest():
        os._exit(0)  # the run goes on elsewhere, perhaps as this very job: its requeue and its result are not ours
    if outcome == "preempted" or (outcome == "lost" and next_move(agent.run, agent.config.retry).again):
        _give_back(agent.run, agent.allocation, agent.attempt)
    _report(agent, outcome)
    return outcome


def _report(agent: Agent, outcome: str) -> None:
    """Write the report of a run that no orchestrator looks after. Blocks for a second, a minute at most."""
    if agent.attempt is None or agent.handler.notice is not None or outcome not in _LEAVES_A_REPORT:
        return
    if Lease(agent.run.lease_path).holder() is None:
        reports = Reports()
        reports.want(agent.run)
        reports.finish(threading.Event())


def _is_finished(run: Run) -> bool:
    attempts = run.attempts()
    return bool(attempts) and verdict_of(attempts[-1]).outcome == "finished"


def _waited_for_a_cancelled_job(run: Run, allocation: Allocation) -> bool:
    """Whether this is a successor of a job that was cancelled while pending, with no process to write it down."""
    after = next((job.after for job in list_jobs(run) if job.job_id == allocation.job_id), None)
    if after is None or not slurm.was_cancelled_in_the_queue(after):
        return False
    run.mark_cancelled(by=f"scancel of job {after}")
    return True


def _tell_followers(run: Run, allocation: Allocation, outcome: str) -> None:
    try:
        run.end_job(allocation.job_id, allocation.restart, outcome)
    except OSError as error:  # a full disk must not keep the job from being requeued, which ends the followers too
        complain(f"the other nodes of job {allocation.job_id} could not be told of its end: {error}")


def _give_back(run: Run, allocation: Allocation, attempt: Attempt | None) -> None:
    """Have the job started again, and end it here; where that cannot be, say so and return."""
    job_id = allocation.job_id
    result = slurm.requeue(job_id, allocation.restart)
    end = attempt.end_unix_s() if attempt is not None else None
    given_back_s = None if end is None else round(end - time.time(), 1)
    _write_down(attempt, "requeue", done=result.done, reason=result.reason, given_back_s=given_back_s)
    if result.done:
        os._exit(0)
    if not run.is_cancelled() and slurm.was_cancelled(job_id, allocation.restart):
        # Slurm forgets it in minutes, the run does not
        run.mark_cancelled(by=f"scancel of job {job_id}")
        _write_down(attempt, "job_cancelled", job_id=job_id)


def _write_down(attempt: Attempt | None, event: str, **fields: Any) -> None:
    if attempt is not None:
        journal = Journal(attempt.path / "events.agent.jsonl")
        journal.event(event, **fields)
        journal.sync()
        journal.close()
