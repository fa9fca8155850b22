"""How long a long run's curve takes to read: chosen columns, whole records, and json.loads of each line beside them.

    python benchmarks/curve.py [--steps 1000000]

Two attempts, the second of which redid a tenth of the steps; lines as the built-in loop writes them. Processor time,
because the disk is not what is measured; ratios are of one run.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from latentwire.run.curve import Columns, merged_metrics
from latentwire.run.directory import Attempt, Run

KEYS = ("time", "loss", "lr", "grad_norm", "samples_per_s")
_OTHERS = (
    "loss/llama", "loss/qwen", "tokens_per_s", "step_s", "save_s", "data_s", "forward_backward_s", "reduction_s",
    "optimizer_s", "deaf_s",
)  # fmt: skip


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "experiment_long")
        write_attempt(run, 1, range(1, steps * 6 // 10 + 1))
        write_attempt(run, 2, range(steps // 2 + 1, steps + 1))
        files = [metrics_of(attempt) for attempt in run.attempts()]
        num_bytes = sum(path.stat().st_size for path in files)
        columns = Columns(run, KEYS)
        before_mb = peak_mb()
        rows = {"columns": seconds_of(columns.grow)}
        rows["records"] = seconds_of(lambda: sum(1 for _ in merged_metrics(run)))
        more_mb = peak_mb() - before_mb
        rows["json.loads"] = seconds_of(lambda: [parse_all(path) for path in files])
        assert list(columns.training.steps) == list(range(1, steps + 1))
    print(f"{steps} steps, {num_bytes / 1e6:.0f} MB, {more_mb:.0f} MB of memory taken for both\n")
    print("| way | processor s | times as fast as json.loads |\n|---|---|---|")
    for way, seconds in rows.items():
        print(f"| {way} | {seconds:.2f} | {rows['json.loads'] / seconds:.1f} |")


def write_attempt(run: Run, number: int, steps: range) -> None:
    """Lines of about 400 bytes."""
    attempt = Attempt(run, number)
    attempt.path.mkdir(parents=True)
    figure = random.Random(number).random
    with open(metrics_of(attempt), "w") as file:
        for step in steps:
            record = {"time": 1767225600.125 + step, "step": step} | {key: figure() for key in (*KEYS[1:], *_OTHERS)}
            file.write(json.dumps(record) + "\n")


def parse_all(path: Path) -> None:
    """What a reader does at least who has only the standard library."""
    with open(path, "rb") as file:
        for line in file:
            json.loads(line)


def metrics_of(attempt: Attempt) -> Path:
    """The file that rank 0 writes."""
    return attempt.path / "metrics.jsonl"


def seconds_of(work: Callable[[], object]) -> float:
    """Processor time of one call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def peak_mb() -> float:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    main()
