"""LatentWire: training that is never lost and never different on machines that may be taken away.

Public names are loaded when they are first used: importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "CheckpointManager": "latentwire.checkpoint.manager",
    "Config": "latentwire.config",
    "GPUMonitor": "latentwire.monitor.gpu",
    "JsonlShards": "latentwire.workloads.jsonl",
    "Preempted": "latentwire.preemption.handler",
    "PreemptionHandler": "latentwire.preemption.handler",
    "Session": "latentwire.train.session",
    "ShardedSource": "latentwire.workloads.base",
    "Workload": "latentwire.workloads.base",
    "load_config": "latentwire.config",
}

__all__ = [
    "CheckpointManager",
    "Config",
    "GPUMonitor",
    "JsonlShards",
    "Preempted",
    "PreemptionHandler",
    "Session",
    "ShardedSource",
    "Workload",
    "__version__",
    "load_config",
]

if TYPE_CHECKING:
    from latentwire.checkpoint.manager import CheckpointManager
    from latentwire.config import Config, load_config
    from latentwire.monitor.gpu import GPUMonitor
    from latentwire.preemption.handler import Preempted, PreemptionHandler
    from latentwire.train.session import Session
    from latentwire.workloads.base import ShardedSource, Workload
    from latentwire.workloads.jsonl import JsonlShards


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"latentwire has no {name!r}; it has: {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
