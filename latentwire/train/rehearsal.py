"""Passes that change nothing: warming up, and finding the micro-batch that the memory holds."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from latentwire.config import Config
from latentwire.errors import ConfigError
from latentwire.train.ranks import Ranks

_LOOKED_AT = 256
"""So many samples are looked at for the heaviest."""


@contextlib.contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Inside, passes may be made; after, the gradients are gone and the buffers are as they were."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        for parameter in model.parameters():
            parameter.grad = None
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


@dataclasses.dataclass(frozen=True)
class Probe:
    """What one pass took: the fullest device's peak over what it may take; more than 1 also where memory ran out."""

    micro_batch: int
    fullness: float


class MemoryLimits:
    """How full the devices of a rank got in a pass, against what a plan may fill.

    Args:
        devices: the rank's GPUs.
        config: the run's.
        more_bytes: on the first device, what training needs and a pass does not show: optimizer states, sums.
    """

    def __init__(self, devices: Sequence[torch.device], config: Config, more_bytes: int) -> None:
        self._devices = devices
        self._target = config.elastic.memory_target
        smallest = config.elastic.smallest_gpu_gb
        self._most_bytes = None if smallest is None else int(smallest * 1e9)
        self._more_bytes = more_bytes

    def begin(self) -> None:
        """Before a pass."""
        torch.cuda.empty_cache()
        for device in self._devices:
            torch.cuda.reset_peak_memory_stats(device)

    def fullness(self) -> float:
        """After a pass. Waits for the devices."""
        return max(self._fullness(device, self._more_bytes * (not i)) for i, device in enumerate(self._devices))

    def _fullness(self, device: torch.device, more_bytes: int) -> float:
        free, total = torch.cuda.mem_get_info(device)
        outside = total - free - torch.cuda.memory_reserved(device)  # CUDA's own, and other programs'
        peak = outside + torch.cuda.max_memory_allocated(device) + more_bytes
        return peak / (self._target * min(total, self._most_bytes or total))


def training_bytes(parameters: Sequence[torch.nn.Parameter]) -> int:
    """What a training step needs besides weights and activations: gradient, its sums, AdamW's two moments; float32."""
    return sum(p.numel() for p in parameters) * 4 * 5


def candidates(global_batch: int, most: int) -> list[int]:
    """The micro-batches that may be, smallest first."""
    return [size for size in range(1, most + 1) if global_batch % size == 0]


def find_micro_batch(sizes: Sequence[int], try_out: Any, ranks: Ranks) -> tuple[int, list[Probe]]:
    """The largest size that fits on every rank. Collective: all ranks try the same sizes in the same order.

    Two small passes show what a sample takes; the largest size that should fit by that is tried, and smaller ones
    until one does.

    Args:
        sizes: smallest first.
        try_out: makes a pass of a size and returns its ``Probe``; does not raise where memory runs out.
        ranks: all of them.

    Raises:
        ConfigError: not even the smallest fits.
    """
    tried: dict[int, Probe] = {}

    def fits(size: int) -> bool:
        if size not in tried:
            probe = try_out(size)
            (fullness,) = ranks.highest([probe.fullness])
            tried[size] = Probe(size, fullness)
        return tried[size].fullness <= 1

    for size in sizes[:2]:
        if not fits(size):
            break
    left = [size for size in sizes if _expected(list(tried.values()), size) <= 1]
    for size in reversed(left):
        if fits(size):
            return size, list(tried.values())
    raise ConfigError(
        f"train.micro_batch: auto finds that not even {sizes[0]} fits: {tried[sizes[0]].fullness:.0%} of what "
        "elastic.memory_target allows; turn on train.gradient_checkpointing, or let more GPUs share a replica with "
        "elastic.gpus_per_replica"
    )


def _expected(probes: list[Probe], size: int) -> float:
    """On the line through the first two probes; where one is missing, as full as the first."""
    if len(probes) < 2:
        return probes[0].fullness
    one, two = probes[:2]
    slope = (two.fullness - one.fullness) / (two.micro_batch - one.micro_batch)
    return one.fullness + slope * (size - one.micro_batch)


def weight_of(batch: Any) -> int:
    """Bytes of all tensors in a batch, however it is nested."""
    if isinstance(batch, torch.Tensor):
        return batch.numel() * batch.element_size()
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return sum(map(weight_of, parts))


def heaviest(data: Sequence[Any], collate: Any, num: int) -> list[Any]:
    """So many samples like the heaviest of the first few: what a step may have to hold at once."""
    samples = [data[index] for index in range(min(len(data), _LOOKED_AT))]
    return [max(samples, key=lambda sample: weight_of(collate([sample])))] * num
