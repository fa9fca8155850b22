"""The processes of an attempt on one node: its ranks and its monitor. The leader has them, and each follower.

Ranks are plain subprocesses that die with the agent that started them.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from latentwire.config import Config
from latentwire.elastic.inventory import Device, Inventory, cpu_model
from latentwire.elastic.planner import Placement
from latentwire.monitor.devices import GPU
from latentwire.monitor.gpu import list_gpus
from latentwire.preemption.handler import EXIT_CODE, Notice, PreemptionHandler, blocked
from latentwire.run.atomic import read_json, write_json
from latentwire.run.budget import Verdict
from latentwire.run.directory import Attempt
from latentwire.run.journal import Journal
from latentwire.run.process import node_name
from latentwire.train.allocation import Allocation
from latentwire.train.trackers import Trackers
from latentwire.train.verdicts import RankEnd, said_by_ranks
from latentwire.train.worker import AGENT_PID

ONE_NODE = "127.0.0.1"
"""Where the ranks of one node meet."""
LAUNCH_QUEUES = {"CUDA_SCALE_LAUNCH_QUEUES": "4x"}
_LAST_LINES = 50
_KILL_AFTER_S = 20.0
_MONITOR_AGAIN_S = 60.0
"""So long a rank may take to leave."""
_TRACKERS_END_WITHIN_S = 5.0
_LAST_TRACKERS_END_WITHIN_S = 60.0
"""Of a finished run: what is not sent then is sent by no later attempt."""


@dataclasses.dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of an attempt meet: an address that each of them reaches, and a port on rank 0's node."""

    address: str
    port: int

    def write(self, attempt: Attempt) -> None:
        """Tell the followers. The leader's last word before it starts its ranks."""
        write_json(attempt.path / "rendezvous.json", dataclasses.asdict(self))

    @classmethod
    def read(cls, attempt: Attempt) -> Rendezvous | None:
        """What the leader wrote, None before it did."""
        record = read_json(attempt.path / "rendezvous.json")
        return cls(record["address"], record["port"]) if isinstance(record, dict) else None


