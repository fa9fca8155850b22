"""What an attempt runs on: how many ranks, on which devices, with which micro-batch. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from latentwire.config import Config
from latentwire.elastic.schedule import MAX_REPLICAS
from latentwire.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Placement:
    """One attempt's ranks and devices; placement.json.

    Attributes:
        devices: the torch devices of each rank on its node, ``cuda:0`` or ``cpu``; on the first is what is trained.
        nodes: the node of each rank, counted from 0; never falling.
        modules: where in a rank's ``devices`` each of the workload's frozen modules goes, one place or several in a
            row; empty: the workload names none, and all is on the first.
        micro_batch: samples of one forward pass; with ``probe`` a guess.
        num_micro_batches: micro-batches of one step over all ranks; times ``micro_batch`` it is the global batch.
        probe: the ranks find the micro-batch before they train.
        gradient_checkpointing: activations are recomputed in the backward pass.
        samples_per_s: expected, over all ranks; None: the workload's footprint is not known.
        peak_bytes: expected on each of a rank's devices; None as above.
        why: in words.
    """

    devices: tuple[tuple[str, ...], ...]
    nodes: tuple[int, ...]
    modules: Mapping[str, tuple[int, ...]]
    micro_batch: int
    num_micro_batches: int
    probe: bool
    gradient_checkpointing: bool
    samples_per_s: float | None
    peak_bytes: tuple[int, ...] | None
    why: str

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return len(self.devices)

    def ranks_on(self, node: int) -> list[int]:
        """The ranks of a node; a rank's place here is its local rank."""
        return [rank for rank, at in enumerate(self.nodes) if at == node]

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Placement:
        """Read what ``dataclasses.asdict`` wrote."""
        peak = record["peak_bytes"]
        return cls(
            **{
                **record,
                "devices": tuple(map(tuple, record["devices"])),
                "nodes": tuple(record["nodes"]),
                "modules": {name: tuple(places) for name, places in record["modules"].items()},
                "peak_bytes": None if peak is None else tuple(peak),
            }
        )

    def devices_of(self, rank: int) -> dict[str, tuple[str, ...]]:
        """The devices of each named module of a rank."""
        return {name: tuple(self.devices[rank][p] for p in places) for name, places in self.modules.items()}


def plan(
    config: Config, gpus: Sequence[str], halvings: int, num_nodes: int = 1, num_gpus: int | None = None
) -> Placement:
    """One rank a device; the models of a rank on one device. All nodes are taken to be like this one.

    Args:
        config: the run's.
        gpus: names of the GPUs that the job sees on this node; empty: the CPU computes.
        halvings: how often the run went out of memory so far; each halves the micro-batch and keeps the global batch.
        num_nodes: of the job.
        num_gpus: that the scheduler gave the job on each node, also where no GPU is seen; None: all that it sees.

    Raises:
        ConfigError: more ranks than GPUs, or a micro-batch that cannot be halved again.
    """
    on_each = len(gpus) if num_gpus is None else min(num_gpus, len(gpus) or num_gpus)
    ranks = config.elastic.num_ranks or min(max(1, on_each) * num_nodes, MAX_REPLICAS)
    if ranks > MAX_REPLICAS:
        raise ConfigError(f"elastic.num_ranks is {ranks}; at most {MAX_REPLICAS} ranks give the same bits")
    nodes = tuple(rank * num_nodes // ranks for rank in range(ranks))
    local_ranks = [rank - nodes.index(node) for rank, node in enumerate(nodes)]
    if gpus and max(local_ranks) >= len(gpus):
        where = " on each node" if num_nodes > 1 else ""
        raise ConfigError(f"elastic.num_ranks is {ranks} and the job sees {len(gpus)} GPUs{where} ({', '.join(gpus)})")
    micro_batch = 8 if config.train.micro_batch == "auto" else config.train.micro_batch
    num_micro_batches = config.train.global_batch // micro_batch
    for _ in range(halvings):
        if micro_batch % 2:
            raise ConfigError(
                f"out of memory with a micro-batch of {micro_batch}, which cannot be halved: set train.micro_batch to "
                "a power of two, or turn on train.gradient_checkpointing, or use a larger GPU"
            )
        micro_batch, num_micro_batches = micro_batch // 2, num_micro_batches * 2
    devices = tuple((f"cuda:{local}" if gpus else "cpu",) for local in local_ranks)
    why = f"{ranks} of {len(gpus) * num_nodes} GPUs" if gpus else f"no GPU: {ranks} on the CPU"
    if num_nodes > 1:
        why += f", {num_nodes} nodes"
    if halvings:
        why += f"; micro-batch halved {halvings} times after running out of memory, so bits may differ from there on"
    checkpointing = config.train.gradient_checkpointing is True
    return Placement(devices, nodes, {}, micro_batch, num_micro_batches, False, checkpointing, None, None, why)
