"""What a workload takes: bytes and operations, from which a plan's peak memory and pace are predicted. Pure.

A workload says so by a function ``footprint`` beside it; see ``workloads/base.py``. Bytes of activations and operations
are those of one sample, of the longest that there may be.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

from latentwire.config import Config
from latentwire.elastic.inventory import GB
from latentwire.target import footprint as footprint_beside

TURN_COST = 1.28
"""Two micro-batches at once, over what they should take: four take 149 ms each where one alone takes 204, on two H200s
(``benchmarks/split.py --shape full``)."""

CONTEXT_BYTES = round(1.0 * GB)
"""On each device before a tensor is there: CUDA's context, the libraries' kernels and workspaces, NCCL's buffers. An
estimate: 0.5 GB of context on an H100 or H200, as nvidia-smi shows it, and as much again for the rest."""

ALLOCATOR_SLACK = 0.06
"""Of activations: what PyTorch's allocator holds and cannot use, as its blocks are of other sizes. An estimate."""

Modules = Mapping[str, tuple[int, ...]]
"""By the name of a frozen module the places, counted from 0 within a replica, that it is laid over, in order."""


@dataclasses.dataclass(frozen=True)
class FrozenModule:
    """A model that is read and not trained: equal layers, with something in front of them and something behind.

    Attributes:
        name: as ``BuildContext.devices`` names it.
        num_layers: it can be cut between any two of them, and nowhere else.
        front_bytes, layer_bytes, back_bytes: weights before the layers, of one layer, after the layers.
        layer_kept_bytes: activations of one layer that the backward pass needs.
        layer_input_bytes: what is kept of a layer instead, where its activations are recomputed.
        layer_working_bytes: taken beside all that while one layer's gradient is computed.
        back_kept_bytes: as ``layer_kept_bytes``, of what is behind the layers.
        num_outputs: rows of a sample for which the module gives an output (logits).
        output_bytes: taken for each of these rows while its loss is computed.
        outputs_at_once: at most so many rows of a micro-batch are computed at a time.
        layer_forward_flops: of one layer's forward pass.
        layer_backward_flops: of its backward pass.
        back_flops: of what is behind the layers, both passes.
    """

    name: str
    num_layers: int
    front_bytes: int
    layer_bytes: int
    back_bytes: int
    layer_kept_bytes: int
    layer_input_bytes: int
    layer_working_bytes: int
    back_kept_bytes: int
    num_outputs: int
    output_bytes: int
    outputs_at_once: int
    layer_forward_flops: int
    layer_backward_flops: int
    back_flops: int

    @property
    def weights_bytes(self) -> int:
        """All of its weights."""
        return self.front_bytes + self.num_layers * self.layer_bytes + self.back_bytes


