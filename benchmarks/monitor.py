"""What the monitor costs: processor time at its usual pace, each NVML call, and the steps of a loop beside it.

``python benchmarks/monitor.py [--seconds 10] [--pairs 20] [--window-s 1] [--device cuda|cpu] [--json FILE]``
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from latentwire.monitor.devices import OpenedNvml
from latentwire.monitor.faults import XidWatch
from latentwire.monitor.gpu import list_gpus
from latentwire.monitor.readings import GPM_FIELDS, READINGS, SLOW_EVERY, SLOW_READINGS, Gpm

INTERVAL_S = 1.0
TIMES_AS_OFTEN = 10
"""Beside steps: what it does to them at its usual pace is too little to be told from what else differs."""
NUM_CALLS = 50
STARTS_WITHIN_S = 60.0


def main() -> None:
    """Measure and print three tables; without a GPU only the host's row, unless a device is given."""
    parser = argparse.ArgumentParser(description="What the monitor costs.")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement of processor time")
    parser.add_argument("--pairs", type=int, default=20, help="of windows beside a running and a stopped monitor")
    parser.add_argument("--window-s", type=float, default=1.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="for the loop (default: a GPU, if there is one)")
    parser.add_argument("--json", type=Path, default=Path("build/monitor-benchmark.json"))
    options = parser.parse_args()
    gpus = list_gpus()
    results: dict[str, Any] = {"processor": processor(options.seconds, len(gpus))}
    if gpus:
        results["calls"] = calls()
    device = options.device or ("cuda" if gpus else None)
    if device is not None:
        results["steps"] = [steps(device, name, options.pairs, options.window_s) for name in ("large", "small")]
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1))


# --- processor time ---------------------------------------------------------------------------------------------------


def processor(seconds: float, num_gpus: int) -> list[dict[str, Any]]:
    """Of the real process at one sample a second, host only and with all GPUs."""
    print(f"| monitor, every {INTERVAL_S:g} s | processor time a sample (ms) | % of a core |\n|---|---|---|")
    host = percent_of_core(seconds, gpus=False)
    rows = [row("host only", host)]
    if num_gpus:
        rows.append(row("a GPU", (percent_of_core(seconds, gpus=True) - host) / num_gpus))
    print()
    return rows


def row(name: str, percent: float) -> dict[str, Any]:
    """Print and return one line."""
    print(f"| {name} | {percent / 100 * INTERVAL_S * 1000:.3f} | {percent:.4f} |", flush=True)
    return {"name": name, "percent_of_core": percent}


def percent_of_core(seconds: float, gpus: bool) -> float:
    """The kernel's own count for a monitor that has started, and has this process to watch."""
    with tempfile.TemporaryDirectory() as folder, monitor(Path(folder), gpus) as process:
        time.sleep(SLOW_EVERY * INTERVAL_S)  # what is done at first only is over
        before_s, began_s = cpu_s(process.pid), time.monotonic()
        time.sleep(seconds)
        return 100 * (cpu_s(process.pid) - before_s) / (time.monotonic() - began_s)


