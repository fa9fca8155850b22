"""The monitor's files: how they stay small for a month, and how they are read."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latentwire.monitor import Sampler, read_stats, summarise
from latentwire.monitor import thin as thin_module
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


def test_a_month_stays_below_the_stated_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin_module, "THIN_S", 600.0)
    full_bytes, thin_bytes, interval_s = 64 * KIB, 128 * KIB, 120.0
    machine, path = FakeMachine(MONTH_S), tmp_path / "gpu_stats.jsonl"
    writer = StatsWriter(path, interval_s, clock=machine.clock, full_bytes=full_bytes, thin_bytes=thin_bytes)
    largest_bytes = 0
    wait = machine.wait

    def wait_and_look(seconds: float) -> bool:
        nonlocal largest_bytes
        if machine.now_s % 600 == 0:
            largest_bytes = max(largest_bytes, sum(part.stat().st_size for part in tmp_path.iterdir()))
        return wait(seconds)

    machine.wait = wait_and_look  # type: ignore[method-assign]
    drive(machine, writer, interval_s)
    writer.close()

    minute_bytes = 2 * 1024
    assert 2 * full_bytes < largest_bytes < 2 * full_bytes + thin_bytes + 3 * minute_bytes
    assert sorted(part.name for part in tmp_path.iterdir()) == [
        "gpu_stats.jsonl", "gpu_stats.old.jsonl", "gpu_stats.thin.jsonl"
    ]  # fmt: skip
    records = list(read_stats(tmp_path))
    assert [record["event"] for record in records if "event" in record] == ["monitor_started", "monitor_stopped"]
    found = [record for record in records if "event" not in record]
    times = [record["time"] for record in found]
    assert times == sorted(times)
    assert sum(record["seconds"] for record in found) == pytest.approx(MONTH_S, abs=1)
    assert sum(record["num_samples"] for record in found) == MONTH_S / interval_s
    assert {record["num_samples"] for record in found[-100:]} == {1}, "the newest hours have every sample"
    assert max(record["gpus"][0]["temperature_c"] for record in found) == 95, "a short peak is not lost"

    summary: Any = summarise([path])
    gpu, host = summary["gpus"]["GPU-x"], summary["hosts"][found[0]["hostname"]]
    assert gpu["num_samples"] == MONTH_S / interval_s
    assert gpu["mean_utilisation_percent"] == pytest.approx(75, abs=0.1)
    assert gpu["energy_wh"] == pytest.approx(7 * 75 * MONTH_S / 3600, rel=1e-3)
    assert gpu["throttled_s"]["sw_power_cap"] == pytest.approx(MONTH_S / 10, rel=1e-3)
    assert (gpu["max_temperature_c"], host["min_disk_free_bytes"]) == (95, 10**9 - 720)
    assert summary["num_skipped_lines"] == 0
