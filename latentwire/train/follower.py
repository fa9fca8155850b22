"""The agent of every node of a job but the first: its ranks take part in the attempts that the first node's makes.

The disk is all that joins it to the leader. It finds an attempt of its own job and start by ``attempt.json``, starts
its ranks by ``placement.json`` and ``rendezvous.json``, and says how those ended that could not say so themselves. It
writes ``events.node<n>.jsonl``, and never claims, judges or requeues.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from latentwire.elastic.planner import Placement
from latentwire.errors import RunError
from latentwire.preemption.handler import PreemptionHandler
from latentwire.run.atomic import read_json
from latentwire.run.budget import Verdict
from latentwire.run.directory import Attempt, Run
from latentwire.run.journal import Journal
from latentwire.run.process import node_name
from latentwire.run.status import is_alive
from latentwire.train.allocation import Allocation
from latentwire.train.node import NodeProcesses, Rendezvous, node_suffix, take_inventory, write_environment
from latentwire.train.verdicts import said_by_ranks, say_for

_POLL_S = 0.1
_LOOK_EVERY_S = 0.5
_KILL_AFTER_S = 3.0
"""The leader waits for what is said here; and no rank but rank 0, which is the leader's, has anything to save."""
_LEADER_COMES_WITHIN_S = 600.0
"""Longer than its longest pause between two attempts."""


class Follower:
    """Follows the leader through all its attempts in this start of the job.

    Args:
        run: the run, with its config.yaml.
        allocation: the job, as this node sees it.
    """

    def __init__(self, run: Run, allocation: Allocation) -> None:
        self.run = run
        self.allocation = allocation
        self.config = run.checked_config()
        self.handler = PreemptionHandler(self.config.preemption.save_signal)

    def main(self) -> str:
        """Install the handlers and take part until the leader has left; returns its outcome. Blocks. Main thread.

        Raises:
            RunError: the leader is gone without a word.
        """
        with self.handler:
            newest = 0
            while True:
                found = self._wait_for_leader(newest)
                if isinstance(found, str):
                    return found
                newest = found.number
                _Following(self, found).main()

    def _wait_for_leader(self, newest: int) -> Attempt | str:
        """Its next attempt, or the outcome with which it left; *fenced* where the run goes on without us."""
        job = self.allocation
        deadline = time.monotonic() + _LEADER_COMES_WITHIN_S
        while time.monotonic() < deadline:
            outcome = self.run.job_end(job.job_id, job.restart)
            if outcome is not None:
                return outcome
            attempts = self.run.attempts()
            last = attempts[-1] if attempts else None
            if last is not None and last.number > newest:
                if self._is_ours(last):
                    return last
                if newest:  # else it is of an earlier start, and ours comes
                    return "fenced"
            elif last is not None and last.ended() is None:  # the last save of rank 0 may take long
                if not is_alive(last, time.time()):
                    break
                deadline = time.monotonic() + _LEADER_COMES_WITHIN_S
            time.sleep(_LOOK_EVERY_S)
        raise RunError(f"the leader of job {job.job_id} is gone without a word: {node_name()} leaves the job too")

    def _is_ours(self, attempt: Attempt) -> bool:
        record = attempt.record()
        return (record.get("job_id"), record.get("restart")) == (self.allocation.job_id, self.allocation.restart)


class _Following:
    """This node's part in one attempt."""

    def __init__(self, follower: Follower, attempt: Attempt) -> None:
        self.attempt, self.allocation = attempt, follower.allocation
        self.journal = Journal(attempt.path / f"events{node_suffix(follower.allocation)}.jsonl")
        self.processes = NodeProcesses(attempt, follower.config, self.allocation, follower.handler, self.journal)

    def main(self) -> None:
        plan = self._wait_for_plan()
        if plan is not None:
            placement, rendezvous = plan
            try:
                write_environment(self.attempt, self.allocation, take_inventory())
                self.journal.event("node_started", node=self.allocation.node_rank, host=node_name())
                self.processes.start(placement, rendezvous)
                self._watch()
            except OSError as error:
                failed = Verdict("failed", "other", error=f"{node_name()}: {error}")
                self._say(dict.fromkeys(placement.ranks_on(self.allocation.node_rank), failed))
            finally:
                self.processes.end()
        self.journal.close()

    def _wait_for_plan(self) -> tuple[Placement, Rendezvous] | None:
        """What the leader decided; None where the attempt ended before that."""
        while not self._is_over():
            placement, rendezvous = read_json(self.attempt.path / "placement.json"), Rendezvous.read(self.attempt)
            if placement is not None and rendezvous is not None:
                return Placement.from_json(placement), rendezvous
            time.sleep(_LOOK_EVERY_S)
        return None

    def _watch(self) -> None:
        """Pass signals on until the ranks here have ended, or those elsewhere cannot go on."""
        next_look = 0.0
        while not self.processes.have_ended:
            if self.processes.have_failed or time.monotonic() > next_look:
                next_look = time.monotonic() + _LOOK_EVERY_S
                self._say_for_the_silent()
                if self._is_over():
                    break
            self.processes.pass_signals_on()
            time.sleep(_POLL_S)
        self._say_for_the_silent()
        left = self.processes.running
        self.processes.end(_KILL_AFTER_S)
        self._say(dict.fromkeys(left, Verdict("failed", "network", error="ended, as a rank had failed elsewhere")))

    def _is_over(self) -> bool:
        """The leader has judged, a newer attempt exists, or a rank on some node has failed."""
        if self.attempt.ended() is not None or not self.attempt.is_newest():
            return True
        return any(end.is_failure for end in said_by_ranks(self.attempt).values())

    def _say_for_the_silent(self) -> None:
        self._say({rank: end.verdict for rank, end in self.processes.ends().items()})

    def _say(self, verdicts: Mapping[int, Verdict]) -> None:
        """Write down what ranks could not: the leader sees only files."""
        said = said_by_ranks(self.attempt)
        for rank in sorted(set(verdicts) - set(said)):
            try:
                say_for(self.attempt, rank, verdicts[rank])
            except OSError as error:  # a full disk: the leader takes this node for lost
                self.journal.event("rank_end_not_written", rank=rank, error=str(error))