@dataclasses.dataclass(frozen=True)
class TrainedPart:
    """What is trained. It is on the first device of each replica.

    Attributes:
        num_parameters: all that take a gradient.
        bytes_per_parameter: of weight, gradient, optimizer, average, and the sums that ranks exchange.
        kept_bytes: activations that its backward pass needs.
        flops: both passes.
    """

    num_parameters: int
    bytes_per_parameter: int
    kept_bytes: int
    flops: int


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What a workload takes.

    Attributes:
        modules: the frozen ones, in the order in which they run.
        trained: the rest.
        one_by_one: on the same device a module's backward pass ends before the next module's forward pass begins.
        efficiency: of a data sheet's TFLOP/s, what its steps get.
        notes: what was assumed where it could not be known, in words for a person.
        activation_scale, more_bytes: corrections of the peak on each device, by ``fitted``.
    """

    modules: tuple[FrozenModule, ...]
    trained: TrainedPart
    one_by_one: bool = False
    efficiency: float = 0.5
    notes: tuple[str, ...] = ()
    activation_scale: float = 1.0
    more_bytes: int = 0

    @property
    def names_flops(self) -> bool:
        """Whether a pace can be worked out."""
        return bool(self.trained.flops or any(module.layer_forward_flops for module in self.modules))


@dataclasses.dataclass(frozen=True)
class Probe:
    """A measurement: the peak on one device, all that the driver counts, with micro-batches of so many samples."""

    micro_batch: int
    peak_bytes: int


@dataclasses.dataclass(frozen=True)
class _Part:
    """So many layers of a module on one place, with its front, its back, both or neither."""

    module: FrozenModule
    place: int
    num_layers: int
    has_front: bool
    has_back: bool

    @property
    def weights_bytes(self) -> int:
        module = self.module
        ends = self.has_front * module.front_bytes + self.has_back * module.back_bytes
        return ends + self.num_layers * module.layer_bytes

    def kept_bytes(self, checkpointing: bool) -> int:
        """Per sample, when the forward pass has ended."""
        layer = self.module.layer_input_bytes if checkpointing else self.module.layer_kept_bytes
        return self.num_layers * layer + self.has_back * self.module.back_kept_bytes

    def transient_bytes(self, micro_batch: int, checkpointing: bool) -> int:
        """The most that is taken beside what is kept."""
        module = self.module
        layer = module.layer_working_bytes + (module.layer_kept_bytes if checkpointing else 0)
        rows = min(micro_batch * module.num_outputs, module.outputs_at_once) if self.has_back else 0
        return max(rows * module.output_bytes, micro_batch * layer)

    def flops(self, checkpointing: bool) -> int:
        """Per sample; with ``checkpointing`` the layers' forward pass runs twice."""
        module = self.module
        layer = module.layer_forward_flops * (2 if checkpointing else 1) + module.layer_backward_flops
        return self.num_layers * layer + self.has_back * module.back_flops


def footprint_of(config: Config) -> Footprint | None:
    """What the config's workload says of itself; None: it does not. Imports the workload's module.

    Raises:
        ConfigError, WorkloadError: as ``target.load_target``.
    """
    function: Callable[..., Footprint | None] | None = footprint_beside(config.workload.target)
    return None if function is None else function(config.workload.options, config.train)


