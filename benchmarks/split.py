"""One replica of the pair over several GPUs: each model alone, both at once, and both on one GPU.

``python benchmarks/split.py [--shape tiny|full] [--micro-batch 16]``
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import torch
from pair_parts import batch_of, build, gradient_digest, on_devices, seconds_of

from latentwire.train.precision import make_repeatable
from latentwire.workloads.pair import PairWorkload
from latentwire.workloads.pair.batch import PairBatch

Devices: TypeAlias = dict[str, tuple[torch.device, ...]]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="The models of one replica over several GPUs.")
    parser.add_argument("--shape", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--target-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    make_repeatable(torch.get_num_threads(), deterministic=True)
    print(
        "| layout | llama alone (ms) | qwen alone (ms) | both (ms) | samples/s | gradient |\n|---|---|---|---|---|---|"
    )
    for name, devices in layouts(torch.cuda.device_count() if on_gpu else 1, "cuda" if on_gpu else "cpu"):
        with tempfile.TemporaryDirectory() as folder:
            first = next(iter(devices.values()))[0]
            workload = build(Path(folder), options.shape, first, devices=devices, compile=on_gpu)
        batch = on_devices(workload, batch_of(workload, options.micro_batch, options.target_tokens))
        parts = [seconds_of(warmed(of_one(workload, batch, model)), options.rounds) for model in workload._frozen]
        both = seconds_of(warmed(of_both(workload, batch)), options.rounds)
        workload.trainable.zero_grad()
        of_both(workload, batch)()
        print(
            f"| {name} | {parts[0] * 1e3:.1f} | {parts[1] * 1e3:.1f} | {both * 1e3:.1f} "
            f"| {options.micro_batch / both:.1f} | {gradient_digest(workload.trainable)} |",
            flush=True,
        )
        del workload, batch
        if on_gpu:
            torch.cuda.empty_cache()


def layouts(num_devices: int, kind: str) -> Iterator[tuple[str, Devices]]:
    """Those that so many devices allow."""
    at = [torch.device(kind, index) if kind == "cuda" else torch.device(kind) for index in range(max(num_devices, 1))]
    yield "both on one", {"llama": (at[0],), "qwen": (at[0],)}
    if num_devices >= 2:
        yield "Llama | Qwen", {"llama": (at[0],), "qwen": (at[1],)}
        yield "Llama over two, Qwen beside", {"llama": (at[0], at[1]), "qwen": (at[1],)}
    if num_devices >= 3:
        yield "Llama over two | Qwen", {"llama": (at[0], at[1]), "qwen": (at[2],)}
    if num_devices >= 4:
        yield "Llama over two | Qwen over two", {"llama": (at[0], at[1]), "qwen": (at[2], at[3])}


def of_one(workload: PairWorkload, batch: PairBatch, name: str) -> Callable[[], None]:
    """A step of one model with the wire before it."""

    def step() -> None:
        latents = workload._encode(batch.source)
        workload._frozen[name].loss(workload._prefix(name, latents), batch.targets[name]).backward()

    return step


def of_both(workload: PairWorkload, batch: PairBatch) -> Callable[[], None]:
    """A step as the training loop makes it."""
    return lambda: workload.step(batch, lambda loss: loss.backward()) and None


def warmed(step: Callable[[], None]) -> Callable[[], None]:
    """Compiled and with memory at hand."""
    for _ in range(2):
        step()
    return step


if __name__ == "__main__":
    main()
