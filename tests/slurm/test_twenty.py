"""One run, preempted again and again, with grace, by jobs of a higher partition: nothing is lost.

``pytest -s -m slurm tests/slurm/test_twenty.py -k 20`` preempts it twenty times, in about six minutes, and prints what
each preemption cost.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from orchestrated import Orchestrated, everything_taken, orchestrated, stand_after
from running import NEVER, events, make_run, run_agent, trained_steps, wait_for_event

from latentwire.checklist.drill import final_digests
from latentwire.run.directory import Attempt
from latentwire.scheduler.jobs import list_jobs

pytestmark = pytest.mark.slurm


@dataclasses.dataclass(frozen=True)
class Preemption:
    """What one preemption cost. Seconds.

    Attributes:
        leave_s: from the notice to the job's requeue of itself: the step's end, the save, the exit.
        queue_s: from there to the next attempt: Slurm's hold of a requeued job, its scheduling, Python's start.
        start_s: from there to the next trained step.
        given_back_s: of the grace.
    """

    attempt: int
    steps: int
    steps_lost: int
    leave_s: float
    queue_s: float
    start_s: float
    given_back_s: float

    @property
    def resume_s(self) -> float:
        """From the notice to the next trained step."""
        return self.leave_s + self.queue_s + self.start_s


def measure(before: Attempt, after: Attempt) -> Preemption:
    """The preemption between two attempts, from what they wrote; an attempt that did not go on raises."""
    trained = trained_steps(before)
    (notice,), (requeue,) = events(before, "notice", "agent"), events(before, "requeue", "agent")
    claimed = float(after.record()["claimed"])
    return Preemption(
        attempt=before.number,
        steps=len(trained),
        steps_lost=trained[-1]["step"] - events(after, "restored")[0]["step"],
        leave_s=requeue["time"] - notice["received"],
        queue_s=claimed - requeue["time"],
        start_s=trained_steps(after)[0]["time"] - claimed,
        given_back_s=requeue["given_back_s"],
    )


def report(preemptions: Sequence[Preemption], wanted: int, hold_s: float, same_bits: bool) -> str:
    """The table for people; ``hold_s`` is how long Slurm keeps a requeued job before it may start again."""
    lines = ["attempt  steps  lost   leave   queue   start  resume  given back"]
    for p in preemptions:
        seconds = "".join(f"{s:8.1f}" for s in (p.leave_s, p.queue_s, p.start_s, p.resume_s, p.given_back_s))
        lines.append(f"{p.attempt:7}{p.steps:7}{p.steps_lost:6}{seconds}")
    resumes, given_back = [p.resume_s for p in preemptions], [p.given_back_s for p in preemptions]
    own = [p.leave_s + p.start_s for p in preemptions]
    return "\n".join([
        *lines,
        f"recovered {len(preemptions)}/{wanted}, steps lost {sum(p.steps_lost for p in preemptions)}",
        f"notice to next trained step: p50 {statistics.median(resumes):.1f} s, max {max(resumes):.1f} s; without the "
        f"queue: p50 {statistics.median(own):.1f} s, max {max(own):.1f} s",
        f"Slurm holds a requeued job for {hold_s:.0f} s (cred_expire + 1)",
        f"grace given back: {sum(given_back):.0f} s in all, median {statistics.median(given_back):.1f} s",
        f"final SHA-256 {'identical to' if same_bits else 'OTHER than'} those of a calm run",
    ])  # fmt: skip


def preempt(program: Orchestrated, number: int, then: int) -> None:
    """Let a job of ``high`` take the nodes from the attempt of that number, and end; the next stands at ``then``."""
    attempt = program.standing(number)
    with everything_taken(program.cluster) as job:
        program.go_on_after_notice(attempt)
        wait_for_event(attempt, "requeue", "agent")
        program.cluster.wait_until(lambda: program.field(job, "JobState") == "RUNNING")
        program.stand(then)


def requeue_hold_s(program: Orchestrated) -> float:
    """From the job's last requeue to when it was allowed to start."""
    times = [program.field(program.job_id(), name) for name in ("SubmitTime", "EligibleTime")]
    submitted, eligible = map(datetime.datetime.fromisoformat, times)
    return (eligible - submitted).total_seconds()


@pytest.mark.parametrize("number", [3, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_preempted_so_often(cluster: Cluster, tmp_path: Path, number: int) -> None:
    config: dict[str, Any] = {"train": {"steps": 4 * number}}
    calm = make_run(tmp_path / "calm", **config)
    assert run_agent(calm) == "finished"
    with orchestrated(cluster, tmp_path, "preempt", stand=stand_after(2), **config) as program:
        for index in range(1, number + 1):
            preempt(program, index, NEVER if index == number else stand_after(2, micro_batch=index % 8))
        assert program.finish() == 0
        attempts = program.run.attempts()
        same_bits = final_digests(program.run) == final_digests(calm)
        preemptions = [measure(*pair) for pair in itertools.pairwise(attempts)]
        print("\n" + report(preemptions, number, requeue_hold_s(program), same_bits))
        assert len(preemptions) == number
        assert sum(p.steps_lost for p in preemptions) == 0
        assert len(list_jobs(program.run)) == 1
        assert same_bits
