"""What the orchestrator costs: ``python benchmarks/orchestrator.py [--runs 200] [--running 4] [--seconds 60]``.

Makes a fleet of runs of which a few train (a step each half second) and the others wait, starts its orchestrator as a
program, and reads memory and processor time from the kernel. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

_WORK = """
import time


def train(session):
    for _ in session.steps(100_000):
        time.sleep(0.5)
        session.log(loss=1.0)
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What the orchestrator costs with many runs on disk.")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--running", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to measure")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), options.runs, options.running, options.seconds)))


def measure(folder: Path, num_runs: int, num_running: int, seconds: float) -> dict[str, float]:
    """Cost of the orchestrator of such a fleet, once all that may run do. Blocks."""
    (folder / "work.py").write_text(_WORK, encoding="utf-8")
    fleet = {
        "workload": {"target": f"{folder / 'work.py'}:train"},
        "train": {"steps": 100_000},
        "scheduler": {"kind": "local"},
        "max_running": num_running,
        "runs": [{"name": f"run-{index:03d}"} for index in range(num_runs)],
    }
    (folder / "fleet.yaml").write_text(yaml.safe_dump(fleet), encoding="utf-8")
    command = [sys.executable, "-m", "latentwire.orchestrate", "--config", "fleet.yaml"]
    with open(folder / "output.txt", "wb") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
    try:
        _wait_until_training(folder, num_running, process)
        return _cost(psutil.Process(process.pid), seconds) | {"runs": num_runs, "running": num_running}
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
        for path in folder.glob("runs/experiment_*/attempts/*/attempt.json"):
            os.kill(int(json.loads(path.read_text())["agent"]["pid"]), signal.SIGKILL)


def _wait_until_training(folder: Path, number: int, process: subprocess.Popen[bytes]) -> None:
    while len(list(folder.glob("runs/experiment_*/attempts/*/metrics.jsonl"))) < number:
        if process.poll() is not None:
            raise SystemExit((folder / "output.txt").read_text())
        time.sleep(0.5)


def _cost(orchestrator: psutil.Process, seconds: float) -> dict[str, float]:
    before = orchestrator.cpu_times()
    started = time.monotonic()
    time.sleep(seconds)
    after, elapsed = orchestrator.cpu_times(), time.monotonic() - started
    used = sum(after[:4]) - sum(before[:4])  # user, system, and those of its children
    return {
        "percent_of_a_core": round(100 * used / elapsed, 3),
        "resident_mb": round(orchestrator.memory_info().rss / 1e6, 1),
        "seconds": round(elapsed, 1),
    }


if __name__ == "__main__":
    main()