def cpu_s(pid: int) -> float:
    """Seconds that a process was on a core, to the nanosecond; ``stat`` counts ticks of 10 ms."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


@contextlib.contextmanager
def monitor(folder: Path, gpus: bool, interval_s: float = INTERVAL_S) -> Iterator[subprocess.Popen[bytes]]:
    """A real monitor that has written its first sample."""
    command = [sys.executable, "-m", "latentwire.monitor", "--output-dir", str(folder), "--interval", str(interval_s)]
    environ = os.environ if gpus else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([*command, "--until-stdin-closes"], env=environ, stdin=subprocess.PIPE)
    try:
        deadline_s = time.monotonic() + STARTS_WITHIN_S
        while b'"host"' not in read(folder / "gpu_stats.jsonl"):
            if time.monotonic() > deadline_s:
                raise SystemExit("the monitor does not start")
            time.sleep(0.05)
        yield process
    finally:
        process.communicate()


def read(path: Path) -> bytes:
    """What is in a file that may not be there yet."""
    return path.read_bytes() if path.exists() else b""


# --- NVML -------------------------------------------------------------------------------------------------------------


def calls() -> list[dict[str, Any]]:
    """How long each call takes on the first GPU."""
    print("| call for | median (us) | highest (us) | in samples of 5 |\n|---|---|---|---|")
    opened = OpenedNvml(None, None, os.environ)
    nvml, (gpu, handle) = opened.nvml, opened.devices[0]
    gpm, xids = Gpm(nvml, handle, gpu.is_mig), XidWatch(nvml, [handle])
    rows = [timed(", ".join(fields), SLOW_EVERY, lambda read=read: read(nvml, handle)) for fields, read in READINGS]
    rows += [timed(", ".join(fields), 1, lambda read=read: read(nvml, handle)) for fields, read in SLOW_READINGS]
    rows.append(timed(", ".join(GPM_FIELDS), SLOW_EVERY, lambda: gpm.read(nvml, handle)))
    rows.append(timed("XIDs of all GPUs", SLOW_EVERY, xids.take))
    gpm.close()
    xids.close()
    opened.close()
    print()
    return rows


def timed(name: str, num_of_5: int, call: Callable[[], object]) -> dict[str, Any]:
    """Time one call, apart from the others by as much as a driver caches at most."""
    took_us, error = [], ""
    for _ in range(NUM_CALLS):
        began_ns = time.perf_counter_ns()
        try:
            call()
        except Exception as exception:  # what a chip does not give costs time too
            error = f" ({exception})"
        took_us.append((time.perf_counter_ns() - began_ns) / 1000)
        time.sleep(0.02)
    median_us = statistics.median(took_us)
    print(f"| {name}{error} | {median_us:.1f} | {max(took_us):.1f} | {num_of_5} |", flush=True)
    return {"name": name, "median_us": median_us, "highest_us": max(took_us), "error": error}


# --- steps ------------------------------------------------------------------------------------------------------------


def steps(device: str, name: str, num_pairs: int, window_s: float) -> dict[str, Any]:
    """Step times of a loop in windows beside a running and a stopped monitor, in turn; the order of a pair changes.

    The running one takes samples ``TIMES_AS_OFTEN`` as often as usual; at its usual pace it costs so much less.
    """
    step = loop(device, name)
    for _ in range(20):
        step()
    differences, plain_ms = [], []
    with (
        tempfile.TemporaryDirectory() as folder,
        monitor(Path(folder), gpus=True, interval_s=INTERVAL_S / TIMES_AS_OFTEN) as process,
    ):
        for pair in range(num_pairs):
            found = {runs: window(step, process, runs, window_s) for runs in order(pair)}
            differences.append(100 * (found[True] / found[False] - 1))
            plain_ms.append(1000 * found[False])
    low, median, high = statistics.quantiles(differences, n=4)
    if name == "large":
        often = f"{TIMES_AS_OFTEN} samples a second: median (quartiles; extremes)"
        print(f"| steps of | plain step (ms) | beside the monitor, {often} | so at one |\n|---|---|---|---|")
    extremes = f"{min(differences):+.3f} to {max(differences):+.3f}"
    often, usual = f"{median:+.3f} % ({low:+.3f} to {high:+.3f}; {extremes})", f"{median / TIMES_AS_OFTEN:+.3f} %"
    print(f"| {name} kernels | {statistics.median(plain_ms):.3f} | {often}, {num_pairs} pairs | {usual} |", flush=True)
    return {"name": name, "plain_ms": plain_ms, "differences_percent": differences}


def order(pair: int) -> tuple[bool, bool]:
    """Stopped first, then running; the other way round in the next pair, against whatever drifts."""
    return (False, True) if pair % 2 == 0 else (True, False)


def window(step: Callable[[], None], process: subprocess.Popen[bytes], runs: bool, window_s: float) -> float:
    """Seconds a step while the monitor runs or stands still; it runs on afterwards."""
    if not runs:
        process.send_signal(signal.SIGSTOP)
    step()
    began_s, num_steps = time.perf_counter(), 0
    while time.perf_counter() - began_s < window_s:
        step()
        num_steps += 1
    seconds = (time.perf_counter() - began_s) / num_steps
    process.send_signal(signal.SIGCONT)
    return seconds


def loop(device: str, name: str) -> Callable[[], None]:
    """A step of a small MLP: large matrices keep the GPU busy, small ones the thread that launches their kernels."""
    import torch

    width, depth = (8192, 4) if name == "large" and device == "cuda" else (256, 24)
    layers = [torch.nn.Linear(width, width, device=device, dtype=torch.bfloat16) for _ in range(depth)]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    batch = torch.randn(width, width, device=device, dtype=torch.bfloat16)

    def step() -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


if __name__ == "__main__":
    main()
