"""The agent of a job's first node: makes attempt after attempt, starts ranks, and judges how they ended.

It never imports torch: it is up in a fraction of a second, stays small, and what kills a rank does not kill it. It
writes ``events.agent.jsonl``; its last word there is ``attempt_ended``. On the other nodes of a job runs a follower.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import socket
import time
from collections.abc import Iterable

from latentwire import __version__
from latentwire.elastic.footprint import Footprint, Probe, fitted, footprint_of
from latentwire.elastic.inventory import Inventory
from latentwire.elastic.planner import Placement, weigh
from latentwire.errors import ConfigError, Fenced, RunBusy
from latentwire.monitor.rollup import summarise
from latentwire.monitor.stats import stats_files
from latentwire.preemption.forecast import Grace, as_event, forecast, measured_before
from latentwire.preemption.handler import PreemptionHandler
from latentwire.run.atomic import read_json, write_json
from latentwire.run.budget import Verdict, had_too_many_at_once, next_move, num_halvings, verdict_of
from latentwire.run.directory import Attempt, Run
from latentwire.run.journal import Journal
from latentwire.run.rollup import summarise_metrics
from latentwire.train.alerting import AlertWatch
from latentwire.train.allocation import Allocation
from latentwire.train.node import ONE_NODE, NodeProcesses, Rendezvous, take_inventory, write_environment
from latentwire.train.verdicts import RankEnd, judge, said_by_ranks
from latentwire.train.watch import HangWatch
from latentwire.tree import differences

_POLL_S = 0.1
_LOOK_ELSEWHERE_EVERY_S = 0.5
_FENCE_EVERY_S = 5.0
_OTHERS_END_WITHIN_S = 30.0
_FOLLOWERS_COME_WITHIN_S = 300.0
_WORDS_COME_WITHIN_S = 10.0
"""How late a shared file system may show what another node wrote."""
_SUPERSEDED = Verdict("fenced", error="a newer attempt of this run exists")


class Agent:
    """Runs a run in this allocation: attempt after attempt until it is finished, preempted, or beyond its budgets.

    Args:
        run: the run, with its config.yaml.
        allocation: the job that it runs in.
    """

    def __init__(self, run: Run, allocation: Allocation) -> None:
        self.run = run
        self.allocation = allocation
        self.config = run.checked_config()
        self.handler = PreemptionHandler(self.config.preemption.save_signal)
        self.attempt: Attempt | None = None
        """The newest that this agent claimed."""

    @functools.cached_property
    def grace(self) -> Grace:
        """What there is between a notice and the kill. Asks the scheduler the first time."""
        return Grace(self.config.preemption.grace_s, self.allocation.grace_s())

    def main(self) -> Verdict:
        """Install the handlers and run attempts until one of them is the last here. Blocks. Main thread.

        Raises:
            RunBusy: another attempt of the run is alive on this node and does not end.
        """
        with self.handler:
            while True:
                self._wait_for_older_attempts()
                if self.run.is_cancelled():
                    return Verdict("cancelled", error="the run was cancelled before this job started")
                job = self.allocation
                try:
                    gpus = None if job.num_gpus is None else job.num_gpus * job.num_nodes
                    self.attempt = self.run.claim_attempt(job.job_id, job.scheduler, job.restart, self.attempt, gpus)
                except Fenced as fenced:
                    return Verdict("fenced", error=str(fenced))
                verdict = _Supervision(self, self.attempt).main()
                move = next_move(self.run, self.config.retry)
                if verdict.outcome != "failed" or not move.again or self.handler.notice is not None:
                    return verdict
                self._pause(move.pause_s)

    def _wait_for_older_attempts(self) -> None:
        """Two copies of a run never train at the same time on one node; across nodes the fence sees to it."""
        deadline = time.monotonic() + _OTHERS_END_WITHIN_S
        attempts = self.run.attempts()
        for attempt in attempts[-3:]:
            agent = attempt.agent()
            while agent is not None and agent.pid != os.getpid() and agent.is_alive():
                if time.monotonic() > deadline:
                    raise RunBusy(
                        f"attempt {attempt.number} of {self.run.name} is still running (pid {agent.pid} on "
                        f"{agent.host}): this job leaves it alone. To end it: latentwire cancel {self.run.name}"
                    )
                time.sleep(_POLL_S)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.handler.notice is None:
            time.sleep(_POLL_S)


class _Supervision:
    """One attempt, from its placement to its verdict."""

    def __init__(self, agent: Agent, attempt: Attempt) -> None:
        self.agent, self.attempt = agent, attempt
        self.run, self.config, self.allocation = agent.run, agent.config, agent.allocation
        self.journal = Journal(attempt.path / "events.agent.jsonl")
        self.processes = NodeProcesses(attempt, self.config, self.allocation, agent.handler, self.journal)
        self._alerts = AlertWatch(attempt, self.config, self.journal, self.allocation.num_nodes)
        self._elsewhere: dict[int, int] = {}
        self._next_look = self._next_fence = 0.0
        self._all_come_by = time.monotonic() + _FOLLOWERS_COME_WITHIN_S

    def main(self) -> Verdict:
        self.journal.event(
            "attempt_started",
            job_id=self.allocation.job_id,
            scheduler=self.allocation.scheduler,
            total_steps=self.config.train.steps,
            version=__version__,
        )
        try:
            verdict = self._start_and_watch()
        except (ConfigError, OSError) as error:
            verdict = Verdict("failed", "user" if isinstance(error, ConfigError) else "other", error=str(error))
        finally:
            self.processes.end()
            self._alerts.close(at_once=self.agent.handler.notice is not None)
        if verdict.outcome != "finished" and not self.attempt.is_newest():  # what happened here calls for nothing more
            verdict = _SUPERSEDED
        if self.run.is_cancelled() and verdict.outcome in ("preempted", "failed", "lost"):
            verdict = dataclasses.replace(verdict, outcome="cancelled")
        if self.agent.handler.notice is None:  # roll-ups read all that was ever written: the next attempt makes them
            self._roll_up()
        self.journal.event("attempt_ended", **{k: v for k, v in dataclasses.asdict(verdict).items() if v is not None})
        self.journal.sync()
        return verdict

    def _start_and_watch(self) -> Verdict:
        inventory, job = take_inventory(), self.allocation
        self._record_environment(inventory)
        self._record_config()
        placement = self._plan(inventory)
        write_json(self.attempt.path / "placement.json", dataclasses.asdict(placement))
        self._tell_if_halved(placement)
        self.journal.event("placed", devices=placement.devices, micro_batch=placement.micro_batch, why=placement.why)
        rendezvous = Rendezvous(ONE_NODE if job.num_nodes == 1 else job.address(), _free_port())
        if job.num_nodes > 1:
            rendezvous.write(self.attempt)
        self._elsewhere = {rank: node for rank, node in enumerate(placement.nodes) if node != job.node_rank}
        self.processes.start(placement, rendezvous)
        self._forecast()  # when the ranks are on their way: the scheduler may take its time to answer
        watch = (self.config.elastic, self.processes.state_of, self.journal.event)
        return self._watch(HangWatch(self.attempt, placement.world_size, *watch))

    def _plan(self, inventory: Inventory) -> Placement:
        found = read_json(self.run.path / "micro_batch.json")  # what the ranks of an earlier attempt made of ``auto``
        recorded = found if isinstance(found, dict) else {}
        weigh_with = functools.partial(
            weigh,
            self.config,
            inventory,
            halvings=num_halvings(self.run, since=recorded.get("attempt", 0)),
            num_nodes=self.allocation.num_nodes,
            num_gpus=self.allocation.num_gpus,
            micro_batch=recorded.get("micro_batch"),
            one_at_a_time=had_too_many_at_once(self.run),
        )
        footprint = footprint_of(self.config)
        corrected = self._corrected(footprint)
        try:
            return weigh_with(corrected).placement()
        except ConfigError as error:
            if corrected is footprint:
                raise
            # what has trained before may train again, however full it was
            self.journal.event("memory_correction_ignored", reason=str(error))
            return weigh_with(footprint).placement()

    def _corrected(self, footprint: Footprint | None) -> Footprint | None:
        """What the workload says it takes, scaled to what an earlier attempt was seen to take."""
        if footprint is None:
            return None
        for attempt in reversed(self.run.attempts()):
            seen = read_json(attempt.path / "memory.json")
            if isinstance(seen, dict):
                probe = Probe(seen["micro_batch"], seen["peak_bytes"][0])
                return fitted(footprint, probe, seen["modules"], seen["gradient_checkpointing"], seen["in_flight"])
        return footprint

    def _record_environment(self, inventory: Inventory) -> None:
        earlier = [read_json(a.path / "environment.json") for a in self.run.attempts() if a != self.attempt]
        write_environment(self.attempt, self.allocation, inventory)
        known = [e for e in earlier if isinstance(e, dict)]
        changes = inventory.changes_since(known[-1]) if known else []
        if changes:
            self.journal.event("environment_changed", changes=changes, note="bits may differ from here on")

    def _record_config(self) -> None:
        """What this attempt runs with; what is new since the one before is told, of alerts only the keys."""
        config = self.config.model_dump(mode="json")
        write_json(self.attempt.path / "config.json", config)
        before = self._before()
        earlier = None if before is None else read_json(before.path / "config.json")
        changes = differences(earlier, config) if isinstance(earlier, dict) else []
        if changes:
            told = [each.partition(":")[0] if each.startswith("alerts.") else each for each in changes]
            self.journal.event("config_changed", changes=told)

    def _before(self) -> Attempt | None:
        return next((a for a in reversed(self.run.attempts()) if a.number < self.attempt.number), None)

    def _tell_if_halved(self, placement: Placement) -> None:
        """One plan for all ranks: whichever of them ran out of memory, all compute the same from here on."""
        before = self._before()
        if before is None or verdict_of(before).cause != "oom":
            return
        earlier = read_json(before.path / "placement.json")
        if isinstance(earlier, dict) and earlier["micro_batch"] > placement.micro_batch:
            change = {"from": earlier["micro_batch"], "to": placement.micro_batch}
            self.journal.event("micro_batch_halved", **change, note="bits may differ from here on")

    def _forecast(self) -> None:
        """Hold what earlier attempts took against the grace; rank 0 does so with what it measures itself."""
        grace = self.agent.grace
        if grace.scheduler_s is not None:
            self.attempt.set_grace(grace.scheduler_s)
        measured = measured_before(self.run)
        if measured is not None:
            self.journal.event("forecast", **as_event(forecast(measured, grace, self.config.checkpoint), measured))

    # --- watching -----------------------------------------------------------------------------------------------------

    def _watch(self, hangs: HangWatch) -> Verdict:
        """Pass signals on until the ranks have ended, one fails or does not come, or the attempt is superseded."""
        while True:
            if self.processes.have_ended or self.processes.have_failed or self._has_failed_elsewhere():
                return self._judge()
            if time.monotonic() > self._next_fence:
                self._next_fence = time.monotonic() + _FENCE_EVERY_S
                if not self.attempt.is_newest():
                    return _SUPERSEDED
                if time.monotonic() > self._all_come_by and (missing := self._nodes_that_never_came()):
                    return Verdict("lost", error=f"{missing} did not come within {_FOLLOWERS_COME_WITHIN_S:g} s")
            if (hang := hangs.look()) is not None:
                return Verdict("failed", "network", error=hang)
            self.processes.pass_signals_on()
            if self.agent.handler.notice is None:
                self._alerts.look()
            time.sleep(_POLL_S)

    def _has_failed_elsewhere(self) -> bool:
        if not self._elsewhere or time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + _LOOK_ELSEWHERE_EVERY_S
        return any(end.is_failure for end in self._said_elsewhere().values())

    def _said_elsewhere(self) -> dict[int, RankEnd]:
        return {rank: end for rank, end in said_by_ranks(self.attempt).items() if rank in self._elsewhere}

    def _nodes_that_never_came(self) -> str:
        nodes = sorted(set(self._elsewhere.values()))
        return _names(n for n in nodes if not (self.attempt.path / f"environment.node{n}.json").exists())

    def _judge(self) -> Verdict:
        """The gravest of what happened to the ranks; *lost* where other nodes do not say what broke the connection."""
        ends = self._wait_for_words()
        verdict = judge(ends)
        silent = sorted({node for rank, node in self._elsewhere.items() if rank not in ends})
        if silent and RankEnd(verdict).is_echo:
            return Verdict("lost", error=f"{_names(silent)} ended without a word: {verdict.error}")
        notice = self.agent.handler.notice
        if verdict.outcome == "preempted" and notice is not None and notice.signal == "SIGINT":
            return dataclasses.replace(verdict, outcome="interrupted")
        return verdict

    def _wait_for_words(self) -> dict[int, RankEnd]:
        """How the ranks of all nodes ended, as soon as that explains itself; what is still unknown then is left out."""
        deadline = time.monotonic() + _WORDS_COME_WITHIN_S
        while True:
            ends = self.processes.ends() | self._said_elsewhere()
            explained = any(end.is_failure and not end.is_echo for end in ends.values())
            if explained or set(ends) >= set(self._elsewhere) or time.monotonic() > deadline:
                return ends
            time.sleep(_POLL_S)

    # --- the end ------------------------------------------------------------------------------------------------------

    def _roll_up(self) -> None:
        if not self.attempt.is_newest():
            return
        try:
            write_json(self.run.path / "metrics.json", summarise_metrics(self.run))
            paths = [path for attempt in self.run.attempts() for path in stats_files(attempt.path)]
            write_json(self.run.path / "gpu_stats.json", summarise(paths))
        except OSError as error:  # a full disk must not turn a good attempt into a failed one
            self.journal.event("rollup_failed", error=str(error))


def _free_port() -> int:
    """A port that nobody listens on now. Taken by another before rank 0 does, it is a network failure: tried again."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _names(nodes: Iterable[int]) -> str:
    return ", ".join(f"node {node}" for node in nodes)
