"""Traces of runs, made on purpose: ``metrics.jsonl`` and ``gpu_stats.jsonl`` as rank 0 and the monitor write them.

A trace is a healthy run on one busy GPU, a sample and a step a second, in which a test changes what it is about.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

START = 1_000_000.0
BUSY_GPU: dict[str, Any] = {
    "index": 0,
    "uuid": "GPU-a",
    "name": "NVIDIA H200",
    "utilisation_percent": 97,
    "memory_busy_percent": 40,
    "memory_used_bytes": 100 << 30,
    "memory_total_bytes": 140 << 30,
    "temperature_c": 62,
    "power_w": 610.0,
    "power_limit_w": 700.0,
    "sm_clock_mhz": 1980,
    "throttle_reasons": [],
    "sm_active_percent": 88.0,
    "tensor_active_percent": 52.0,
}
HOST: dict[str, Any] = {"cpu_percent": 30.0, "disk_free_bytes": 500 << 30, "disk_total_bytes": 1000 << 30}


def steps(number: int = 60, save_every: int = 0, **timings: Any) -> list[dict[str, Any]]:
    """Steps of a second, of which ``timings`` are parts; a save stands before the step that has its ``save_s``."""
    save_s = timings.pop("save_s", 0.0)
    usual = {"data_s": 0.01, "forward_backward_s": 0.9, "reduction_s": 0.01, "optimizer_s": 0.05}
    records, now = [], START
    for step in range(1, number + 1):
        saved_s = save_s if save_every and step % save_every == 0 else 0.0
        now += 1.0 + saved_s
        records.append({"time": now, "step": step, "loss": 2.0, "step_s": 1.0, "save_s": saved_s, **usual, **timings})
    return records


def samples(number: int = 60, host: dict[str, Any] | None = None, **readings: Any) -> list[dict[str, Any]]:
    """A sample a second; ``readings`` are the GPU's."""
    gpu, machine = BUSY_GPU | readings, HOST | (host or {})
    return [{"time": START + second, "host": machine, "gpus": [gpu]} for second in range(number)]


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """As JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
