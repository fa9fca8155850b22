"""The GPUs through ``nvidia-smi``: a program of that name on PATH, and the monitor's own process beside it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml
import pytest

from latentwire.errors import ConfigError
from latentwire.monitor.gpu import open_gpus
from latentwire.monitor.readings import FIELDS
from latentwire.monitor.smi import SmiMonitor

PATIENCE_S = 60
MIB = 1 << 20

PROGRAM = f"""#!{sys.executable}
import os, pathlib, sys, time
here = pathlib.Path(__file__).parent
if "--help-query-gpu" in sys.argv:
    for name in {{"utilization.gpu", "utilization.memory", "memory.used", "memory.total", "temperature.gpu",
                 "power.draw", "enforced.power.limit", "clocks_throttle_reasons.active",
                 "ecc.errors.corrected.volatile.total"}}:
        print(f'"{{name}}"\\nWhat it is.')
    sys.exit()
options = dict(a.split("=", 1) for a in sys.argv[1:])
if options["--query-gpu"].startswith("index"):
    if (here / "broken").exists():
        sys.exit("Failed to initialize NVML: Driver/library version mismatch")
    print("0, GPU-aaaa, 81559, NVIDIA H100, 80GB\\n1, GPU-bbbb, 81559, NVIDIA H100, 80GB")
    sys.exit()
(here / "pid").write_text(str(os.getpid()))
row = {{"uuid": "", "utilization.gpu": "97", "utilization.memory": "40", "memory.used": "1024",
       "memory.total": "81559", "temperature.gpu": "61", "power.draw": "612.50", "enforced.power.limit": "700.00",
       "clocks_throttle_reasons.active": "0x0000000000000004", "ecc.errors.corrected.volatile.total": "[N/A]"}}
while True:
    for uuid in options["--id"].split(","):
        values = row | {{"uuid": uuid}}
        print(", ".join(values[name] for name in options["--query-gpu"].split(",")), flush=True)
    if (here / "complaint").exists():
        print((here / "complaint").read_text(), flush=True)
    time.sleep(int(options["--loop-ms"]) / 1000)
"""


WITHOUT_LIBRARY = """
import sys, pynvml
from latentwire.monitor.__main__ import main

def missing():
    raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

pynvml.nvmlInit = missing
sys.exit(main())
"""


class NoLibrary:
    """NVML whose library is not there; errors and constants are the real ones."""

    def __getattr__(self, name: str) -> Any:
        return getattr(pynvml, name)

    def nvmlInit(self) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A fake ``nvidia-smi`` of two GPUs, which no version knows all the fields of."""
    path = tmp_path / "bin" / "nvidia-smi"
    path.parent.mkdir()
    path.write_text(PROGRAM)
    path.chmod(0o755)
    return path


def await_that(is_true: Callable[[], bool], what: str) -> None:
    """Wait for something that another process does."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_true():
        assert time.monotonic() < deadline_s, f"waited {PATIENCE_S} s in vain: {what}"
        time.sleep(0.005)


def await_sample(monitor: SmiMonitor) -> list[dict[str, Any]]:
    """The first sample of all its GPUs."""
    await_that(lambda: len(monitor.sample()) == len(monitor.gpus), "a row of each GPU")
    return monitor.sample()


def test_it_stands_in_where_the_library_is_missing(program: Path) -> None:
    environ = {"PATH": str(program.parent), "CUDA_VISIBLE_DEVICES": "1"}
    with open_gpus(None, 0.2, nvml=NoLibrary(), environ=environ) as monitor:
        assert isinstance(monitor, SmiMonitor)
        assert monitor.source == "nvidia-smi"
        assert [(gpu.index, gpu.memory_bytes) for gpu in monitor.gpus] == [(1, 81559 * MIB)]
        (record,) = await_sample(monitor)
        assert record == dict.fromkeys(FIELDS) | {
            "index": 1,
            "uuid": "GPU-bbbb",
            "name": "NVIDIA H100, 80GB",
            "utilisation_percent": 97,
            "memory_busy_percent": 40,
            "memory_used_bytes": 1024 * MIB,
            "memory_total_bytes": 81559 * MIB,
            "temperature_c": 61,
            "power_w": 612.5,
            "power_limit_w": 700.0,
            "throttle_reasons": ["sw_power_cap"],
        }


def test_without_the_program_there_is_the_host_only(tmp_path: Path) -> None:
    with open_gpus(None, 1.0, nvml=NoLibrary(), environ={"PATH": str(tmp_path)}) as monitor:
        assert monitor.source == "host only: NVML Shared Library Not Found"
        assert monitor.sample() == []


def test_a_program_that_fails_is_the_reason(program: Path) -> None:
    (program.parent / "broken").touch()
    with SmiMonitor(str(program), None, 1.0, environ={}) as monitor:
        reason = "Failed to initialize NVML: Driver/library version mismatch"
        assert monitor.source == f"host only: nvidia-smi: {reason}"
        assert monitor.sample() == []
    with pytest.raises(ConfigError, match=r"there is no GPU '0'; .*version mismatch"):
        SmiMonitor(str(program), ["0"], 1.0, environ={})


def test_a_complaint_is_one_event_and_silence_ends_the_readings(program: Path) -> None:
    now_s = 0.0
    with SmiMonitor(str(program), None, 0.2, environ={}, clock=lambda: now_s) as monitor:
        await_sample(monitor)
        (program.parent / "complaint").write_text("Unable to determine the device handle for GPU 0: GPU is lost.")
        found: list[dict[str, Any]] = []
        await_that(lambda: bool(found.extend(monitor.sample()) or [r for r in found if "event" in r]), "the event")
        for _ in range(3):
            time.sleep(0.2)  # further lines of the same
            found += monitor.sample()
        reason = "Unable to determine the device handle for GPU 0: GPU is lost."
        assert [r for r in found if "event" in r] == [{"event": "gpu_error", "reason": reason}]

        pid = int((program.parent / "pid").read_text())
        os.kill(pid, signal.SIGKILL)
        await_that(lambda: monitor._stream is not None and monitor._stream.poll() is not None, "its end")
        monitor.sample()
        now_s = 30.0
        silent = [r for _ in range(5) for r in monitor.sample()]
        assert [(r["event"], r["uuid"]) for r in silent] == [("gpu_error", "GPU-aaaa"), ("gpu_error", "GPU-bbbb")]
        now_s = 100.0
        restarted = monitor.sample()
        assert [r["reason"] for r in restarted] == ["nvidia-smi ended with status -9; it is started again"]
        assert len(await_sample(monitor)) == 2


def test_the_monitors_process_uses_it_and_leaves_none_behind(program: Path, tmp_path: Path) -> None:
    environ = {**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    environ.pop("CUDA_VISIBLE_DEVICES", None)
    command = [sys.executable, "-c", WITHOUT_LIBRARY, "--output-dir", str(tmp_path), "--interval", "0.2"]
    monitor = subprocess.Popen([*command, "--until-stdin-closes"], env=environ, stdin=subprocess.PIPE)
    stats = tmp_path / "gpu_stats.jsonl"

    def records() -> list[dict[str, Any]]:
        return [json.loads(line) for line in stats.read_bytes().split(b"\n")[:-1]] if stats.exists() else []

    try:
        await_that(lambda: any(len(r.get("gpus", [])) == 2 for r in records()[1:]), "a sample of two GPUs")
    finally:
        monitor.communicate()
    assert records()[0]["source"] == "nvidia-smi"
    pid = int((program.parent / "pid").read_text())
    await_that(lambda: not Path(f"/proc/{pid}").exists(), "nvidia-smi ends with the monitor")
