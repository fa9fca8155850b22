"""How long ``latentwire status`` takes for a large fleet: 200 runs of 10 attempts, as a user sees it.

``python benchmarks/fleet.py [--runs N] [--attempts N] [--saves N]`` makes the runs in a temporary folder and prints a
line of seconds: of the first look, and the median of five more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STEPS_PER_SAVE = 20
STEP_S = 1.0


def main() -> None:
    """Make the fleet, look at it six times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--attempts", type=int, default=10)
    parser.add_argument("--saves", type=int, default=10, help="of each attempt")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.runs):
            make_run(Path(folder) / f"experiment_run-{number:03d}", options.attempts, options.saves)
        first, *more = [seconds_of_status(Path(folder)) for _ in range(6)]
        lines = f"{options.runs} runs of {options.attempts} attempts with {options.saves} saves each"
        print(f"{lines}: {first:.2f} s, then {statistics.median(more):.2f} s")


def seconds_of_status(runs_dir: Path) -> float:
    """From the start of the program to its end."""
    command = [sys.executable, "-m", "latentwire", "status", "--runs-dir", str(runs_dir)]
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def make_run(path: Path, num_attempts: int, num_saves: int) -> None:
    """A run that was preempted again and again; its journals as agent and rank 0 write them."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("")
    attempt_s = (num_saves * STEPS_PER_SAVE + 20) * STEP_S
    begin = time.time() - num_attempts * attempt_s
    own = []
    for number in range(1, num_attempts + 1):
        claimed = begin + (number - 1) * attempt_s
        own.append({"time": claimed - 2, "event": "submitted", "job_id": str(number), "scheduler": "slurm"})
        make_attempt(path / "attempts" / f"{number:04d}", number, claimed, num_saves)
    write_lines(path / "events.orchestrator.jsonl", own)


def make_attempt(path: Path, number: int, claimed: float, num_saves: int) -> None:
    """One attempt of it."""
    path.mkdir(parents=True)
    agent = {"host": "another-host", "pid": 1, "started": 1.0}
    record = {"number": number, "job_id": str(number), "scheduler": "slurm", "restart": 0}
    (path / "attempt.json").write_text(json.dumps({**record, "claimed": claimed, "agent": agent}))
    (path / "placement.json").write_text(json.dumps({"devices": [[f"cuda:{index}"] for index in range(8)]}))
    first = (number - 1) * num_saves * STEPS_PER_SAVE
    write_lines(path / "events.rank0.jsonl", rank_events(claimed, first, num_saves))
    write_lines(path / "metrics.jsonl", steps(claimed, first, num_saves * STEPS_PER_SAVE))
    last = first + num_saves * STEPS_PER_SAVE
    ended = claimed + (last - first) * STEP_S + 16
    said = [
        {"time": claimed + 1, "event": "attempt_started", "total_steps": 10_000_000},
        {"time": claimed + 2, "event": "placed"},
        {"time": ended - 2, "event": "notice", "signal": "SIGTERM"},
        {"time": ended, "event": "attempt_ended", "outcome": "preempted", "step": last},
    ]
    write_lines(path / "events.agent.jsonl", said)


def rank_events(claimed: float, first: int, num_saves: int) -> Iterator[dict[str, Any]]:
    """From the start to the last save."""
    yield {"time": claimed + 5, "event": "workload_built", "seconds": 3.0}
    yield {"time": claimed + 7, "event": "restored", "step": first, "seconds": 2.0}
    yield {"time": claimed + 10, "event": "training_started", "step": first, "total_steps": 10_000_000}
    for number in range(1, num_saves + 1):
        at, step = claimed + 10 + number * STEPS_PER_SAVE * STEP_S, first + number * STEPS_PER_SAVE
        yield {"time": at, "event": "save_started", "step": step}
        yield {"time": at, "event": "save_staged", "step": step, "reason": "interval", "seconds": 0.02}
        yield {"time": at + 1, "event": "save_committed", "step": step, "path": f"step-{step:08d}", "seconds": 0.4}
        yield {"time": at + 2, "event": "save_verified", "step": step, "seconds": 0.5}


def steps(claimed: float, first: int, num_steps: int) -> Iterator[dict[str, Any]]:
    """Lines of metrics.jsonl."""
    for step in range(1, num_steps + 1):
        more = {"loss": 4.0 / step, "lr": 1e-4, "grad_norm": 1.25, "samples_per_s": 128.0, "step_s": STEP_S}
        yield {"time": claimed + 10 + step * STEP_S, "step": first + step, **more}


def write_lines(path: Path, records: Any) -> None:
    """As JSONL."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
