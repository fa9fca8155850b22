"""One replica over several GPUs: each model alone, and both, with one and with two micro-batches at once.

``python benchmarks/split.py [--shape tiny|full] [--micro-batch 32]``
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import torch
from pair_parts import batch_of, build, gradient_digest, on_devices, seconds_of

from latentwire.train.node import LAUNCH_QUEUES
from latentwire.train.precision import make_repeatable
from latentwire.train.ranks import Ranks
from latentwire.train.reduction import Reduction
from latentwire.train.side_streams import SideStreams
from latentwire.workloads.pair import PairWorkload
from latentwire.workloads.pair.batch import PairBatch

Devices: TypeAlias = dict[str, tuple[torch.device, ...]]
IN_A_ROW = 4
"""Micro-batches of a rank in a step."""


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="The models of one replica over several GPUs.")
    parser.add_argument("--shape", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--target-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    os.environ.update(LAUNCH_QUEUES | os.environ)  # as ranks have it that compute two at once
    on_gpu = torch.cuda.is_available()
    make_repeatable(torch.get_num_threads(), deterministic=True)
    print(f"| models | one at a time (ms) | two at once, each (ms) | samples/s | gradient |\n|{'---|' * 5}")
    for name, devices in layouts(torch.cuda.device_count() if on_gpu else 1, "cuda" if on_gpu else "cpu"):
        measure(options, name, devices)
        if on_gpu:
            torch.cuda.empty_cache()


def layouts(num_devices: int, kind: str) -> Iterator[tuple[str, Devices]]:
    """Those that so many devices allow; a model that is not named takes no part."""
    at = [torch.device(kind, index) if kind == "cuda" else torch.device(kind) for index in range(max(num_devices, 1))]
    yield "Llama on one", {"llama": (at[0],)}
    yield "Qwen on one", {"qwen": (at[0],)}
    yield "both on one", {"llama": (at[0],), "qwen": (at[0],)}
    if num_devices >= 2:
        yield "Llama, Qwen on one each", {"llama": (at[0],), "qwen": (at[1],)}
        yield "Llama over two", {"llama": (at[0], at[1])}
    if num_devices >= 3:
        yield "Llama over two, Qwen on a third", {"llama": (at[0], at[1]), "qwen": (at[2],)}
    if num_devices >= 4:
        yield "Llama over two, Qwen over two", {"llama": (at[0], at[1]), "qwen": (at[2], at[3])}


def measure(options: argparse.Namespace, name: str, devices: Devices) -> None:
    """Print a layout's row."""
    first = next(iter(devices.values()))[0]
    with tempfile.TemporaryDirectory() as folder:
        workload = build(Path(folder), options.shape, first, devices=devices, compile=first.type == "cuda")
    for absent in set(workload._frozen) - set(devices):
        del workload._frozen[absent]
    batch = on_devices(workload, batch_of(workload, options.micro_batch, options.target_tokens))
    each = list(dict.fromkeys(device for of_model in devices.values() for device in of_model))
    seconds, digests = [], set()
    for in_flight in (1, 2):
        step = warmed(step_of(workload, batch, SideStreams(each, in_flight)))
        seconds.append(seconds_of(step, options.rounds) / IN_A_ROW)
        digests.add(gradient_digest(workload.trainable))
    cells = [f"{each * 1e3:.1f}" for each in seconds]
    print(
        f"| {name} | {' | '.join(cells)} | {options.micro_batch / min(seconds):.1f} | {', '.join(digests)} |",
        flush=True,
    )


def step_of(workload: PairWorkload, batch: PairBatch, streams: SideStreams) -> Callable[[], None]:
    """Some micro-batches in a row, as the training loop makes them."""
    reduction = Reduction(workload.trainable.parameters(), Ranks(device=workload._device), IN_A_ROW)

    def backward(loss: torch.Tensor) -> None:
        streams.before_backward()
        reduction.backward(loss / IN_A_ROW)

    def step() -> None:
        workload.trainable.zero_grad()
        for index in range(IN_A_ROW):
            reduction.begin(index)
            with streams.micro_batch():
                workload.step(batch, backward)
                reduction.end()
        streams.join()
        reduction.finish()

    return step


def warmed(step: Callable[[], None]) -> Callable[[], None]:
    """Compiled and with memory at hand."""
    for _ in range(2):
        step()
    return step


if __name__ == "__main__":
    main()
