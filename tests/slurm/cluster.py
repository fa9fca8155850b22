"""A private Slurm of two nodes on this machine: ``python tests/slurm/cluster.py up|down FOLDER``.

Own munge, own ports, own folders; it needs root and Debian's slurm-wlm, slurmctld, slurmd and munge, and no systemd,
cgroups or containers. Everything that is started is ended by its pid file.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

NODES = ("n0", "n1")
GPUS_PER_NODE = 4
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo")
_PATIENCE_S = 180.0

_CONF = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
SlurmdTimeout=10
MpiDefault=none
ReturnToService=2
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_interval=5
NodeName=n[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[2]},{ports[3]}] CPUs=16 RealMemory=8000 Gres=gpu:4
PartitionName=preempt Nodes=ALL Default=YES PriorityTier=1 GraceTime=20 PreemptMode=REQUEUE MaxTime=60
PartitionName=nograce Nodes=ALL PriorityTier=1 GraceTime=0 PreemptMode=REQUEUE MaxTime=60
PartitionName=cancel Nodes=ALL PriorityTier=1 GraceTime=20 PreemptMode=CANCEL MaxTime=60
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=60
"""


def missing_programs() -> list[str]:
    """What a private Slurm lacks here: programs, or root."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return lacking + ([] if os.geteuid() == 0 else ["root"])


class Cluster:
    """The cluster in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.conf = self.folder / "slurm.conf"

    @property
    def environ(self) -> dict[str, str]:
        """The environment in which Slurm's commands speak to this cluster."""
        return {**os.environ, "SLURM_CONF": str(self.conf), "PATH": _path()}

    def up(self) -> None:
        """Start all daemons and wait until both nodes are idle.

        Raises:
            RuntimeError: a program is missing, or the nodes do not come up; the daemons' logs say why.
        """
        if missing_programs():
            raise RuntimeError(
                f"a private Slurm needs {', '.join(missing_programs())}: apt-get install slurm-wlm munge"
            )
        self.folder.mkdir(parents=True)
        self._write_files()
        pid, sock, log, seed, key = (self.folder / f"munge.{n}" for n in ("pid", "sock", "log", "seed", "key"))
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        options = [f"--pid-file={pid}", f"--socket={sock}", f"--log-file={log}", f"--seed-file={seed}"]
        self.run("munged", f"--key-file={key}", *options, "--force")
        self.start_controller()
        for node in NODES:
            self.start_node(node)
        self.wait_until_idle()

    def down(self) -> None:
        """End everything, whatever state it is in, and leave the folder."""
        with suppress(subprocess.SubprocessError, OSError):
            self.run("scancel", "--me", "--full")
        for name in [*(f"slurmd-{node}" for node in NODES), "slurmctld", "munge"]:
            self.end(name, signal.SIGTERM)

    def start_controller(self) -> None:
        """Start slurmctld, unless it runs; it knows its jobs from before."""
        if not _is_running(self._pid("slurmctld")):
            self.run("slurmctld")

    def start_node(self, node: str) -> None:
        """Start a node's daemon."""
        (self.folder / f"spool-{node}").mkdir(exist_ok=True)
        self.run("slurmd", "-N", node, "-b")

    def wait_until_idle(self) -> None:
        """Wait until both nodes are up and nothing runs on them."""
        self.wait_until(lambda: self.run("sinfo", "-h", "-p", "preempt", "-o", "%T %D").split() == ["idle", "2"])

    def end(self, name: str, signum: signal.Signals) -> None:
        """Send a daemon a signal by its pid file, and wait until it is gone."""
        pid = self._pid(name)
        if _is_running(pid):
            os.kill(pid, signum)
            self.wait_until(lambda: not _is_running(pid))

    def _pid(self, name: str) -> int:
        """Of a daemon; 0 if it was never started."""
        try:
            return int((self.folder / f"{name}.pid").read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def run(self, *command: str) -> str:
        """Standard output of a command of the cluster.

        Raises:
            subprocess.CalledProcessError: it failed; its standard error is in the exception.
        """
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout

    def wait_until(self, condition: object) -> None:
        """Look until a condition holds.

        Raises:
            RuntimeError: it does not within three minutes.
        """
        assert callable(condition)
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            with suppress(subprocess.CalledProcessError):
                if condition():
                    return
            time.sleep(0.1)
        raise RuntimeError(f"waited {_PATIENCE_S:g} s; see the logs in {self.folder}")

    def _write_files(self) -> None:
        host = socket.gethostname()
        self.conf.write_text(_CONF.format(host=host, folder=self.folder, ports=list(_free_ports(4))))
        (self.folder / "state").mkdir()
        devices = [self.folder / f"nvidia{index}" for index in range(GPUS_PER_NODE)]
        for index, device in enumerate(devices):  # Slurm looks for a character device; nobody opens it
            os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(195, index))
        gres = f"NodeName=n[0-1] Name=gpu File={self.folder}/nvidia[0-{GPUS_PER_NODE - 1}]\n"
        (self.folder / "gres.conf").write_text(gres)


def _free_ports(number: int) -> Iterator[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    for each in sockets:
        yield each.getsockname()[1]
        each.close()


def _is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def main() -> None:
    """Start or end a cluster by hand."""
    action, folder = sys.argv[1], Path(sys.argv[2])
    cluster = Cluster(folder)
    if action == "down":
        cluster.down()
        shutil.rmtree(cluster.folder, ignore_errors=True)
        return
    cluster.up()
    print(f"export SLURM_CONF={cluster.conf}")


if __name__ == "__main__":
    main()
