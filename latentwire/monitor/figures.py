"""Figures out of records that others wrote: a reading may be missing, null, a word, or nonsense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentwire.run.figures import number

Record = Mapping[str, Any]


def figure_of(record: Record, name: str) -> float | None:
    """The number under ``name``."""
    return number(record.get(name))


def gpus_of(sample: Record) -> list[Record]:
    """The readings of each GPU in a line of gpu_stats.jsonl."""
    gpus = sample.get("gpus")
    return [gpu for gpu in gpus if isinstance(gpu, dict)] if isinstance(gpus, list) else []


def host_of(sample: Record) -> Record:
    """The readings of the host in a line of gpu_stats.jsonl; empty where there are none."""
    host = sample.get("host")
    return host if isinstance(host, dict) else {}


def percent(part: float | None, whole: float | None) -> float | None:
    """``part`` of ``whole``; None where one is not known."""
    return 100 * part / whole if part is not None and whole else None
