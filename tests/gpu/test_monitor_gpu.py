"""The real monitor beside real matrix products on a real GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from latentwire.monitor import list_gpus, summarise

pytestmark = pytest.mark.gpu

INTERVAL_S = 0.25
BALLAST_BYTES = 4 << 30


@pytest.fixture
def torch() -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU here")
    return torch


@pytest.fixture
def monitor(torch: Any, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A monitor of all visible GPUs, started before this test touches one."""
    command = [sys.executable, "-m", "latentwire.monitor", "--output-dir", str(tmp_path)]
    process = subprocess.Popen([*command, "--interval", str(INTERVAL_S), "--until-stdin-closes"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def samples_in(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [record for record in map(json.loads, lines) if "host" in record]


def await_samples(path: Path, num: int) -> None:
    deadline_s = time.monotonic() + 60
    while len(samples_in(path)) < num:
        assert time.monotonic() < deadline_s, f"waited 60 s in vain for {num} samples"
        time.sleep(0.01)


def multiply(torch: Any, seconds: float) -> None:
    """Keep the GPU busy with bf16 matrix products."""
    left = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        for _ in range(20):
            torch.mm(left, right)
        torch.cuda.synchronize()


def test_the_readings_follow_the_work(torch: Any, monitor: subprocess.Popen[bytes], tmp_path: Path) -> None:
    stats = tmp_path / "gpu_stats.jsonl"
    await_samples(stats, 4)
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    idle = next(gpu for gpu in samples_in(stats)[-1]["gpus"] if gpu["uuid"] == uuid)
    num_idle = len(samples_in(stats))

    ballast = torch.zeros(BALLAST_BYTES, dtype=torch.uint8, device="cuda")
    multiply(torch, seconds=4)
    busy = [gpu for sample in samples_in(stats)[num_idle:] for gpu in sample["gpus"] if gpu["uuid"] == uuid]
    del ballast
    monitor.communicate()
    assert monitor.returncode == 0

    def highest(field: str) -> float:
        return max(float(gpu[field]) for gpu in busy if gpu[field] is not None)

    assert highest("utilisation_percent") > 90
    assert highest("memory_used_bytes") >= idle["memory_used_bytes"] + BALLAST_BYTES
    assert highest("power_w") > idle["power_w"] + 50
    assert 20 < highest("temperature_c") < 100
    assert highest("sm_clock_mhz") > 1000
    own = [p["memory_bytes"] for gpu in busy for p in gpu["processes"] or [] if p["pid"] == os.getpid()]
    assert own, "this process is listed with its memory"
    assert {p["name"] for gpu in busy for p in gpu["processes"] or [] if p["pid"] == os.getpid()} != {None}
    assert max(own) >= BALLAST_BYTES
    if torch.cuda.get_device_capability(0) >= (9, 0):
        assert highest("sm_active_percent") > 80
        assert highest("tensor_active_percent") > 30
        assert idle["sm_active_percent"] < 20
        assert highest("dram_bandwidth_percent") > 5
        assert highest("num_ecc_uncorrected") >= 0, "a data-centre chip counts"
    summary: Any = summarise([stats])
    assert summary["gpus"][uuid]["energy_wh"] > 0


def test_what_crosses_the_bus_is_counted(torch: Any, monitor: subprocess.Popen[bytes], tmp_path: Path) -> None:
    if torch.cuda.get_device_capability(0) < (9, 0):
        pytest.skip("chips before Hopper count it only in a call that waits 20 ms")
    stats = tmp_path / "gpu_stats.jsonl"
    await_samples(stats, 2)
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    num_before = len(samples_in(stats))
    host = torch.zeros(1 << 28, dtype=torch.uint8).pin_memory()
    device = torch.empty_like(host, device="cuda")
    num_bytes, began_s = 0, time.monotonic()
    while (elapsed_s := time.monotonic() - began_s) < 3:
        device.copy_(host)
        torch.cuda.synchronize()
        num_bytes += host.numel()
    await_samples(stats, len(samples_in(stats)) + 1)
    found = [gpu for sample in samples_in(stats)[num_before:] for gpu in sample["gpus"] if gpu["uuid"] == uuid]
    highest = max(gpu["pcie_rx_bytes_per_s"] for gpu in found if gpu["pcie_rx_bytes_per_s"] is not None)
    assert 0.5 < highest / (num_bytes / elapsed_s) < 2, "to the GPU is RX, in bytes"


def test_the_inventory_agrees_with_cuda(torch: Any) -> None:
    gpus = list_gpus()
    assert len(gpus) == torch.cuda.device_count()
    for number, gpu in enumerate(gpus):
        properties = torch.cuda.get_device_properties(number)
        assert (gpu.uuid, gpu.name) == (f"GPU-{properties.uuid}", properties.name)
        assert abs(gpu.memory_bytes - properties.total_memory) < 2 << 30, "NVML counts what the driver keeps, too"