class NodeProcesses:
    """Starts the ranks and the monitor of this node, hands signals on to them, and knows how they ended.

    Args:
        attempt: whose they are.
        config: the run's.
        allocation: the job, as this node sees it.
        handler: of this process, the agent.
        journal: the agent's.
    """

    def __init__(
        self,
        attempt: Attempt,
        config: Config,
        allocation: Allocation,
        handler: PreemptionHandler,
        journal: Journal,
    ) -> None:
        self._attempt, self._config, self._allocation = attempt, config, allocation
        self._handler, self._journal = handler, journal
        self._ranks: dict[int, subprocess.Popen[bytes]] = {}
        self._monitor: subprocess.Popen[bytes] | None = None
        self._next_monitor = 0.0
        self._trackers = Trackers(attempt, () if allocation.node_rank else config.monitor.trackers, journal)
        self._passed_on: Notice | None = None
        self._interrupted_twice = False

    # --- starting -----------------------------------------------------------------------------------------------------

    def start(self, placement: Placement, rendezvous: Rendezvous) -> None:
        """Start the monitor, the trackers and the ranks that are placed here.

        Raises:
            OSError: a process could not be started, or a log not be opened.
        """
        with blocked():  # what arrives before a rank's handlers stand waits for them
            self._start_monitor()
            self._trackers.start()
            for local_rank, rank in enumerate(placement.ranks_on(self._allocation.node_rank)):
                self._start_rank(rank, local_rank, placement, rendezvous)

    def _start_monitor(self) -> None:
        suffix = node_suffix(self._allocation)
        stats = ["--output-dir", str(self._attempt.path), "--file-name", f"gpu_stats{suffix}.jsonl"]
        options = ["--interval", str(self._config.monitor.interval_s), "--until-stdin-closes"]
        if not self._allocation.node_rank:  # one process for the files of all nodes
            options.append("--thin-earlier")
        with os.fdopen(self._log(f"monitor{suffix}.log"), "ab") as log:
            self._monitor = subprocess.Popen(
                [sys.executable, "-m", "latentwire.monitor", *stats, *options],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _keep_monitor(self) -> None:
        """Its file is the attempt's sign of life: if it ended, tell of it and start it again, once a minute at most."""
        if self._monitor is None or self._monitor.poll() is None or time.monotonic() < self._next_monitor:
            return
        self._next_monitor = time.monotonic() + _MONITOR_AGAIN_S
        assert self._monitor.stdin is not None
        self._monitor.stdin.close()
        self._journal.event("monitor_ended", how=_how(self._monitor.returncode))
        try:
            self._start_monitor()
        except OSError as error:  # the ranks can do without; the next look tries again
            self._journal.event("monitor_not_started", error=str(error))

    def _start_rank(self, rank: int, local_rank: int, placement: Placement, rendezvous: Rendezvous) -> None:
        environ = os.environ | {
            **network_variables(rendezvous, os.environ),
            **launch_variables(placement, os.environ),
            AGENT_PID: str(os.getpid()),
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(placement.world_size),
            "MASTER_ADDR": rendezvous.address,
            "MASTER_PORT": str(rendezvous.port),
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),  # the ranks find what this process finds
        }
        run, number = self._attempt.run, self._attempt.number
        command = ["-m", "latentwire.train.worker", "--run", str(run.path), "--attempt", str(number)]
        self._ranks[rank] = subprocess.Popen(
            [sys.executable, *command],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=self._log(_log_name("stdout", rank)),
            stderr=self._log(_log_name("stderr", rank)),
            start_new_session=True,
        )

    def _log(self, name: str) -> int:
        return os.open(self._attempt.path / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    # --- watching -----------------------------------------------------------------------------------------------------

    @property
    def have_ended(self) -> bool:
        """No rank runs here."""
        return not self.running

    @property
    def running(self) -> list[int]:
        """The ranks that have not ended."""
        return [rank for rank, process in self._ranks.items() if process.poll() is None]

    @property
    def have_failed(self) -> bool:
        """A rank ended otherwise than finished or preempted."""
        return any(rank.poll() not in (None, 0, EXIT_CODE) for rank in self._ranks.values())

    def state_of(self, rank: int) -> str | None:
        """What the kernel says of a rank's process: ``sleeping``, ``stopped``; None for one that is not here."""
        process = self._ranks.get(rank)
        if process is None or process.poll() is not None:
            return None
        import psutil  # 30 ms: only where a rank is silent

        return str(psutil.Process(process.pid).status())

    def ends(self) -> dict[int, RankEnd]:
        """How the ranks that have ended did; what a rank did not say is read from its exit code."""
        codes = {rank: code for rank, process in self._ranks.items() if (code := process.poll()) is not None}
        said = {rank: end for rank, end in said_by_ranks(self._attempt).items() if rank in self._ranks}
        return {rank: RankEnd(self._read_code(rank, code)) for rank, code in codes.items()} | said

    def _read_code(self, rank: int, code: int) -> Verdict:
        if code in (0, EXIT_CODE):  # it could not write more: the disk is full
            return Verdict("preempted" if code else "finished", error=f"rank {rank} could not write how it ended")
        if code < 0 and self._handler.notice is not None:
            return Verdict("preempted", step=None, error=f"rank {rank} was ended by {signal.Signals(-code).name}")
        lines = self._last_lines(rank)
        error = f"rank {rank} ended {_how(code)}: {lines[-1][:300] if lines else 'it left no message'}"
        if code == -signal.SIGABRT and any("NCCL" in line for line in lines):
            return Verdict("failed", "network", error=error)  # its watchdog does that where another rank is lost
        return Verdict("failed", "killed" if code < 0 else "other", error=error)

    def _last_lines(self, rank: int) -> list[str]:
        """Of what it complained of; bars of progress go to stderr too, and are no complaint."""
        log = self._attempt.path / _log_name("stderr", rank)
        lines = log.read_text(errors="replace").strip().splitlines()
        return [line for line in lines if "%|" not in line][-_LAST_LINES:]

    def pass_signals_on(self) -> None:
        """Hand on what this process was told since the last call. After a notice it asks the scheduler: a second."""
        self._trackers.look()
        notice = self._handler.notice
        if notice is None:
            self._keep_monitor()
        if notice is not None and self._passed_on is None:
            self._passed_on = notice
            self._trackers.begin_to_end()  # beside the ranks' save: afterwards nobody waits for them
            self._journal.event("notice", signal=notice.signal, received=round(notice.unix_s, 3))
            self._signal(signal.SIGTERM)  # not INT: Slurm may have sent that to the ranks too, and twice means at once
            end = self._allocation.end_unix_s()
            if end is not None:
                self._attempt.set_end(end)
        if self._handler.leave_now and not self._interrupted_twice:
            self._interrupted_twice = True
            self._signal(signal.SIGKILL)  # at once, wherever a rank stands; what is committed is safe from it
        if self._handler.take_save_request():
            self._signal(signal.Signals[f"SIG{self._config.preemption.save_signal}"])
            self._journal.event("save_requested")

    def _signal(self, signum: signal.Signals) -> None:
        for rank in self._ranks.values():
            if rank.poll() is None:
                rank.send_signal(signum)

    # --- the end ------------------------------------------------------------------------------------------------------

    def end(self, kill_after_s: float = _KILL_AFTER_S) -> None:
        """No rank outlives the attempt; monitor and trackers end with their input. Blocks until all are gone."""
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)  # one that is stopped hears nothing else
        deadline = time.monotonic() + kill_after_s
        for rank in self._ranks.values():
            try:
                rank.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()
        finished = bool(self._ranks) and all(rank.poll() == 0 for rank in self._ranks.values())
        within_s = _LAST_TRACKERS_END_WITHIN_S if finished else _TRACKERS_END_WITHIN_S
        self._trackers.end(within_s, lambda: self._handler.notice is not None)
        if self._monitor is not None:  # last, as its file is the attempt's sign of life
            assert self._monitor.stdin is not None
            self._monitor.stdin.close()
            try:
                self._monitor.wait(5.0)
            except subprocess.TimeoutExpired:
                self._monitor.kill()
                self._monitor.wait()


