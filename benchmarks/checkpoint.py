"""How fast a state is saved and loaded, by the ways that there are, against what the machine can do.

``python benchmarks/checkpoint.py --size-gb 2 [--device cuda] [--folder F] [--rounds 3] [--json FILE]`` saves and loads
by each way in turn, round after round, and prints medians as two tables. With ``--training-speed`` it measures what
background saves cost a training loop instead. The state changes before every save; each way's files are deleted right
after it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from checkpoint_training import training_speed
from checkpoint_ways import Limits, Timing, Way, change, llama_like, num_bytes_of, probe, warm, ways
from torch import nn

from latentwire.elastic.inventory import cpu_model
from latentwire.run.atomic import write_json


@dataclasses.dataclass
class Record:
    """What one way did.

    Attributes:
        first: its first save, where that allocates what the others use again.
        saves: the others, a round each.
        loads: seconds, a round each; empty where it is not compared.
        error: why it was measured no further.
    """

    first: Timing | None = None
    saves: list[Timing] = dataclasses.field(default_factory=list)
    loads: list[float] = dataclasses.field(default_factory=list)
    error: str | None = None


def main() -> int:
    """Measure, print, and write the JSON; 1 if a way failed."""
    parser = argparse.ArgumentParser(description="What saving and loading a state costs, by each way.")
    parser.add_argument("--size-gb", type=float, default=2.0, help="of the state, in 1e9 bytes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/checkpoint-benchmark"), help="on the disk to measure"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("build/checkpoint-benchmark.json"))
    parser.add_argument("--training-speed", action="store_true", help="measure a training loop, with and without saves")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each window of the training loop")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    model = llama_like(int(options.size_gb * 1e9), options.device)
    result: dict[str, Any] = {"machine": machine(), "bytes": num_bytes_of(model), "device": options.device}
    print(f"{result['bytes'] / 1e9:.2f} GB of bf16 on {options.device}; {json.dumps(result['machine'])}", flush=True)
    try:
        if options.training_speed:
            result["training"] = training_speed(model, options.folder, options.rounds, options.seconds)
            write_json(options.json, result)
            print(training_table(result["training"]))
            return 0
        records, limits = measure(model, options, result)
    finally:
        shutil.rmtree(options.folder)
    print(tables(records, limits, result["bytes"]))
    return 1 if any(record.error for record in records.values()) else 0


def measure(
    model: nn.Module, options: argparse.Namespace, result: dict[str, Any]
) -> tuple[dict[str, Record], dict[str, list[float]]]:
    """All rounds; what is known so far is written after each measurement. Blocks for minutes."""
    compared = ways(model, options.device, options.folder / "latentwire")
    limits = Limits(model)
    measures = limits.measures()
    records = {way.name: Record() for way in compared}
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(options.rounds):
        for name, limit in measures.items():
            seconds[name].append(timed_limit(limit, options.folder / "limit"))
        for way in compared:
            record, folder = records[way.name], options.folder / way.name.split()[0]
            try:
                if way.keeps_buffers and number == 0:
                    record.first = saved(way, model, folder)
                measure_way(way, model, folder, record)
            except Exception as error:  # one way that fails must not cost what the others took; the table says it
                record.error = f"{type(error).__name__}: {error}"
                print(f"{way.name}: {record.error}", file=sys.stderr, flush=True)
                shutil.rmtree(folder, ignore_errors=True)
            result |= {"ways": {n: dataclasses.asdict(r) for n, r in records.items()}, "limits": seconds}
            write_json(options.json, result)
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    return records, seconds


def measure_way(way: Way, model: nn.Module, folder: Path, record: Record) -> None:
    """One save, and from a warm page cache one load where this way has one."""
    record.saves.append(saved(way, model, folder, keep=True))
    warm(folder)
    expected = probe(model)
    change(model)
    synchronize(model)
    started = time.perf_counter()
    if way.load(model, folder):
        synchronize(model)
        record.loads.append(time.perf_counter() - started)
        assert probe(model) == expected, f"{way.name} loaded something else"
    shutil.rmtree(folder)


def saved(way: Way, model: nn.Module, folder: Path, keep: bool = False) -> Timing:
    """One save of a changed state into an empty folder, on a disk that has nothing else to write."""
    prepare(folder)
    change(model)
    synchronize(model)
    timing = way.save(model, folder)
    if not keep:
        shutil.rmtree(folder)
    return timing


def timed_limit(limit: Callable[[Path], None], folder: Path) -> float:
    """Seconds of one limit."""
    prepare(folder)
    started = time.perf_counter()
    limit(folder)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return seconds


def prepare(folder: Path) -> None:
    """An empty folder, and nothing left to write of what was before."""
    folder.mkdir(exist_ok=True)
    os.sync()


def synchronize(model: nn.Module) -> None:
    """Wait until the model's device is idle."""
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()


def machine() -> dict[str, Any]:
    """Where this ran."""
    return {
        "cpu": cpu_model(Path("/proc/cpuinfo").read_text().splitlines()),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


# ---- Tables ----------------------------------------------------------------------------------------------------------


def tables(records: dict[str, Record], limits: dict[str, list[float]], num_bytes: int) -> str:
    """Medians as Markdown; ratios are to the first limit."""
    limit_s = median(next(iter(limits.values())))
    lines = [
        "\n| way | stall (s) | durable (s) | least to most | GB/s | x raw write | verified (s) | first save (s) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, record in records.items():
        lines.append(f"| {name} | {_save_cells(record, num_bytes, limit_s)} |")
    for name, seconds in limits.items():
        spread = f"{min(seconds):.2f} - {max(seconds):.2f}"
        rate = num_bytes / 1e9 / median(seconds)
        lines.append(
            f"| *limit:* {name} | - | {median(seconds):.2f} | {spread} | {rate:.2f} | {median(seconds) / limit_s:.2f} "
            "| - | - |"
        )
    lines += ["\n| way | load, warm (s) | GB/s |", "|---|---|---|"]
    for name, record in records.items():
        if record.loads:
            seconds_s = median(record.loads)
            lines.append(f"| {name} | {seconds_s:.2f} | {num_bytes / 1e9 / seconds_s:.2f} |")
    return "\n".join(lines)


def _save_cells(record: Record, num_bytes: int, limit_s: float) -> str:
    if record.error is not None or not record.saves:
        return f"failed: {record.error}" + " |" * 6
    durable = [save.durable_s for save in record.saves]
    verified = [save.verified_s for save in record.saves if save.verified_s is not None]
    cells = [
        f"{median(save.stall_s for save in record.saves):.2f}",
        f"{median(durable):.2f}",
        f"{min(durable):.2f} - {max(durable):.2f}",
        f"{num_bytes / 1e9 / median(durable):.2f}",
        f"{median(durable) / limit_s:.2f}",
        f"{median(verified):.2f}" if verified else "-",
        f"{record.first.stall_s:.2f}, {record.first.durable_s:.2f}" if record.first else "-",
    ]
    return " | ".join(cells)


def training_table(training: dict[str, Any]) -> str:
    """The training loop's speed as Markdown."""
    return (
        "\n| training loop | steps/s | drop |\n|---|---|---|\n"
        f"| without saves | {training['without_saves']:.2f} | - |\n"
        f"| while a save runs in the background | {training['while_saving']:.2f} "
        f"| {training['drop_while_saving_percent']:.1f} % |\n"
        f"| the same, the stalls of {training['saves']} back-to-back saves counted in | {training['with_stalls']:.2f} "
        f"| {training['drop_with_stalls_percent']:.1f} % |"
    )


if __name__ == "__main__":
    sys.exit(main())
