"""A machine that a monitor watches for a month within a second, and what readers find of it."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from latentwire.monitor import Sampler, read_stats
from latentwire.monitor.thin import StatsWriter

GIB = 1 << 30
KIB = 1 << 10
MONTH_S = 30 * 86400.0


class FakeMachine:
    """Host and one GPU whose readings are known at each time; its clock moves when the sampler waits."""

    def __init__(self, end_s: float, source: str = "nvml") -> None:
        self.now_s = 1_700_000_400.0
        self.start_s = self.now_s
        self.end_s = self.start_s + end_s
        self.source = source
        self.gpus: list[Any] = []

    def clock(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> bool:
        self.now_s += seconds
        return self.now_s > self.end_s

    @property
    def hour(self) -> int:
        return int((self.now_s - self.start_s) // 3600)

    def host(self) -> dict[str, object]:
        return {"cpu_percent": 50.0, "memory_available_bytes": 9 * GIB, "disk_free_bytes": 10**9 - self.hour}

    def readings(self) -> list[dict[str, object]]:
        # Busy every other hour, hot once on the first day, throttled in the tenth part of the time.
        busy = 100 if self.hour % 2 else 50
        hot = 95 if 36_000 <= self.now_s - self.start_s < 36_120 else 60
        reasons = ["sw_power_cap"] if int(self.now_s - self.start_s) % 1200 == 0 else []
        readings = {"utilisation_percent": busy, "power_w": 7.0 * busy, "temperature_c": hot, "memory_used_bytes": GIB}
        return [{"index": 0, "uuid": "GPU-x", "name": "H200", **readings, "throttle_reasons": reasons, "sm": None}]


def drive(machine: FakeMachine, writer: StatsWriter, interval_s: float) -> None:
    host: Any = SimpleNamespace(sample=machine.host)
    gpus: Any = SimpleNamespace(sample=machine.readings, source=machine.source, gpus=[])
    Sampler(writer, host, gpus, interval_s, wait=machine.wait, clock=machine.clock).run()


def samples(folder: Path, since: float = -math.inf) -> list[dict[str, Any]]:
    return [record for record in read_stats(folder, since) if "event" not in record]
