"""Who a process is and on which node, so that a pid that was given to somebody else is never mistaken for it."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
from typing import Any

from latentwire.run.figures import number, whole

_HIGHEST_PID = 2**22  # of any Linux


def node_name() -> str:
    """This node: its name in Slurm inside a job, which need not be its host name; else the host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@dataclasses.dataclass(frozen=True)
class ProcessIdentity:
    """A process for all time: node, pid, and when it started (unix seconds)."""

    host: str
    pid: int
    started: float

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @classmethod
    def of(cls, pid: int | None = None) -> ProcessIdentity:
        """The identity of a living process of this node, by default our own.

        Raises:
            ProcessLookupError: there is no such process.
        """
        import psutil  # 30 ms: only where a process is looked at

        pid = os.getpid() if pid is None else pid
        try:
            return cls(node_name(), pid, psutil.Process(pid).create_time())
        except psutil.NoSuchProcess:
            raise ProcessLookupError(f"there is no process {pid} on {node_name()}") from None

    @classmethod
    def from_json(cls, value: Any) -> ProcessIdentity | None:
        """Read what ``dataclasses.asdict`` wrote; None for anything else."""
        if not isinstance(value, dict):
            return None
        host, pid, started = value.get("host"), whole(value.get("pid"), 0), number(value.get("started"))
        if not isinstance(host, str) or not 0 < pid <= _HIGHEST_PID or started is None:
            return None
        return cls(host, pid, float(started))

    def is_alive(self) -> bool | None:
        """True or False on its own node; None on any other and outside of its job, where nobody can tell."""
        if self.host != node_name():
            return None
        import psutil

        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 1.0
            return same and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        except psutil.NoSuchProcess:
            return False

    def send(self, signum: signal.Signals) -> bool:
        """Send a signal; False where the process is gone, lives elsewhere or only shares the pid."""
        if not self.is_alive():
            return False
        try:
            os.kill(self.pid, signum)
        except ProcessLookupError:
            return False
        return True
