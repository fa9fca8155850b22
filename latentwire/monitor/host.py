"""The machine around the GPUs: CPU, memory, swap, the run's disk, the cgroup's limit and the job's processes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil

UNLIMITED_BYTES = 1 << 60
"""cgroup v1 writes a huge number where there is no limit."""
TREE_WALK_SHARE = 1 / 1000
"""Finding a process tree reads all of /proc; it may cost this share of one core."""


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
        psutil.cpu_percent()

    def sample(self) -> dict[str, object]:
        """One record; blocks for well under a millisecond. A disk, cgroup or process that is not there is null.

        Returns:
            ``cpu_percent`` is the whole machine's mean since the last call (or the construction);
            ``processes_rss_bytes`` counts pages that processes share once for each.
        """
        memory, swap = psutil.virtual_memory(), psutil.swap_memory()
        disk_free_bytes, disk_total_bytes = self._disk()
        cgroup_used_bytes, cgroup_limit_bytes = self._cgroup.read()
        return {
            "cpu_percent": psutil.cpu_percent(),
            "load_1m": round(os.getloadavg()[0], 2),
            "memory_used_bytes": memory.used,
            "memory_available_bytes": memory.available,
            "memory_total_bytes": memory.total,
            "swap_used_bytes": swap.used,
            "swap_total_bytes": swap.total,
            "disk_free_bytes": disk_free_bytes,
            "disk_total_bytes": disk_total_bytes,
            "cgroup_memory_used_bytes": cgroup_used_bytes,
            "cgroup_memory_limit_bytes": cgroup_limit_bytes,
            "processes_rss_bytes": self._tree.rss_bytes() if self._tree else None,
        }

    def _disk(self) -> tuple[int | None, int | None]:
        try:
            disk = os.statvfs(self._path)
        except OSError:
            return None, None  # a folder that vanished, or a stale NFS handle
        return disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize


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
        self._walk_after_s = 0.0

    def rss_bytes(self) -> int | None:
        """The sum, or None once the root is gone."""
        if time.monotonic() >= self._walk_after_s:
            self._walk()
        sizes = [_rss_bytes(member) for member in self._members]
        return sum(size for size in sizes if size is not None) if sizes and sizes[0] is not None else None

    def _walk(self) -> None:
        began_s = time.process_time()
        try:
            root = psutil.Process(self._root_pid)
            self._members = [root, *root.children(recursive=True)]
        except psutil.Error:
            self._members = []
        # On a node with thousands of processes a walk takes tens of milliseconds, so it is made seldom there.
        self._walk_after_s = time.monotonic() + (time.process_time() - began_s) / TREE_WALK_SHARE


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
