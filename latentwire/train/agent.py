"""The agent: one process on each node that starts the ranks, looks after them and judges how they ended.

It never imports torch: it is up in a fraction of a second, stays small, and what kills a rank does not kill it. Ranks
are plain processes that die with it. It writes ``events.agent.jsonl``; its last word there is ``attempt_ended``.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Protocol

from latentwire import __version__
from latentwire.elastic.inventory import Inventory, cpu_model
from latentwire.elastic.planner import Placement, plan
from latentwire.errors import ConfigError, RunBusy
from latentwire.monitor.gpu import list_gpus
from latentwire.monitor.rollup import summarise
from latentwire.preemption.forecast import Grace, as_event, forecast, measured_before
from latentwire.preemption.handler import EXIT_CODE, Notice, PreemptionHandler, blocked
from latentwire.run.atomic import read_json, write_json
from latentwire.run.budget import Verdict, next_move, num_halvings
from latentwire.run.directory import Attempt, Run
from latentwire.run.journal import Journal
from latentwire.run.rollup import summarise_metrics
from latentwire.train.worker import AGENT_PID

_POLL_S = 0.1
_FENCE_EVERY_S = 5.0
_OTHERS_END_WITHIN_S = 30.0
_KILL_AFTER_S = 20.0


class Allocation(Protocol):
    """What the agent may ask of the scheduler under which it runs."""

    @property
    def job_id(self) -> str:
        """The scheduler's name for the job."""

    @property
    def scheduler(self) -> str:
        """``local`` or ``slurm``."""

    def grace_s(self) -> float | None:
        """Seconds that the scheduler gives at preemption; None: not known. Asked once, before the ranks start."""

    def end_unix_s(self) -> float | None:
        """When the job is to be ended, as far as the scheduler says. Asked once, after a notice; may take a second."""


