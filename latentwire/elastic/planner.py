"""What an attempt runs on: how many ranks, on which devices, with which micro-batch. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from latentwire.config import Config
from latentwire.elastic.schedule import MAX_REPLICAS
from latentwire.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Placement:
    """One attempt's ranks and devices; placement.json.

    Attributes:
        devices: the torch device of each rank, ``cuda:0`` or ``cpu``.
        micro_batch: samples of one forward pass.
        num_micro_batches: micro-batches of one step over all ranks; times ``micro_batch`` it is the global batch.
        why: in words.
    """

    devices: tuple[str, ...]
    micro_batch: int
    num_micro_batches: int
    why: str

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return len(self.devices)


def plan(config: Config, gpus: Sequence[str], halvings: int) -> Placement:
    """One rank a device; the models of a rank on one device.

    Args:
        config: the run's.
        gpus: names of the GPUs that the job sees; empty: the CPU computes.
        halvings: how often the run went out of memory so far; each halves the micro-batch and keeps the global batch.

    Raises:
        ConfigError: more ranks than GPUs, or a micro-batch that cannot be halved again.
    """
    ranks = config.elastic.num_ranks or max(1, min(len(gpus), MAX_REPLICAS))
    if ranks > MAX_REPLICAS:
        raise ConfigError(f"elastic.num_ranks is {ranks}; at most {MAX_REPLICAS} ranks give the same bits")
    if gpus and ranks > len(gpus):
        raise ConfigError(f"elastic.num_ranks is {ranks} and the job sees {len(gpus)} GPUs ({', '.join(gpus)})")
    micro_batch, num_micro_batches = config.train.micro_batch, config.train.num_micro_batches
    for _ in range(halvings):
        if micro_batch % 2:
            raise ConfigError(
                f"out of memory with a micro-batch of {micro_batch}, which cannot be halved: set train.micro_batch to "
                "a power of two, or turn on train.gradient_checkpointing, or use a larger GPU"
            )
        micro_batch, num_micro_batches = micro_batch // 2, num_micro_batches * 2
    devices = tuple(f"cuda:{rank}" if gpus else "cpu" for rank in range(ranks))
    why = f"{ranks} of {len(gpus)} GPUs" if gpus else f"no GPU: {ranks} on the CPU"
    if halvings:
        why += f"; micro-batch halved {halvings} times after running out of memory, so bits may differ from there on"
    return Placement(devices, micro_batch, num_micro_batches, why)
