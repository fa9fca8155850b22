"""The ways in which a job's GPUs can be used, and what is expected of each. Pure."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from latentwire.config import Config
from latentwire.elastic import footprint as footprints
from latentwire.elastic.footprint import Footprint, Modules
from latentwire.elastic.inventory import GB, Device
from latentwire.elastic.schedule import MAX_REPLICAS, num_slots
from latentwire.errors import ConfigError

MAX_GPUS_PER_REPLICA = 4
_PAYS = 0.99
"""Two micro-batches at once take twice the memory of activations: not for less than this."""

_GUESSES = (8, 4, 2, 1)
"""Micro-batches where nothing is known of the workload."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What is planned for.

    Attributes:
        config: the run's.
        gpus: of each node, those that ranks may use; empty: the CPU computes.
        num_ranks: where the GPUs do not decide it: ranks on a CPU, or without a footprint.
        num_nodes: all like this one.
        footprint: what the workload takes; None: it does not say.
        halvings: how often the micro-batch is to be halved, as the run went out of memory.
        micro_batch: that an earlier attempt found, for ``train.micro_batch: auto``.
        one_at_a_time: no two micro-batches of a replica at once; the run went out of memory with two.
    """

    config: Config
    gpus: tuple[Device, ...]
    num_ranks: int
    num_nodes: int
    footprint: Footprint | None
    halvings: int
    micro_batch: int | None
    one_at_a_time: bool

    @property
    def is_free(self) -> bool:
        """Whether the micro-batch is still to be found."""
        return self.config.train.micro_batch == "auto" and self.micro_batch is None

    @property
    def flops_per_s(self) -> tuple[float, ...]:
        """Of each GPU, what a step gets of it; where that is not known, as if all were alike."""
        efficiency = 0.0 if self.footprint is None else self.footprint.efficiency
        return tuple(1.0 if self.why_no_pace else efficiency * (gpu.flops_per_s or 0.0) for gpu in self.gpus)

    @property
    def why_no_pace(self) -> str | None:
        """Why no samples per second can be expected; None: they can."""
        unknown = sorted({gpu.name for gpu in self.gpus if gpu.flops_per_s is None})
        if unknown:
            return f"the speed of {', '.join(unknown)} is not known"
        if self.config.train.precision == "fp32":
            return "the speed in fp32 is not known"
        return None if self.footprint is None or self.footprint.names_flops else "the footprint names no operations"

    @property
    def most_to_probe(self) -> int:
        """The largest micro-batch that ranks may try: one that should fit the smallest job too, where that is known."""
        return self.largest_micro_batch if self.footprint is None else _micro_batches(self)[0]

    @property
    def largest_micro_batch(self) -> int:
        """That leaves no rank of the largest job idle; 1 where the global batch is too small for that."""
        return max(1, self.config.train.global_batch // self.most_ranks)

    @property
    def most_ranks(self) -> int:
        """Of the largest job that this run may get, as far as the config tells."""
        elastic, scheduler = self.config.elastic, self.config.scheduler
        if elastic.num_ranks is not None:
            return min(elastic.num_ranks, MAX_REPLICAS)
        planned = 0 if scheduler.gpus is None else scheduler.ladder[0]
        gpus = max(planned, len(self.gpus) * self.num_nodes)
        return max(1, min(gpus // (elastic.gpus_per_replica or 1), MAX_REPLICAS))


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to use the GPUs.

    Attributes:
        gpus: of each rank, by their number on its node; empty: the CPU.
        nodes: of each rank.
        modules: as in ``Placement``.
        micro_batch, num_micro_batches, gradient_checkpointing, in_flight: as in ``Placement``.
        precision: as in ``Placement``.
        pace: samples per second, or a figure in proportion to it where the chips are not known.
        samples_per_s: the same where they are known.
        peak_bytes: on each place of a replica; None: not known.
        smallest_gpus: of the GPUs that the ranks have in each place, one with the least memory.
        target_bytes: what may be filled of it.
    """

    gpus: tuple[tuple[int, ...], ...]
    nodes: tuple[int, ...]
    modules: Modules
    micro_batch: int
    num_micro_batches: int
    gradient_checkpointing: bool
    precision: str
    in_flight: int = 1
    pace: float = 0.0
    samples_per_s: float | None = None
    peak_bytes: tuple[int, ...] | None = None
    smallest_gpus: tuple[int, ...] = ()
    target_bytes: tuple[int, ...] = ()

    @property
    def num_ranks(self) -> int:
        """Replicas."""
        return len(self.gpus)

    @property
    def num_gpus(self) -> int:
        """In use, over all nodes."""
        return sum(map(len, self.gpus))

    @property
    def missing_bytes(self) -> tuple[int, ...]:
        """On each place of a replica, what is taken over what may be filled."""
        over = zip(self.peak_bytes or (), self.target_bytes, strict=True) if self.peak_bytes else ()
        return tuple(max(0, peak - target) for peak, target in over)

    @property
    def fits(self) -> bool:
        """Whether nothing is missing."""
        return not any(self.missing_bytes)


