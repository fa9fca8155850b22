"""The machine around the GPUs: CPU, memory, swap, the run's disk, the cgroup's limit and the job's processes."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import psutil

UNLIMITED_BYTES = 1 << 60
"""cgroup v1 writes a huge number where there is no limit."""
TREE_SHARE = 1 / 10_000
"""Of one core: so much may finding the job's processes cost, which reads all of /proc, and so much reading them."""


_MEMINFO = re.compile(r"^(MemTotal|MemAvailable|SwapTotal|SwapFree):\s+(\d+)", re.MULTILINE)


class HostMonitor:
    """Samples the host; the sampler owns one."""

    def __init__(
        self,
        path: Path,
        root_pid: int | None = None,
        *,
        proc: Path = Path("/proc"),
        cgroups: Path = Path("/sys/fs/cgroup"),
    ) -> None:
        """Start the CPU counters.

        Args:
            path: Anything on the file system whose free space matters: the run's directory.
            root_pid: Resident memory is summed over this process and its descendants; None sums nothing.
            proc: Where this process's cgroups are looked up.
            cgroups: Where the cgroup file systems are mounted.
        """
        self._path = path
        self._tree = None if root_pid is None else _ProcessTree(root_pid)
        self._cgroup = _MemoryCgroup(proc, cgroups)
        self._meminfo = proc / "meminfo"
        psutil.cpu_percent()

    def sample(self) -> dict[str, object]:
        """One record; blocks for well under a millisecond. A disk, cgroup or process that is not there is null.

        Returns:
            ``cpu_percent`` is the whole machine's mean since the last call (or the construction);
            ``processes_rss_bytes`` counts pages that processes share once for each.
        """
        memory = self._memory()
        disk_free_bytes, disk_total_bytes = self._disk()
        cgroup_used_bytes, cgroup_limit_bytes = self._cgroup.read()
        return {
            "cpu_percent": psutil.cpu_percent(),
            "load_1m": round(os.getloadavg()[0], 2),
            **memory,
            "disk_free_bytes": disk_free_bytes,
            "disk_total_bytes": disk_total_bytes,
            "cgroup_memory_used_bytes": cgroup_used_bytes,
            "cgroup_memory_limit_bytes": cgroup_limit_bytes,
            "processes_rss_bytes": self._tree.rss_bytes() if self._tree else None,
        }

    def _memory(self) -> dict[str, int | None]:
        """Memory and swap from one small file: psutil parses much more for it, half of what a sample would cost."""
        try:
            text = self._meminfo.read_text()
        except OSError:
            text = ""
        sizes = {name: int(kib) << 10 for name, kib in _MEMINFO.findall(text)}
        total, available = sizes.get("MemTotal"), sizes.get("MemAvailable")
        swap_total = sizes.get("SwapTotal")
        return {
            "memory_used_bytes": _difference(total, available),
            "memory_available_bytes": available,
            "memory_total_bytes": total,
            "swap_used_bytes": _difference(swap_total, sizes.get("SwapFree")),
            "swap_total_bytes": swap_total,
        }

    def _disk(self) -> tuple[int | None, int | None]:
        try:
            disk = os.statvfs(self._path)
        except OSError:
            return None, None  # a folder that vanished, or a stale NFS handle
        return disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize


def _difference(total: int | None, rest: int | None) -> int | None:
    return None if total is None or rest is None else total - rest


def free_memory_bytes() -> int:
    """What this process may still take: of the machine's memory, and of its cgroup's (Slurm limits the job's)."""
    used, limit = _MemoryCgroup(Path("/proc"), Path("/sys/fs/cgroup")).read()
    left = [psutil.virtual_memory().available]
    if used is not None and limit is not None:
        left.append(limit - used)
    return max(0, min(left))


class _ProcessTree:
    """Resident memory of a process and its descendants."""

    def __init__(self, root_pid: int) -> None:
        self._root_pid = root_pid
        self._members: list[psutil.Process] = []
        self._rss_bytes: int | None = None
        self._walk = _Rationed(self._find)
        self._look = _Rationed(self._add_up)

    def rss_bytes(self) -> int | None:
        """The sum as of some seconds ago, or None once the root is gone."""
        self._walk()
        self._look()
        return self._rss_bytes

    def _find(self) -> None:
        try:
            root = psutil.Process(self._root_pid)
            self._members = [root, *root.children(recursive=True)]
        except psutil.Error:
            self._members = []

    def _add_up(self) -> None:
        sizes = [_rss_bytes(member) for member in self._members]
        known = [size for size in sizes if size is not None]
        self._rss_bytes = sum(known) if sizes and sizes[0] is not None else None


class _Rationed:
    """Does something only as often as its share of a core allows: seldom on a node with thousands of processes."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._not_before_s = 0.0

    def __call__(self) -> None:
        if time.monotonic() >= self._not_before_s:
            began_s = time.process_time()
            self._work()
            self._not_before_s = time.monotonic() + (time.process_time() - began_s) / TREE_SHARE


def _rss_bytes(process: psutil.Process) -> int | None:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return None


class _MemoryCgroup:
    """The tightest memory limit over this process: its own cgroup's, or that of one above (Slurm limits the step)."""

    def __init__(self, proc: Path, cgroups: Path) -> None:
        self._files = [
            *_files(cgroups, _own_cgroup(proc, ""), "memory.current", "memory.max"),
            *_files(cgroups / "memory", _own_cgroup(proc, "memory"), "memory.usage_in_bytes", "memory.limit_in_bytes"),
        ]
        limits = [(limit_bytes, files) for files in self._files if (limit_bytes := _bytes_in(files[1])) is not None]
        if limits:
            self._files = [min(limits)[1]]

    def read(self) -> tuple[int | None, int | None]:
        """Bytes used (page cache included) and the limit; None for what is absent or unlimited."""
        if not self._files:
            return None, None
        used, limit = self._files[0]
        return _bytes_in(used), _bytes_in(limit)


def _own_cgroup(proc: Path, controller: str) -> str | None:
    """This process's path under a cgroup v1 controller, or under v2 for ``""``."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controller in controllers.split(","):
            return path
    return None


def _files(mount: Path, path: str | None, used: str, limit: str) -> list[tuple[Path, Path]]:
    """The usage and limit files that exist, of this cgroup and of those above it, innermost first."""
    if path is None:
        return []
    own = mount / path.lstrip("/")
    # In a container the path may be the host's own, and then only the mount itself exists here.
    levels = [level for level in (own, *own.parents) if level.is_relative_to(mount)]
    return [(level / used, level / limit) for level in levels if (level / used).is_file()]


def _bytes_in(file: Path) -> int | None:
    try:
        value = int(file.read_text())
    except (OSError, ValueError):  # v2 writes the word "max" where there is no limit
        return None
    return value if value < UNLIMITED_BYTES else None
