"""What summing gradients in one order costs: a step of the pair on several GPUs, with torch's DDP and with ours.

``python benchmarks/reduction.py [--ranks 2] [--shape tiny|full] [--micro-batch 16] [--num-micro-batches 4]``
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from pair_parts import batch_of, build, gradient_digest, on_devices, seconds_of
from torch.nn.parallel import DistributedDataParallel

from latentwire.elastic import schedule
from latentwire.train.precision import make_repeatable
from latentwire.train.ranks import Ranks
from latentwire.train.reduction import Reduction
from latentwire.train.watch import Standing
from latentwire.workloads.pair import PairWorkload
from latentwire.workloads.pair.batch import PairBatch

Way = Callable[[], None]


def main() -> None:
    """Start the ranks, each this file again."""
    parser = argparse.ArgumentParser(description="The price of one order of additions.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--shape", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--num-micro-batches", type=int, default=4)
    parser.add_argument("--target-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if "RANK" in os.environ:
        rank(options)
        return
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(options.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, *sys.argv], env={**os.environ, **shared, "RANK": str(r), "LOCAL_RANK": str(r)}
        )
        for r in range(options.ranks)
    ]
    sys.exit(max(process.wait() for process in ranks))


def rank(options: argparse.Namespace) -> None:
    """Measure all ways in turn, round by round; rank 0 prints."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    make_repeatable(1, deterministic=True)
    ranks = Ranks.connect(device, 120, Standing())
    with tempfile.TemporaryDirectory() as folder:
        workload = build(Path(folder), options.shape, device, compile=on_gpu)
    batch = on_devices(workload, batch_of(workload, options.micro_batch, options.target_tokens))
    mine = schedule.micro_batches_of(ranks.rank, ranks.world_size, options.num_micro_batches)
    ways: dict[str, Way] = {
        "no exchange": alone(workload, batch, mine),
        "torch DDP": ddp(workload, batch, mine, ranks),
        "ours, exact": ours(workload, batch, mine, ranks, options.num_micro_batches, exact=True),
        "ours, exact: false": ours(workload, batch, mine, ranks, options.num_micro_batches, exact=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    digests = {}
    for _ in range(options.rounds):
        for name, way in ways.items():
            way()  # the first after another way may find the allocator's blocks elsewhere
            seconds[name].append(ranks.highest([seconds_of(way, 3)])[0])
            digests[name] = gradient_digest(workload.trainable)
            workload.trainable.zero_grad()
    if ranks.rank == 0:
        numbers = sum(p.numel() for p in workload.trainable.parameters())
        print(
            f"{options.ranks} ranks, {options.num_micro_batches} micro-batches of {options.micro_batch} samples, ",
            end="",
        )
        print(f"{numbers / 1e6:.1f} million trained numbers, {device.type}\n")
        base = median(seconds["torch DDP"])
        print("| way | step (ms) | against DDP | gradient |\n|---|---|---|---|")
        for name, each in seconds.items():
            print(f"| {name} | {median(each) * 1e3:.1f} | {median(each) / base - 1:+.2%} | {digests[name]} |")
    ranks.disconnect()


def alone(workload: PairWorkload, batch: PairBatch, mine: range) -> Way:
    """Each rank for itself: what the computation takes."""

    def step() -> None:
        workload.trainable.zero_grad()
        for _ in mine:
            workload.step(batch, lambda loss: loss.backward())

    return step


def ours(
    workload: PairWorkload, batch: PairBatch, mine: range, ranks: Ranks, num_micro_batches: int, exact: bool
) -> Way:
    """As the training loop does."""
    reduction = Reduction(workload.trainable.parameters(), ranks, num_micro_batches, exact)

    def step() -> None:
        workload.trainable.zero_grad()
        for index in mine:
            reduction.begin(index)
            workload.step(batch, lambda loss: reduction.backward(loss / num_micro_batches))
            reduction.end()
        reduction.finish()

    return step


class _Loss(torch.nn.Module):
    """The wire and what follows it, as a module that DDP can wrap; the frozen models stay outside."""

    def __init__(self, workload: PairWorkload) -> None:
        super().__init__()
        self.wire = workload.trainable
        self._workload = (workload,)

    def forward(self, batch: PairBatch) -> torch.Tensor:
        """The mean of both losses."""
        (workload,) = self._workload
        losses = workload._losses(workload._encode(batch.source), batch)
        return torch.stack([*losses.values()]).mean()


def ddp(workload: PairWorkload, batch: PairBatch, mine: range, ranks: Ranks) -> Way:
    """DistributedDataParallel, which exchanges in the last micro-batch's backward pass."""
    module = DistributedDataParallel(_Loss(workload), process_group=ranks.gradients, gradient_as_bucket_view=True)

    def step() -> None:
        workload.trainable.zero_grad()
        for index in mine:
            with module.no_sync() if index != mine[-1] else contextlib.nullcontext():
                (module(batch) / len(mine)).backward()

    return step


if __name__ == "__main__":
    main()