def candidates(job: Job) -> list[Candidate]:
    """All ways that the config allows, those that do not fit too; the fewest GPUs first.

    Raises:
        ConfigError: the config allows none, or the micro-batch cannot be halved.
    """
    if not job.gpus or job.footprint is None:
        return [_plain(job)]
    laid_out = [modules for size in _sizes(job) if (modules := footprints.lay_out(job.footprint, size)) is not None]
    if not laid_out:
        raise ConfigError(
            f"elastic.gpus_per_replica is {job.config.elastic.gpus_per_replica}, and the workload's models have too "
            "few layers to be cut so often: set less, or null for what is best"
        )
    choices = _micro_batches(job)
    found = []
    for modules in laid_out:
        for num_ranks in _numbers_of_ranks(job):
            nodes = spread(num_ranks, job.num_nodes)
            most = max(nodes.count(node) for node in nodes)
            if most * footprints.num_places(modules) <= len(job.gpus):
                groups = _hand_out(job, modules, most)
                gpus = tuple(groups[rank - nodes.index(node)] for rank, node in enumerate(nodes))
                found.append(_weigh(job, modules, gpus, nodes, choices))
    if not found:
        raise ConfigError(_no_room(job))
    return sorted(found, key=lambda c: c.num_gpus)


def spread(num_ranks: int, num_nodes: int) -> tuple[int, ...]:
    """The node of each rank, in order."""
    return tuple(rank * num_nodes // num_ranks for rank in range(num_ranks))


def halved(job: Job, micro_batch: int) -> int:
    """The micro-batch after the run's halvings.

    Raises:
        ConfigError: it is odd before the last of them.
    """
    for _ in range(job.halvings):
        if micro_batch % 2:
            raise ConfigError(
                f"out of memory with a micro-batch of {micro_batch}, which cannot be halved: set train.micro_batch to "
                "a power of two, or turn on train.gradient_checkpointing, or use a larger GPU"
            )
        micro_batch //= 2
    return micro_batch


def _plain(job: Job) -> Candidate:
    """A device for each rank, with all on it; nothing is expected."""
    train = job.config.train
    if job.config.elastic.gpus_per_replica not in (None, 1):
        why = "the workload gives no footprint, so that its models cannot be divided" if job.gpus else "there is no GPU"
        raise ConfigError(
            f"elastic.gpus_per_replica is {job.config.elastic.gpus_per_replica} and {why}: remove it, or set it to 1"
        )
    if job.is_free:
        guess = next(guess for guess in _GUESSES if train.global_batch % guess == 0)
        micro_batch = max(1, guess >> job.halvings)
    else:
        micro_batch = _fixed(job)
    is_forced = job.config.elastic.num_ranks is not None
    num_ranks = job.num_ranks if is_forced else min(job.num_ranks, train.global_batch // micro_batch)
    nodes = spread(num_ranks, job.num_nodes)
    local = [rank - nodes.index(node) for rank, node in enumerate(nodes)]
    if job.gpus and max(local) >= len(job.gpus):
        raise ConfigError(_no_room(job))
    return Candidate(
        gpus=tuple((gpu,) if job.gpus else () for gpu in local),
        nodes=nodes,
        modules={},
        micro_batch=micro_batch,
        num_micro_batches=train.global_batch // micro_batch,
        gradient_checkpointing=train.gradient_checkpointing is True,
        precision=_precision(job, range(len(job.gpus))),
    )


def _fixed(job: Job) -> int:
    """The micro-batch that is given: by the config, or by an earlier attempt."""
    train = job.config.train
    given = job.micro_batch if train.micro_batch == "auto" else train.micro_batch
    assert given is not None
    if train.global_batch % given:
        raise ConfigError(f"the recorded micro-batch of {given} does not divide train.global_batch: delete the record")
    return halved(job, given)


# ---- With a footprint ------------------------------------------------------------------------------------------------


def _sizes(job: Job) -> list[int]:
    """GPUs of a replica."""
    forced = job.config.elastic.gpus_per_replica
    return list(range(1, min(len(job.gpus), MAX_GPUS_PER_REPLICA) + 1)) if forced is None else [forced]


def _numbers_of_ranks(job: Job) -> list[int]:
    forced = job.config.elastic.num_ranks
    fewest = min(job.num_nodes, MAX_REPLICAS)  # no node is left without work
    return list(range(fewest, MAX_REPLICAS + 1)) if forced is None else [forced]


def _no_room(job: Job) -> str:
    elastic = job.config.elastic
    asked = [
        f"elastic.{key} is {value}"
        for key, value in (("num_ranks", elastic.num_ranks), ("gpus_per_replica", elastic.gpus_per_replica))
        if value is not None
    ]
    where = " on each node" if job.num_nodes > 1 else ""
    names = ", ".join(gpu.name for gpu in job.gpus)
    seen = f"the job sees {len(job.gpus)} GPUs{where} ({names})"
    return f"{' and '.join(asked)}, and {seen}, which is too few: set less, or null for what is best, or ask for more"


def _hand_out(job: Job, modules: Modules, num_replicas: int) -> list[tuple[int, ...]]:
    """Which GPUs each of a node's replicas has, by place: the largest of the node, and the larger for more weights."""
    assert job.footprint is not None
    size = footprints.num_places(modules)
    memory = [gpu.memory_bytes for gpu in job.gpus]
    largest = sorted(range(len(memory)), key=lambda gpu: -memory[gpu])[: num_replicas * size]
    if len({memory[gpu] for gpu in largest}) == 1:
        return [tuple(largest[r * size : (r + 1) * size]) for r in range(num_replicas)]
    loads = footprints.weights_bytes(job.footprint, modules)
    by_load = sorted(range(size), key=lambda place: -loads[place])
    groups = []
    for replica in range(num_replicas):
        gpu_of = dict(zip(by_load, largest[replica::num_replicas], strict=True))
        groups.append(tuple(gpu_of[place] for place in range(size)))
    return groups


def _weigh(
    job: Job, modules: Modules, gpus: tuple[tuple[int, ...], ...], nodes: tuple[int, ...], choices: Sequence[int]
) -> Candidate:
    """The largest micro-batch that fits, without checkpointing if any fits so; else the closest that there is.

    Of a divided replica the largest of which two at once fit, where that is faster.
    """
    weighed = functools.partial(_candidate, job, modules, gpus, nodes)
    one, two = weighed(choices, 1), weighed(choices, 2)
    as_small = weighed([two.micro_batch], 1)  # a smaller micro-batch may be spread better without two at once
    pays = _PAYS * two.pace > max(one.pace, as_small.pace)
    return two if two.fits and pays and not job.one_at_a_time else one


def _candidate(
    job: Job,
    modules: Modules,
    gpus: tuple[tuple[int, ...], ...],
    nodes: tuple[int, ...],
    choices: Sequence[int],
    in_flight: int,
) -> Candidate:
    assert job.footprint is not None
    smallest = tuple(min(each, key=lambda gpu: job.gpus[gpu].memory_bytes) for each in zip(*gpus, strict=True))
    targets = tuple(round(job.config.elastic.memory_target * job.gpus[gpu].memory_bytes) for gpu in smallest)
    found = _largest(job, modules, targets, choices, in_flight)
    micro_batch, checkpointing = found or (choices[-1], _checkpointings(job)[-1])
    num_micro_batches = job.config.train.global_batch // micro_batch
    in_a_row = num_slots(len(gpus), num_micro_batches)
    speeds = job.flops_per_s
    seconds = max(
        footprints.seconds_per_sample(
            job.footprint, modules, checkpointing, [speeds[gpu] for gpu in replica], in_flight, in_a_row
        )
        for replica in gpus
    )
    pace = job.config.train.global_batch / (in_a_row * micro_batch * (seconds or 1.0))
    return Candidate(
        gpus,
        nodes,
        modules,
        micro_batch,
        num_micro_batches,
        checkpointing,
        _precision(job, [gpu for replica in gpus for gpu in replica]),
        in_flight,
        pace,
        None if job.why_no_pace else pace,
        footprints.predict(job.footprint, modules, micro_batch, checkpointing, in_flight),
        smallest,
        targets,
    )


def _checkpointings(job: Job) -> list[bool]:
    asked = job.config.train.gradient_checkpointing
    return [False, True] if asked == "auto" else [asked]


def _largest(
    job: Job, modules: Modules, targets: Sequence[int], choices: Sequence[int], in_flight: int = 1
) -> tuple[int, bool] | None:
    """The first micro-batch of ``choices`` that fits, and with which checkpointing: without, if any fits so."""
    assert job.footprint is not None
    for checkpointing in _checkpointings(job):
        for micro_batch in choices:
            peaks = footprints.predict(job.footprint, modules, micro_batch, checkpointing, in_flight)
            if all(peak <= target for peak, target in zip(peaks, targets, strict=True)):
                return micro_batch, checkpointing
    return None


def _micro_batches(job: Job) -> list[int]:
    """What may be chosen from, the largest first.

    Of ``auto``: divisors of the global batch that leave no rank of the largest job idle and fit the smallest job.
    """
    train = job.config.train
    if not job.is_free:
        return [_fixed(job)]
    divisors = [d for d in range(train.global_batch, 0, -1) if train.global_batch % d == 0]
    shared = [d for d in divisors if d <= job.largest_micro_batch]
    most = max(1, _fitting_everywhere(job, shared) >> job.halvings)
    return [d for d in shared if d <= most]


def _fitting_everywhere(job: Job, choices: Sequence[int]) -> int:
    """The largest micro-batch that fits the smallest job, of as few GPUs as hold the workload at all.

    Raises:
        ConfigError: it does not fit on GPUs of ``elastic.smallest_gpu_gb``, however many.
    """
    assert job.footprint is not None
    scheduler, elastic = job.config.scheduler, job.config.elastic
    smallest = min(gpu.memory_bytes for gpu in job.gpus)
    if elastic.smallest_gpu_gb is not None:
        smallest = min(smallest, round(elastic.smallest_gpu_gb * GB))
    fewest = len(job.gpus) if scheduler.gpus is None else min(len(job.gpus), scheduler.ladder[-1] // job.num_nodes)
    for num_gpus in range(max(1, fewest), len(job.gpus) + 1):
        fitting = []
        for size in [size for size in _sizes(job) if size <= num_gpus]:
            modules = footprints.lay_out(job.footprint, size)
            if modules is not None:
                found = _largest(job, modules, [round(elastic.memory_target * smallest)] * size, choices)
                fitting += [found[0]] if found else []
        if fitting:
            return max(fitting)
    if elastic.smallest_gpu_gb is not None and smallest < min(gpu.memory_bytes for gpu in job.gpus):
        raise ConfigError(
            f"elastic.smallest_gpu_gb is {elastic.smallest_gpu_gb:g}, and the workload does not fit on "
            f"{len(job.gpus)} GPUs of so much: set it to what it can run on, or train.gradient_checkpointing: auto"
        )
    return choices[0]


def _precision(job: Job, gpus: Sequence[int]) -> str:
    """One for all ranks; the ranks agree on it by what their GPUs are (``train/precision.py``)."""
    asked = job.config.train.precision
    if asked != "auto":
        return asked
    if not gpus:
        return "fp32"
    has_bf16 = {None if chip is None else chip.has_bf16 for chip in (job.gpus[gpu].chip for gpu in gpus)}
    if False in has_bf16:
        return "fp16"
    return "bf16 or fp16" if None in has_bf16 else "bf16"
