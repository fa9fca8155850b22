"""How much of the GPUs' memory training takes, and the largest micro-batch that it leaves room for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from latentwire.config import ElasticSection
from latentwire.errors import ConfigError

if TYPE_CHECKING:
    from latentwire.train.ranks import Ranks

_OUT_OF_MEMORY = 2.0
"""How full a device is said to be that was too small."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, torch's or what CUDA's libraries take by themselves, which is a bare RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    )


def peak_bytes(device: torch.device) -> int:
    """The most that a GPU has had to hold since ``reset``, all that the driver counts. Waits for nothing."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device) + torch.cuda.max_memory_reserved(device)


def reset(device: torch.device) -> None:
    """Begin to count anew."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


def allocator_figures(devices: Sequence[torch.device]) -> dict[str, float]:
    """What torch's allocator took from these GPUs and what of it was ever in use, for a step's line. Waits for nothing.

    Nothing on a CPU. A peak is that of the attempt; a retry gave all that was free back to take it anew.
    """
    of_gpus = [torch.cuda.memory_stats(device) for device in devices if device.type == "cuda"]
    names = {
        "memory_reserved_peak_bytes": "reserved_bytes.all.peak",
        "memory_allocated_peak_bytes": "allocated_bytes.all.peak",
        "memory_retries": "num_alloc_retries",
    }
    return {name: sum(stats.get(key, 0) for stats in of_gpus) for name, key in names.items()} if of_gpus else {}


class Fullness:
    """How full passes make a rank's GPUs, over what a plan may fill.

    Args:
        devices: the rank's GPUs; what is trained is on the first.
        settings: the run's.
        unseen_bytes: that a step takes on the first and a pass does not show.
    """

    def __init__(self, devices: Sequence[torch.device], settings: ElasticSection, unseen_bytes: int) -> None:
        self._devices = devices
        self._target = settings.memory_target
        self._smallest = None if settings.smallest_gpu_gb is None else int(settings.smallest_gpu_gb * 1e9)
        self._unseen_bytes = unseen_bytes

    def after(self, make_pass: Callable[[], object]) -> float:
        """Make the pass; over 1: too full. Memory is handed out at launch, so nothing waits for the devices."""
        for device in self._devices:
            reset(device)
        try:
            make_pass()
            return max(self._of(device, self._unseen_bytes * (not i)) for i, device in enumerate(self._devices))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return _OUT_OF_MEMORY

    def _of(self, device: torch.device, unseen_bytes: int) -> float:
        total = torch.cuda.get_device_properties(device).total_memory
        return (peak_bytes(device) + unseen_bytes) / (self._target * min(total, self._smallest or total))


@dataclasses.dataclass(frozen=True)
class Found:
    """The micro-batch, and how full each that was tried made the fullest GPU of all ranks."""

    micro_batch: int
    fullness: Mapping[int, float]


def find_micro_batch(global_batch: int, most: int, fullness: Callable[[int], float], ranks: Ranks) -> Found:
    """The largest divisor of the global batch that fits on every rank. Collective: all ranks try the same in turn.

    Two small passes show what a sample takes; then the largest that should fit by that is tried, a smaller one if it
    does not, and a larger one where it left more room than two small passes could show.

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

    def expected(size: int) -> float:
        """On the line through the smallest and the largest that fit."""
        small, large = fitting[0], fitting[-1]
        return tried[small] + (tried[large] - tried[small]) / (large - small) * (size - small)

    if not fits(sizes[0]):
        raise ConfigError(
            f"train.micro_batch: auto finds that not even {sizes[0]} fits, which fills a GPU to {tried[sizes[0]]:.0%} "
            "of what elastic.memory_target allows: turn on train.gradient_checkpointing, or lay a replica over more "
            "GPUs with elastic.gpus_per_replica"
        )
    fitting = [size for size in sizes[:2] if fits(size)]
    too_large = math.inf if fitting == sizes[:2] else sizes[1]
    while hopeful := [size for size in sizes if fitting[-1] < size < too_large and expected(size) <= 1]:
        if fits(hopeful[-1]):
            fitting.append(hopeful[-1])
        else:
            too_large = hopeful[-1]
    return Found(fitting[-1], tried)
