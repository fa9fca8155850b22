"""Passes that change nothing: warming up, and finding the micro-batch that the memory holds."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from latentwire.config import ElasticSection
from latentwire.errors import ConfigError
from latentwire.train.ranks import Ranks

_LOOKED_AT = 256
"""So many samples are looked at for the heaviest."""
_OUT_OF_MEMORY = 2.0
"""How full a device is said to be that was too small."""


@contextlib.contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Inside, passes may be made; after, gradients are gone and buffers as they were."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        for parameter in model.parameters():
            parameter.grad = None
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


class Fullness:
    """How full passes make a rank's GPUs, over what a plan may fill.

    Args:
        devices: the rank's GPUs; what is trained is on the first.
        settings: the run's.
        num_parameters: trained ones. A pass shows neither their gradient's sums nor the optimizer's states.
    """

    def __init__(self, devices: Sequence[torch.device], settings: ElasticSection, num_parameters: int) -> None:
        self._devices = devices
        self._target = settings.memory_target
        self._smallest = None if settings.smallest_gpu_gb is None else int(settings.smallest_gpu_gb * 1e9)
        self._unseen_bytes = num_parameters * 4 * 4  # two moments, two sums

    def after(self, make_pass: Callable[[], None]) -> float:
        """Make the pass; over 1: too full. Waits for the devices."""
        torch.cuda.empty_cache()
        for device in self._devices:
            torch.cuda.reset_peak_memory_stats(device)
        try:
            make_pass()
            return max(self._of(device, self._unseen_bytes * (not i)) for i, device in enumerate(self._devices))
        except torch.OutOfMemoryError:
            return _OUT_OF_MEMORY

    def _of(self, device: torch.device, unseen_bytes: int) -> float:
        free, total = torch.cuda.mem_get_info(device)
        not_ours = total - free - torch.cuda.memory_reserved(device)  # CUDA's own, and other programs'
        peak = not_ours + torch.cuda.max_memory_allocated(device) + unseen_bytes
        return peak / (self._target * min(total, self._smallest or total))


@dataclasses.dataclass(frozen=True)
class Found:
    """The micro-batch, and how full each that was tried made the fullest GPU of all ranks."""

    micro_batch: int
    fullness: Mapping[int, float]


def find_micro_batch(global_batch: int, most: int, fullness: Callable[[int], float], ranks: Ranks) -> Found:
    """The largest divisor of the global batch that fits on every rank. Collective: all ranks try the same in turn.

    Two small passes show what a sample takes; then the largest that should fit by that is tried, and smaller ones
    until one does.

    Args:
        global_batch: of the run.
        most: samples; larger ones would leave a rank of some attempt without work.
        fullness: makes a pass of a size; over 1: it does not fit.
        ranks: all of them.

    Raises:
        ConfigError: not even the smallest fits.
    """
    sizes = [size for size in range(1, most + 1) if global_batch % size == 0]
    tried: dict[int, float] = {}

    def fits(size: int) -> bool:
        if size not in tried:
            (tried[size],) = ranks.highest([fullness(size)])
        return tried[size] <= 1

    hopeful = sizes if all(fits(size) for size in sizes[:2]) else sizes[:1]
    for size in reversed([size for size in hopeful if _expected(tried, size) <= 1]):
        if fits(size):
            return Found(size, tried)
    raise ConfigError(
        f"train.micro_batch: auto finds that not even {sizes[0]} fits, which fills a GPU to {tried[sizes[0]]:.0%} of "
        "what elastic.memory_target allows: turn on train.gradient_checkpointing, or lay a replica over more GPUs "
        "with elastic.gpus_per_replica"
    )


def _expected(tried: Mapping[int, float], size: int) -> float:
    """On the line through the first two; where there is one, as full as that."""
    (small, full), *more = tried.items()
    if not more:
        return full
    larger, fuller = more[0]
    return full + (fuller - full) / (larger - small) * (size - small)


def heaviest(data: Sequence[Any], collate: Callable[[list[Any]], Any] | None) -> Any:
    """Of the first samples the one whose batch is the largest: what a step may have to hold many of."""
    samples = [data[index] for index in range(min(len(data), _LOOKED_AT))]
    return samples[0] if collate is None else max(samples, key=lambda sample: _num_bytes(collate([sample])))


def _num_bytes(batch: Any) -> int:
    """Of all tensors in a batch, however it is nested."""
    if isinstance(batch, torch.Tensor):
        return batch.numel() * batch.element_size()
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return sum(map(_num_bytes, parts))
