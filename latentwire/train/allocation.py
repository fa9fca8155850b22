"""What the agents may ask of the scheduler under which they run. Implemented in ``scheduler/job.py``."""

from __future__ import annotations

from typing import Protocol


class Allocation(Protocol):
    """A job, as one of its nodes sees it."""

    @property
    def job_id(self) -> str:
        """The scheduler's name for the job."""

    @property
    def scheduler(self) -> str:
        """``local`` or ``slurm``."""

    @property
    def restart(self) -> int:
        """How often the scheduler had started this job again; its id stays."""

    @property
    def node_rank(self) -> int:
        """This node among the job's, from 0. The agent of node 0 leads."""

    @property
    def num_nodes(self) -> int:
        """Nodes of the job; an agent runs on each."""

    @property
    def num_gpus(self) -> int | None:
        """GPUs that the job was given on this node; None: the scheduler does not say."""

    def address(self) -> str:
        """Where the job's other nodes reach this one. May take a second."""

    def grace_s(self) -> float | None:
        """Seconds that the scheduler gives at preemption; None: not known. Asked once, by the leader."""

    def end_unix_s(self) -> float | None:
        """When the job is to be ended, as far as the scheduler says. Asked once, after a notice; may take a second."""