class Agent:
    """Runs a run in this allocation: attempt after attempt until it is finished, preempted, or beyond its budgets.

    Args:
        run: the run, with its config.yaml.
        allocation: the job that it runs in.
    """

    def __init__(self, run: Run, allocation: Allocation) -> None:
        self.run = run
        self.allocation = allocation
        self.config = run.config()
        self.handler = PreemptionHandler(self.config.preemption.save_signal)

    @functools.cached_property
    def grace(self) -> Grace:
        """What there is between a notice and the kill. Asks the scheduler the first time."""
        return Grace(self.config.preemption.grace_s, self.allocation.grace_s())

    def main(self) -> Verdict:
        """Install the handlers and run attempts until one of them is the last here. Blocks. Main thread.

        Raises:
            RunBusy: another attempt of the run is alive on this host and does not end.
        """
        with self.handler:
            while True:
                self._wait_for_older_attempts()
                if self.run.cancel_path.exists():
                    return Verdict("cancelled", error="the run was cancelled before this job started")
                attempt = self.run.claim_attempt(self.allocation.job_id, self.allocation.scheduler)
                verdict = _Supervision(self, attempt).main()
                move = next_move(self.run, self.config.retry)
                if verdict.outcome != "failed" or not move.again or self.handler.notice is not None:
                    return verdict
                self._pause(move.pause_s)

    def _wait_for_older_attempts(self) -> None:
        """Two copies of a run never train at the same time on one host; across hosts the fence sees to it."""
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
        self.run, self.config, self.handler = agent.run, agent.config, agent.handler
        self.journal = Journal(attempt.path / "events.agent.jsonl")
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.monitor: subprocess.Popen[bytes] | None = None
        self._passed_on: Notice | None = None
        self._interrupted_twice = False
        self._next_fence = 0.0

    def main(self) -> Verdict:
        self.journal.event(
            "attempt_started",
            job_id=self.agent.allocation.job_id,
            scheduler=self.agent.allocation.scheduler,
            total_steps=self.config.train.steps,
            version=__version__,
        )
        try:
            verdict = self._start_and_watch()
        except (ConfigError, OSError) as error:
            verdict = Verdict("failed", "user" if isinstance(error, ConfigError) else "other", error=str(error))
        finally:
            self._end_everything()
        if self.run.cancel_path.exists() and verdict.outcome in ("preempted", "failed"):
            verdict = dataclasses.replace(verdict, outcome="cancelled")
        self._roll_up()
        self.journal.event("attempt_ended", **{k: v for k, v in dataclasses.asdict(verdict).items() if v is not None})
        self.journal.sync()
        return verdict

    def _start_and_watch(self) -> Verdict:
        inventory = take_inventory()
        self._record_environment(inventory)
        placement = plan(self.config, inventory.gpus, num_halvings(self.run))
        write_json(self.attempt.path / "placement.json", dataclasses.asdict(placement))
        self.journal.event("placed", devices=placement.devices, micro_batch=placement.micro_batch, why=placement.why)
        self._forecast()
        with blocked():  # what arrives before a rank's handlers stand waits for them
            self._start_monitor()
            for rank in range(placement.world_size):
                self._start_rank(rank, placement)
        return self._watch()

    def _record_environment(self, inventory: Inventory) -> None:
        earlier = [read_json(a.path / "environment.json") for a in self.run.attempts() if a != self.attempt]
        facts = dataclasses.asdict(inventory) | {"host": socket.gethostname(), "python": platform.python_version()}
        write_json(self.attempt.path / "environment.json", facts)
        known = [e for e in earlier if isinstance(e, dict)]
        changes = inventory.changes_since(known[-1]) if known else []
        if changes:
            self.journal.event("environment_changed", changes=changes, note="bits may differ from here on")

    def _forecast(self) -> None:
        """Hold what earlier attempts took against the grace; rank 0 does so with what it measures itself."""
        grace = self.agent.grace
        if grace.scheduler_s is not None:
            self.attempt.set_grace(grace.scheduler_s)
        measured = measured_before(self.run)
        if measured is not None:
            self.journal.event("forecast", **as_event(forecast(measured, grace, self.config.checkpoint), measured))

    def _start_monitor(self) -> None:
        options = ["--interval", str(self.config.monitor.interval_s), "--until-stdin-closes"]
        self.monitor = subprocess.Popen(
            [sys.executable, "-m", "latentwire.monitor", "--output-dir", str(self.attempt.path), *options],
            stdin=subprocess.PIPE,
            stdout=self._log("monitor.log"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _start_rank(self, rank: int, placement: Placement) -> None:
        environ = os.environ | {
            AGENT_PID: str(os.getpid()),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(placement.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._port()),
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),  # the ranks find what this process finds
        }
        suffix = "" if rank == 0 else f".rank{rank}"
        command = ["-m", "latentwire.train.worker", "--run", str(self.run.path), "--attempt", str(self.attempt.number)]
        self.ranks.append(
            subprocess.Popen(
                [sys.executable, *command],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=self._log(f"stdout{suffix}.log"),
                stderr=self._log(f"stderr{suffix}.log"),
                start_new_session=True,
            )
        )

    def _port(self) -> int:
        if not hasattr(self, "_chosen_port"):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._chosen_port = int(probe.getsockname()[1])
        return self._chosen_port

    def _log(self, name: str) -> int:
        return os.open(self.attempt.path / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    # --- watching -----------------------------------------------------------------------------------------------------

    def _watch(self) -> Verdict:
        """Pass signals on until every rank has ended, or one has failed, or a newer attempt exists."""
        while True:
            codes = [rank.poll() for rank in self.ranks]
            if all(code is not None for code in codes) or any(code not in (None, 0, EXIT_CODE) for code in codes):
                return self._judge()
            if time.monotonic() > self._next_fence:
                self._next_fence = time.monotonic() + _FENCE_EVERY_S
                if not self.attempt.is_newest():
                    return Verdict("fenced", error="a newer attempt of this run exists")
            self._pass_signals_on()
            time.sleep(_POLL_S)

    def _pass_signals_on(self) -> None:
        notice = self.handler.notice
        if notice is not None and self._passed_on is None:
            self._passed_on = notice
            self.journal.event("notice", signal=notice.signal, received=round(notice.unix_s, 3))
            self._signal(signal.SIGTERM)  # not INT: Slurm may have sent that to the ranks too, and twice means at once
            end = self.agent.allocation.end_unix_s()
            if end is not None:
                self.attempt.set_end(end)
        if self.handler.leave_now and not self._interrupted_twice:
            self._interrupted_twice = True
            self._signal(signal.SIGKILL)  # at once, wherever a rank stands; what is committed is safe from it
        if self.handler.take_save_request():
            self._signal(signal.Signals[f"SIG{self.config.preemption.save_signal}"])
            self.journal.event("save_requested")

    def _signal(self, signum: signal.Signals) -> None:
        for rank in self.ranks:
            if rank.poll() is None:
                rank.send_signal(signum)

    def _judge(self) -> Verdict:
        """The gravest of what the ranks said; what a rank did not say is read from its exit code.

        Of several failures the first is the cause: the other ranks fail of the lost connection a moment later.
        """
        said = [self._ended_at(index) for index in range(len(self.ranks))]
        ended = [index for index, rank in enumerate(self.ranks) if said[index] or rank.poll() is not None]
        verdicts = {index: self._verdict_of(index, self.ranks[index]) for index in ended}
        order = ["failed", "fenced", "preempted", "finished"]
        gravest = min(order.index(verdict.outcome) for verdict in verdicts.values())
        equals = [index for index in ended if verdicts[index].outcome == order[gravest]]
        verdict = verdicts[min(equals, key=said.__getitem__) if order[gravest] == "failed" else equals[0]]
        notice = self.handler.notice
        if verdict.outcome == "preempted" and notice is not None and notice.signal == "SIGINT":
            return dataclasses.replace(verdict, outcome="interrupted")
        return verdict

    def _ended_at(self, index: int) -> float:
        """When a rank said how it ended; one that was killed said nothing, and the others only followed it."""
        record = read_json(self.attempt.path / f"rank{index}.json")
        return float(record.get("time", 0)) if isinstance(record, dict) else 0.0

    def _verdict_of(self, index: int, rank: subprocess.Popen[bytes]) -> Verdict:
        record = read_json(self.attempt.path / f"rank{index}.json")
        if isinstance(record, dict):
            return Verdict(record["outcome"], record.get("cause"), record.get("step"), record.get("error"))
        code = rank.returncode
        if code in (0, EXIT_CODE):  # it could not write more: the disk is full
            return Verdict("preempted" if code else "finished", error=f"rank {index} could not write how it ended")
        if code < 0 and self.handler.notice is not None:
            return Verdict("preempted", step=None, error=f"rank {index} was ended by {signal.Signals(-code).name}")
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return Verdict(
            "failed", "killed" if code < 0 else "other", error=f"rank {index} ended {how}: {self._last_line()}"
        )

    def _last_line(self) -> str:
        lines = (self.attempt.path / "stderr.log").read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it left no message"

    # --- the end ------------------------------------------------------------------------------------------------------

    def _end_everything(self) -> None:
        """No rank outlives the attempt; the monitor ends with its input."""
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + _KILL_AFTER_S
        for rank in self.ranks:
            try:
                rank.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()
        if self.monitor is not None:
            assert self.monitor.stdin is not None
            self.monitor.stdin.close()
            try:
                self.monitor.wait(5.0)
            except subprocess.TimeoutExpired:
                self.monitor.kill()
                self.monitor.wait()

    def _roll_up(self) -> None:
        if not self.attempt.is_newest():
            return
        try:
            write_json(self.run.path / "metrics.json", summarise_metrics(self.run))
            paths = [a.path / "gpu_stats.jsonl" for a in self.run.attempts()]
            write_json(self.run.path / "gpu_stats.json", summarise(paths))
        except OSError as error:  # a full disk must not turn a good attempt into a failed one
            self.journal.event("rollup_failed", error=str(error))


def take_inventory() -> Inventory:
    """What this node has. Called by the agent; asks the GPU driver, not torch."""
    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    cpuinfo = Path("/proc/cpuinfo")
    return Inventory(
        gpus=tuple(gpu.name for gpu in list_gpus()),
        cpu_model=cpu_model(cpuinfo.read_text().splitlines() if cpuinfo.exists() else []),
        versions={package: metadata.version(package) for package in packages},
    )
