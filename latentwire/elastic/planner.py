"""What an attempt runs on: how many ranks, on which devices, with which micro-batch. Pure.

The fastest of the candidates that fit wins, of equally fast ones that with the fewest GPUs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from latentwire.config import Config
from latentwire.elastic import words
from latentwire.elastic.candidates import Candidate, Job, candidates
from latentwire.elastic.footprint import Footprint
from latentwire.elastic.inventory import Inventory
from latentwire.elastic.schedule import MAX_REPLICAS
from latentwire.errors import ConfigError

_EQUALLY_FAST = 1e-9
"""Relative: sums in another order."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """One attempt's ranks and devices; placement.json.

    Attributes:
        devices: the torch devices of each rank on its node, ``cuda:0`` or ``cpu``; on the first is what is trained.
        nodes: the node of each rank, counted from 0; never falling.
        modules: where in a rank's ``devices`` each of the workload's frozen modules goes, one place or several in a
            row; empty: the workload names none, and all is on the first.
        micro_batch: samples of one forward pass; with ``probe_up_to`` a guess.
        num_micro_batches: micro-batches of one step over all ranks; times ``micro_batch`` it is the global batch.
        probe_up_to: the ranks find the micro-batch before they train, and try none larger; None: it is known.
        gradient_checkpointing: activations are recomputed in the backward pass.
        precision: of the forward and backward pass, the same on all ranks: ``bf16``, ``fp16``, ``fp32``, or ``bf16 or
            fp16`` where a chip is not known before ranks run on it.
        in_flight: micro-batches that a replica over several GPUs computes at once.
        samples_per_s: expected, over all ranks; None: the workload's footprint is not known.
        peak_bytes: expected on each of a rank's devices; None as above.
        why: in words.
    """

    devices: tuple[tuple[str, ...], ...]
    nodes: tuple[int, ...]
    modules: Mapping[str, tuple[int, ...]]
    micro_batch: int
    num_micro_batches: int
    probe_up_to: int | None
    gradient_checkpointing: bool
    precision: str
    in_flight: int
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


@dataclasses.dataclass(frozen=True)
class Weighed:
    """All candidates of a job, and the one that wins.

    Attributes:
        job: what was planned for.
        candidates: the fewest GPUs first.
        chosen: None where none fits.
    """

    job: Job
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None

    @property
    def why(self) -> str:
        """In words: why this one and not the others; or what is missing, and the cure."""
        if self.chosen is None:
            return words.nothing_fits(self.job, self.candidates)
        return words.why(self.job, self.chosen, [each for each in self.candidates if each is not self.chosen])

    def placement(self) -> Placement:
        """The chosen one, for an attempt.

        Raises:
            ConfigError: none fits.
        """
        chosen = self.chosen
        if chosen is None:
            raise ConfigError(self.why)
        return Placement(
            devices=tuple(tuple(f"cuda:{gpu}" for gpu in gpus) or ("cpu",) for gpus in chosen.gpus),
            nodes=chosen.nodes,
            modules=chosen.modules,
            micro_batch=chosen.micro_batch,
            num_micro_batches=chosen.num_micro_batches,
            probe_up_to=self._probe_up_to(chosen) if self.job.gpus and self.job.is_free else None,
            gradient_checkpointing=chosen.gradient_checkpointing,
            precision=chosen.precision,
            in_flight=chosen.in_flight,
            samples_per_s=chosen.samples_per_s,
            peak_bytes=chosen.peak_bytes,
            why=self.why,
        )

    def _probe_up_to(self, chosen: Candidate) -> int:
        """Of which two at once should fit is no larger one tried: the ranks try one at a time."""
        return self.job.most_to_probe if chosen.in_flight == 1 else chosen.micro_batch


def weigh(
    config: Config,
    inventory: Inventory,
    footprint: Footprint | None,
    halvings: int = 0,
    num_nodes: int = 1,
    num_gpus: int | None = None,
    micro_batch: int | None = None,
    one_at_a_time: bool = False,
) -> Weighed:
    """All that can be done with the GPUs, and what is best; nodes are taken to be alike. Called by the agent.

    Args:
        config: the run's.
        inventory: of this node.
        footprint: what the workload takes; None: one GPU for each rank, and nothing is expected.
        halvings: how often the micro-batch is to be halved, as the run went out of memory; the global batch stays.
        num_nodes: of the job.
        num_gpus: that the scheduler gave the job on each node, also where no GPU is seen; None: all that it sees.
        micro_batch: what an earlier attempt found for ``train.micro_batch: auto``.
        one_at_a_time: the run went out of memory with two micro-batches of a replica at once.

    Raises:
        ConfigError: more ranks or GPUs than there are, or a micro-batch that cannot be halved again.
    """
    gpus = inventory.gpus
    on_each = len(gpus) if num_gpus is None else min(num_gpus, len(gpus) or num_gpus)
    num_ranks = config.elastic.num_ranks or min(max(1, on_each) * num_nodes, MAX_REPLICAS)
    if num_ranks > MAX_REPLICAS:
        raise ConfigError(f"elastic.num_ranks is {num_ranks}; at most {MAX_REPLICAS} ranks give the same bits")
    usable = gpus[:on_each]
    if any(gpu.is_mig for gpu in usable):
        _refuse_slices(config, num_nodes)
        usable, num_ranks = usable[:1], min(num_ranks, num_nodes)
    job = Job(config, usable, num_ranks, num_nodes, footprint, halvings, micro_batch, one_at_a_time)
    found = tuple(candidates(job))
    fitting = [candidate for candidate in found if candidate.fits]
    best = max((candidate.pace for candidate in fitting), default=0.0)
    chosen = next((candidate for candidate in fitting if candidate.pace >= best * (1 - _EQUALLY_FAST)), None)
    return Weighed(job, found, chosen)


def _refuse_slices(config: Config, num_nodes: int) -> None:
    """A process sees one MIG slice, and NCCL joins none of one GPU."""
    for key, value, most in (
        ("num_ranks", config.elastic.num_ranks, num_nodes),
        ("gpus_per_replica", config.elastic.gpus_per_replica, 1),
    ):
        if value is not None and value > most:
            raise ConfigError(
                f"elastic.{key} is {value}, and the job has MIG slices, of which a process sees one: set it to {most} "
                "or null, or ask for whole GPUs"
            )
