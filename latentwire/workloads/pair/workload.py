"""The pair as a workload: batches, the two losses, evaluation."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from latentwire.errors import WorkloadError
from latentwire.workloads.base import BuildContext, StepReport
from latentwire.workloads.pair.batch import Collator, PairBatch
from latentwire.workloads.pair.data import Pair, PairData, load_pairs
from latentwire.workloads.pair.families import FAMILIES
from latentwire.workloads.pair.frozen import FrozenModel
from latentwire.workloads.pair.hop import hop
from latentwire.workloads.pair.models import load_frozen
from latentwire.workloads.pair.options import Options
from latentwire.workloads.pair.wire import LatentWire


class PairWorkload:
    """Trains one wire for a frozen Llama and a frozen Qwen; see ``Workload`` for the order of calls."""

    def __init__(self, options: Any) -> None:
        self._options = Options.model_validate(options)
        self._context: BuildContext | None = None

    def build(self, context: BuildContext) -> None:
        """Load the data and both models, and draw the wire's weights from the seed."""
        self._context = context
        context.safe_point()
        self._data: PairData = load_pairs(self._options.data)
        context.event(
            "data",
            kind=self._options.data.kind,
            num_train=len(self._data.train),
            num_eval=len(self._data.eval),
            sha256=self._data.digest,
        )
        self._frozen: dict[str, FrozenModel] = {}
        for name in FAMILIES:
            self._frozen[name] = load_frozen(name, getattr(self._options, name), context, self._options.compile)
            self._check_length(self._frozen[name])
        self._wire = self._draw_wire(context)
        self._collator = Collator(
            {name: frozen.script for name, frozen in self._frozen.items()},
            self._options.data.max_target_tokens,
            few_lengths=self._options.compile,
        )

    @property
    def trainable(self) -> LatentWire:
        """The encoder and both adapters."""
        return self._wire

    @property
    def train_data(self) -> Sequence[Pair]:
        """Training pairs."""
        return self._data.train

    @property
    def eval_data(self) -> Sequence[Pair]:
        """Evaluation pairs."""
        return self._data.eval

    @property
    def collate(self) -> Collator:
        """Turns samples into a ``PairBatch``; an object of its own, so that workers are not sent the models."""
        return self._collator

    def step(self, batch: PairBatch, backward: Callable[[Tensor], None]) -> StepReport:
        """Forward and backward of one micro-batch.

        Models on GPUs of their own run at once. On the same GPU the first one's backward pass ends before the second
        begins: just as fast, the same bits, and only one model's activations are in memory.
        """
        self._wire.train()
        latents = self._encode(batch.source.to(self._device, non_blocking=True))
        if self._share_a_device:
            losses = self._step_one_by_one(latents, batch, backward)
        else:
            losses = self._losses(latents, batch)
            backward(_mean(losses))
        return _report(losses, batch)

    def evaluate(self, batch: PairBatch) -> StepReport:
        """Both losses of one evaluation batch."""
        self._wire.eval()
        with torch.no_grad():
            latents = self._encode(batch.source.to(self._device, non_blocking=True))
            losses = self._losses(latents, batch)
        return _report(losses, batch)

    def frozen_digests(self) -> dict[str, str]:
        """SHA-256 of both models, and of the data, which is just as fixed. Reads the weights the first time."""
        assert self._context is not None, "build comes first"
        cache = self._context.run_path / "cache" / "digests.json"
        digests = {name: frozen.digest(cache, self._context.safe_point) for name, frozen in self._frozen.items()}
        return {**digests, "data": self._data.digest}

    @property
    def _device(self) -> torch.device:
        assert self._context is not None, "build comes first"
        return self._context.device

    def _draw_wire(self, context: BuildContext) -> LatentWire:
        spaces = {name: (frozen.hidden_size, frozen.embedding_rms()) for name, frozen in self._frozen.items()}
        seed = int.from_bytes(hashlib.sha256(f"{context.seed} wire".encode()).digest()[:8], "big")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # drawn on the CPU: the same bits whatever the device
            wire = LatentWire(self._options.wire, self._options.data.max_source_bytes, spaces)
        return wire.to(context.device)

    def _check_length(self, frozen: FrozenModel) -> None:
        script, data = frozen.script, self._options.data
        longest = len(script.head) + self._options.wire.latent_len + len(script.tail) + data.max_target_tokens
        room = int(frozen.model.config.max_position_embeddings)
        if longest > room:
            raise WorkloadError(
                f"{frozen.name}: latents, template and target take {longest} positions and the model has {room}; "
                f"lower data.max_target_tokens ({data.max_target_tokens}) or wire.latent_len"
            )

    @property
    def _share_a_device(self) -> bool:
        devices = [device for frozen in self._frozen.values() for device in frozen.devices]
        return len(set(devices)) < len(devices)

    def _step_one_by_one(
        self, latents: Tensor, batch: PairBatch, backward: Callable[[Tensor], None]
    ) -> dict[str, Tensor]:
        """Each model's backward ends at a copy of the latents, which frees its activations before the next begins.

        The one with the widest layers first: what it leaves in the allocator's cache has room for the other's tensors.
        The other way round that memory is of no use to it, and the process holds both.
        """
        copy = latents.detach().requires_grad_()
        losses = {}
        for name in sorted(self._frozen, key=lambda name: self._frozen[name].intermediate_size, reverse=True):
            loss = self._loss(name, self._prefix(name, copy), batch)
            backward(loss / len(self._frozen))
            losses[name] = loss.detach()
        latents.backward(copy.grad)  # scaled already, by the two calls above
        return {name: losses[name] for name in self._frozen}

    def _encode(self, source: Tensor) -> Tensor:
        with self._autocast():
            return self._wire.encode(source)

    def _losses(self, latents: Tensor, batch: PairBatch) -> dict[str, Tensor]:
        """Of both models. Each has its prefix before one begins: a copy waits for all that its GPU was given before."""
        prefixes = {name: self._prefix(name, latents) for name in self._frozen}
        return {name: self._loss(name, prefix, batch) for name, prefix in prefixes.items()}

    def _prefix(self, name: str, latents: Tensor) -> Tensor:
        """Where the model begins."""
        with self._autocast():
            return hop(self._wire.prefix(name, latents), self._frozen[name].devices[0])

    def _loss(self, name: str, prefix: Tensor, batch: PairBatch) -> Tensor:
        """Mean cross-entropy of one model over the target tokens, where the wire is.

        No ``hop``: its gradient would keep the wire's GPU, and the other model's backward pass on it, waiting until the
        forward pass here is over.
        """
        return self._frozen[name].loss(prefix, batch.targets[name]).to(self._device)

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        """For the wire, whose weights are float32; the frozen models are in the compute dtype already."""
        assert self._context is not None, "build comes first"
        dtype = self._context.compute_dtype
        return torch.autocast(self._context.device.type, dtype=dtype, enabled=dtype != torch.float32)


def _mean(losses: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).mean()


def _report(losses: Mapping[str, Tensor], batch: PairBatch) -> StepReport:
    """Detach everything; the tokens of both models are counted."""
    detached = {name: loss.detach() for name, loss in losses.items()}
    return StepReport(
        {"loss": _mean(detached), **{f"loss/{name}": loss for name, loss in detached.items()}},
        num_samples=len(batch.source),
        num_tokens=sum(target.rows.numel() for target in batch.targets.values()),
    )