def cut(num_layers: int, num_places: int) -> tuple[range, ...]:
    """The layers that each of a module's places has: equally many, to within one. For whoever loads the module."""
    bounds = [-(-num_layers * place // num_places) for place in range(num_places + 1)]
    return tuple(range(a, b) for a, b in itertools.pairwise(bounds))


def lay_out(footprint: Footprint, num_places: int) -> Modules | None:
    """Divide the frozen modules among so many places as evenly as their weights allow; None: it cannot be done.

    With fewer places than modules, each is whole, the largest first on the emptiest place. With more, the largest are
    cut, and the parts of a module are side by side.
    """
    modules = footprint.modules
    if num_places <= max(1, len(modules)):
        loads = [0] * num_places
        place_of = {}
        for module in sorted(modules, key=lambda m: -m.weights_bytes):
            place = loads.index(min(loads))
            loads[place] += module.weights_bytes
            place_of[module.name] = (place,)
        return {module.name: place_of[module.name] for module in modules}
    counts = {module.name: 1 for module in modules}
    for _ in range(num_places - len(modules)):
        divisible = [module for module in modules if counts[module.name] < module.num_layers]
        if not divisible:
            return None
        counts[max(divisible, key=lambda m: m.weights_bytes / counts[m.name]).name] += 1
    ends = list(itertools.accumulate(counts.values()))
    return {name: tuple(range(end - counts[name], end)) for name, end in zip(counts, ends, strict=True)}


def weights_bytes(footprint: Footprint, modules: Modules) -> tuple[int, ...]:
    """Frozen weights on each place of a replica."""
    parts = _parts(footprint, modules)
    return tuple(sum(p.weights_bytes for p in parts if p.place == place) for place in range(num_places(modules)))


def predict(
    footprint: Footprint, modules: Modules, micro_batch: int, checkpointing: bool, in_flight: int = 1
) -> tuple[int, ...]:
    """Peak bytes on each place of a replica, all that the driver counts. Rises with both numbers."""
    parts = _parts(footprint, modules)
    return tuple(
        _standing(footprint, parts, place) + in_flight * _fleeting(footprint, parts, place, micro_batch, checkpointing)
        for place in range(num_places(modules))
    )


def seconds_per_sample(
    footprint: Footprint,
    modules: Modules,
    checkpointing: bool,
    flops_per_s: Sequence[float],
    in_flight: int = 1,
    num_micro_batches: int = 1,
) -> float:
    """Both passes of one sample on a replica whose places compute so fast; exchange and optimizer not counted.

    A module that lies over several places is there once at a time. Modules on different places run at the same time.
    The trained part runs before and after them. Of several micro-batches in a row the second and all later ones begin
    when there is room: where ``in_flight`` others are under way, or the place with the most work is ready for it; that
    takes ``TURN_COST`` times as long as it should.
    """
    parts = _parts(footprint, modules)
    seconds = {part: part.flops(checkpointing) / flops_per_s[part.place] for part in parts}
    of_module = [sum(s for p, s in seconds.items() if p.module is module) for module in footprint.modules]
    of_place = [sum(s for p, s in seconds.items() if p.place == place) for place in range(num_places(modules))]
    trained = footprint.trained.flops / flops_per_s[0]
    alone = trained + max(of_module + of_place, default=0.0)
    busiest = max([trained + of_place[0], *of_place[1:]])
    later = alone if in_flight == 1 else min(alone, TURN_COST * max(busiest, alone / in_flight))
    return (alone + (num_micro_batches - 1) * later) / num_micro_batches


def num_places(modules: Modules) -> int:
    """Devices of a replica."""
    return 1 + max((place for places in modules.values() for place in places), default=0)


def fitted(footprint: Footprint, probe: Probe, modules: Modules, checkpointing: bool, in_flight: int = 1) -> Footprint:
    """Scale the activations to what was measured on the first place, which has the trained part.

    Args:
        footprint: as the workload says, or corrected before.
        probe: what was measured.
        modules: how the replica was laid out.
        checkpointing: whether activations were recomputed.
        in_flight: micro-batches at once.
    """
    plain = dataclasses.replace(footprint, activation_scale=1.0, more_bytes=0)
    parts = _parts(plain, modules)
    activations = in_flight * _fleeting(plain, parts, 0, probe.micro_batch, checkpointing)
    measured = probe.peak_bytes - _standing(plain, parts, 0)
    if measured <= 0:  # less than the weights alone should take
        return dataclasses.replace(plain, more_bytes=measured - activations)
    return dataclasses.replace(plain, activation_scale=measured / activations)


def _parts(footprint: Footprint, modules: Modules) -> list[_Part]:
    parts = []
    for module in footprint.modules:
        places = modules[module.name]
        for index, (place, layers) in enumerate(zip(places, cut(module.num_layers, len(places)), strict=True)):
            parts.append(_Part(module, place, len(layers), index == 0, index == len(places) - 1))
    return parts


def _standing(footprint: Footprint, parts: Sequence[_Part], place: int) -> int:
    """What is there between two steps."""
    trained = footprint.trained.num_parameters * footprint.trained.bytes_per_parameter if place == 0 else 0
    return CONTEXT_BYTES + footprint.more_bytes + trained + sum(p.weights_bytes for p in parts if p.place == place)


def _fleeting(footprint: Footprint, parts: Sequence[_Part], place: int, micro_batch: int, checkpointing: bool) -> int:
    """The most that a micro-batch takes at one time."""
    here = [part for part in parts if part.place == place]
    kept = [micro_batch * part.kept_bytes(checkpointing) for part in here]
    transient = [part.transient_bytes(micro_batch, checkpointing) for part in here]
    if footprint.one_by_one:
        frozen = max((k + t for k, t in zip(kept, transient, strict=True)), default=0)
    else:
        frozen = sum(kept) + max(transient, default=0)
    trained = micro_batch * footprint.trained.kept_bytes if place == 0 else 0
    return round((frozen + trained) * (1 + ALLOCATOR_SLACK) * footprint.activation_scale)
