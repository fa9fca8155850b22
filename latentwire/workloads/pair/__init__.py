"""The pair: one wire of latents that two frozen language models both read.

A byte-level encoder turns a source text into ``latent_len`` vectors; an adapter per model maps them into that model's
embedding space; each frozen model then predicts the target text after this soft prefix. Only the wire is trained.

Importing this module imports no torch: ``Options``, ``export_config`` and ``footprint`` are eager, ``PairWorkload`` is
loaded when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from latentwire.workloads.pair.exporting import export_config
from latentwire.workloads.pair.footprint import footprint
from latentwire.workloads.pair.options import Options

if TYPE_CHECKING:
    from latentwire.workloads.pair.workload import PairWorkload

__all__ = ["Options", "PairWorkload", "export_config", "footprint"]


def __getattr__(name: str) -> Any:
    """Load ``PairWorkload``, and torch with it, on first use."""
    if name != "PairWorkload":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from latentwire.workloads.pair.workload import PairWorkload

    return PairWorkload
