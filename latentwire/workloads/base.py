"""The Workload protocol: what a model must offer so that the one training loop can drive it.

A workload is one class in any importable module::

    workload:
      target: my_package.my_model:MyWorkload     # or  my_model.py:MyWorkload
      options: {...}

A pydantic model named ``Options`` beside the class, where there is one, checks the options when the config is
loaded; keep that module free of torch at import (load the class lazily) so that the orchestrator stays small. So does a
function ``export_config(options, shapes)``, where there is one: from the options and the shapes of the weights by name
it makes the ``config.json`` that ``latentwire checkpoints export`` writes beside them.

A third, ``footprint(options, train)``, where there is one, gives the ``elastic.footprint.Footprint`` of the workload
from its options and the config's ``train`` section, or None where it cannot know it yet. It must be quick and load no
torch: the agent and ``latentwire plan`` call it. From it the planner works out over how many GPUs a replica is laid,
with which micro-batch, and how fast that is; the names of its frozen modules come back in ``BuildContext.devices``.
Without it each rank has one GPU with all on it, and nothing is expected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class BuildContext:
    """What a workload may know of the place it is built in. The same on every rank but for the devices.

    Attributes:
        device: where this rank computes, and where the trained module is.
        compute_dtype: dtype of the forward and backward pass, resolved from ``train.precision``.
        seed: the run's seed; initial weights must depend on nothing else.
        run_path: the run's directory, for caches (prepared data, tokenizers) that attempts share.
        gradient_checkpointing: recompute activations in the backward pass.
        safe_point: call it before anything long (a model load, a tokenizer training). It returns at once, or raises
            ``Preempted`` when the machine is about to be taken away; let that pass.
        event: writes an event ``event(name, **fields)`` to the attempt's journal.
        devices: by the name of a frozen module the devices that it is laid over, in order, as the planner chose from
            the workload's footprint; a module that is not named here goes to ``device``.
    """

    device: torch.device
    compute_dtype: torch.dtype
    seed: int
    run_path: Path
    gradient_checkpointing: bool
    safe_point: Callable[[], None]
    event: Callable[..., None]
    devices: Mapping[str, tuple[torch.device, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What one micro-batch did.

    Attributes:
        losses: the mean loss by name; ``"loss"`` is the one that was trained on. Detached 0-dim tensors on the
            device (so that nothing waits for it), or floats.
        num_samples: samples in the micro-batch.
        num_tokens: target tokens in the micro-batch, 0 where that has no meaning.
    """

    losses: Mapping[str, torch.Tensor | float]
    num_samples: int
    num_tokens: int = 0


@runtime_checkable
class ShardedSource(Protocol):
    """Training data that can only be read forward, in shards: files, say. Shards are shuffled, what is in them is not.

    Give it at least as many shards as there are micro-batches in a global batch, of about the same size; then no two
    ranks or workers read one shard. ``latentwire.JsonlShards`` is one, and a class that turns its rows into samples
    while they pass is another.
    """

    @property
    def shards(self) -> Sequence[str]:
        """Their names. The same ones in the same order on every rank, in every attempt."""

    def read(self, shard: str, offset: int) -> Iterator[tuple[Any, int]]:
        """The samples of a shard from an offset on, each with the offset that lies behind it.

        What comes after an offset may depend on nothing that was read before it: reading may begin there. 0 is the
        beginning of the shard; other offsets are what this method gave, below 2**63, each another, and mean nothing to
        anybody else. Used from DataLoader workers too.
        """


@runtime_checkable
class Workload(Protocol):
    """A model with its data, driven by the training loop. Constructed as ``Target(options)`` on every rank.

    Order of calls: ``__init__`` (cheap), ``build`` once, then ``step`` and ``evaluate`` as often as the loop likes.
    Nothing may depend on rank, time or call history: the generators of Python, NumPy and torch are seeded by
    (seed, step, micro-batch) before every ``step``, and by (seed, epoch, index) before every ``train_data[index]``, or
    for a stream by (seed, epoch, shard, offset) before every sample; before every ``collate`` by where its samples are.
    """

    def __init__(self, options: Any) -> None: ...

    @property
    def trainable(self) -> torch.nn.Module:
        """The module whose parameters are trained and saved; frozen models must not be inside it."""

    @property
    def train_data(self) -> Sequence[Any] | ShardedSource:
        """Map-style training data (``len()`` and ``[index]``), or a stream; used from DataLoader workers too."""

    @property
    def eval_data(self) -> Sequence[Any]:
        """Map-style evaluation data; empty where there is none."""

    def build(self, context: BuildContext) -> None:
        """Load models and data onto ``context.device``. Blocks; calls ``context.safe_point()`` before long parts."""

    def collate(self, samples: list[Any]) -> Any:
        """Turn samples into one batch of CPU tensors. Runs in DataLoader workers."""

    def step(self, batch: Any, backward: Callable[[torch.Tensor], None]) -> StepReport:
        """Forward and backward of one micro-batch; gradients accumulate in ``trainable``.

        Call ``backward(loss)`` instead of ``loss.backward()``, once or several times: it scales for gradient
        accumulation and fp16. Must not step an optimizer or zero gradients.
        """

    def evaluate(self, batch: Any) -> StepReport:
        """Losses of one evaluation batch, without gradients."""

    def frozen_digests(self) -> Mapping[str, str]:
        """SHA-256 by name of every frozen model, so that a checkpoint never meets other weights; may be empty."""