def node_suffix(allocation: Allocation) -> str:
    """What stands in the names of a node's own files: nothing for the leader's, else ``.node1`` and so on."""
    return f".node{allocation.node_rank}" if allocation.node_rank else ""


def write_environment(attempt: Attempt, allocation: Allocation, inventory: Inventory) -> None:
    """Write down what this node has. Of a follower it also says that it has come."""
    facts = dataclasses.asdict(inventory) | {"host": node_name(), "python": platform.python_version()}
    write_json(attempt.path / f"environment{node_suffix(allocation)}.json", facts)


def as_devices(gpus: Iterable[GPU]) -> tuple[Device, ...]:
    """What the planner wants to know of the GPUs that the driver names."""
    return tuple(Device(gpu.name, gpu.memory_bytes, gpu.is_mig) for gpu in gpus)


def take_inventory() -> Inventory:
    """What this node has. Called by the agents; asks the GPU driver, not torch."""
    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    cpuinfo = Path("/proc/cpuinfo")
    return Inventory(
        gpus=as_devices(list_gpus()),
        cpu_model=cpu_model(cpuinfo.read_text().splitlines() if cpuinfo.exists() else []),
        versions={package: metadata.version(package) for package in packages},
    )


def network_variables(rendezvous: Rendezvous, environ: Mapping[str, str]) -> dict[str, str]:
    """Ranks of one node need no network: a host name that leads nowhere, or into a VPN, must not keep them apart.

    On several nodes the libraries choose; and what the user has set in ``environ`` stands.
    """
    if rendezvous.address != ONE_NODE:
        return {}
    loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}  # NCCL takes a plain name for a beginning
    return {name: value for name, value in loopback.items() if name not in environ}


def launch_variables(placement: Placement, environ: Mapping[str, str]) -> dict[str, str]:
    """Room for the launches of the next micro-batch while those of this one wait for another GPU.

    A GPU takes about 1,000 launches ahead, then a launch blocks the host. Only where that is in the way: larger queues
    have made other programs hang (llama.cpp, pull request 19230). What the user has set in ``environ`` stands.
    """
    needed = LAUNCH_QUEUES if placement.in_flight > 1 else {}
    return {name: value for name, value in needed.items() if name not in environ}


def _how(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def _log_name(stream: str, rank: int) -> str:
    return f"{stream}.log" if rank == 0 else f"{stream}.rank{rank}.log"
