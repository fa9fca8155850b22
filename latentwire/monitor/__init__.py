"""What the GPUs and the host do while a job runs.

``python -m latentwire.monitor`` runs beside a job, in a process of its own, and appends one line a second to
``gpu_stats.jsonl``; :func:`summarise` folds such files into a run's ``gpu_stats.json``; :func:`list_gpus` is the
inventory. NVML is loaded when a GPU is first asked for, psutil when the host is; nothing here imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentwire.monitor.gpu import GPU, GPUMonitor, list_gpus
    from latentwire.monitor.host import HostMonitor
    from latentwire.monitor.rollup import summarise
    from latentwire.monitor.sampler import Sampler
    from latentwire.monitor.stats import StatsFollower, read_stats, stats_files

__all__ = [
    "GPU",
    "GPUMonitor",
    "HostMonitor",
    "Sampler",
    "StatsFollower",
    "list_gpus",
    "read_stats",
    "stats_files",
    "summarise",
]

_HOMES = {
    "GPU": "gpu",
    "GPUMonitor": "gpu",
    "HostMonitor": "host",
    "Sampler": "sampler",
    "StatsFollower": "stats",
    "list_gpus": "gpu",
    "read_stats": "stats",
    "stats_files": "stats",
    "summarise": "rollup",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
