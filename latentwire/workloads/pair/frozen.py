"""A frozen model at work: from a soft prefix and target tokens to a loss, on one device or over several."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel

from latentwire.elastic.footprint import cut
from latentwire.workloads.pair.attention import KeysValues
from latentwire.workloads.pair.batch import TargetBatch
from latentwire.workloads.pair.cross_entropy import Errors, cross_entropy, errors
from latentwire.workloads.pair.digests import folder_digest, module_digest
from latentwire.workloads.pair.folders import has_weights
from latentwire.workloads.pair.hop import hop
from latentwire.workloads.pair.tokenizer import Script

Layer: TypeAlias = Callable[..., Tensor]
_MOST_SHAPES = 64
_SHORTEST_PAST = 8
"""Tokens. To put the keys and values of one before those of each sample takes longer than to compute them with it
(``benchmarks/pair_step.py``); templates have 24 and more, and nothing between was measured."""

COMPILED: dict[str, Any] = {"fullgraph": True, "dynamic": False, "options": {"deterministic": True}}
"""One graph per shape, and no kernel chosen by timing: the bits of a shape never depend on what was run before."""


@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """One model on its devices, in evaluation mode, that takes no gradient into its weights.

    Attributes:
        folder: what it was loaded from; holds only a tokenizer where the weights were drawn in place.
        script: its tokens.
        head: (1, n, H) embeddings of the script's head; of none where ``past`` has it.
        past: of each layer, the keys and values of the script's head, which no sample and no training changes; None
            where it is short.
        tail: (1, n, H) embeddings of the script's tail.
        devices: the embedding is on the first, the output layer on the last, the layers over all in order.
        layers: what a pass with gradients goes through.
        errors: the compiled or plain ``cross_entropy.errors``.
    """

    name: str
    model: PreTrainedModel
    folder: Path
    script: Script
    head: Tensor
    past: tuple[KeysValues | None, ...]
    tail: Tensor
    devices: tuple[torch.device, ...]
    layers: tuple[Layer, ...]
    errors: Errors

    @property
    def hidden_size(self) -> int:
        """Width of its embedding space."""
        return int(self.model.config.hidden_size)

    @property
    def intermediate_size(self) -> int:
        """Width of its layers' widest tensors."""
        return int(self.model.config.intermediate_size)

    def embedding_rms(self) -> float:
        """Root mean square of all its input embeddings. Waits for the device."""
        weight = self.model.get_input_embeddings().weight
        norm = torch.linalg.vector_norm(weight.detach(), dtype=torch.float32)  # without a copy in float32, of 2 GB
        return float(norm) / math.sqrt(weight.numel())

    def digest(self, cache: Path, safe_point: Callable[[], None]) -> str:
        """SHA-256 of its weights and files; blocks while they are read."""
        digest = folder_digest(self.folder, cache, safe_point)
        if has_weights(self.folder):
            return digest
        return hashlib.sha256(f"{digest} {module_digest(self.model, safe_point)}".encode()).hexdigest()

    def loss(self, prefix: Tensor, target: TargetBatch) -> Tensor:
        """Mean cross-entropy over the target tokens, float32, on the last device. Does not wait for any device.

        The model reads head, soft prefix, tail, target. Only the states that predict a target token become
        logits. No mask: what pads a target stands to the right of all that is read.

        Args:
            prefix: (B, latent_len, H) float32, on the first device.
            target: CPU or device tensors.
        """
        first, last = self.devices[0], self.devices[-1]
        tokens = target.tokens.to(first, non_blocking=True)
        embeds = self._assemble(prefix, tokens[:, :-1])  # nothing follows the last, so nobody reads it
        layers = self.layers if torch.is_grad_enabled() else self.model.get_decoder().layers  # evaluated uncompiled
        hidden = through_layers(self.model, layers, self.devices, embeds, self.past)
        hidden = hidden[:, -tokens.shape[1] :].flatten(0, 1)
        predicting = hidden.index_select(0, target.rows.to(last, non_blocking=True))
        states = self.model.get_decoder().norm(predicting)
        weight = self.model.get_output_embeddings().weight
        return cross_entropy(states, weight, target.labels.to(last, non_blocking=True), self.errors)

    def _assemble(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """Embeddings (B, head + latent_len + tail + tokens, H) in the model's dtype."""
        embed = self.model.get_input_embeddings()
        head, tail = (part.expand(len(tokens), -1, -1) for part in (self.head, self.tail))
        return torch.cat([head, prefix.to(embed.weight.dtype), tail, embed(tokens)], dim=1)


def through_layers(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    devices: tuple[torch.device, ...],
    embeds: Tensor,
    past: Sequence[KeysValues | None],
    **options: Any,
) -> Tensor:
    """(B, L, H) -> (B, L, H), before the last norm; ``options`` are given to each layer."""
    start = 0 if past[0] is None else past[0][0].shape[2]
    positions = torch.arange(start, start + embeds.shape[1], device=embeds.device)[None]
    rotary = model.get_decoder().rotary_emb(embeds, position_ids=positions)
    hidden = embeds
    for layer, known, device in zip(layers, past, devices_of_layers(len(layers), devices), strict=True):
        if hidden.device != device:
            hidden, rotary = hop(hidden, device), tuple(hop(part, device) for part in rotary)
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, past=known, **options)
    return hidden


def read_once(
    model: PreTrainedModel, head: Tensor, devices: tuple[torch.device, ...]
) -> tuple[Tensor, tuple[KeysValues | None, ...]]:
    """What samples still read of the head (1, n, H), and its keys and values by layer, where each layer is."""
    layers = model.get_decoder().layers
    nothing: tuple[None, ...] = (None,) * len(layers)
    if head.shape[1] < _SHORTEST_PAST:
        return head, nothing
    cache = DynamicCache()
    with torch.no_grad():
        through_layers(model, layers, devices, head, nothing, past_key_values=cache)
    return head[:, :0], tuple((layer.keys, layer.values) for layer in cache.layers)


def devices_of_layers(num_layers: int, devices: tuple[torch.device, ...]) -> list[torch.device]:
    """Where each layer is: as the planner counts them."""
    parts = cut(num_layers, len(devices))
    return [device for device, layers in zip(devices, parts, strict=True) for _ in layers]


def trained_through(model: PreTrainedModel, compiled: bool, checkpointed: bool) -> tuple[Layer, ...]:
    """The layers as a pass with gradients calls them: perhaps compiled, perhaps computed again in the backward pass.

    Checkpointed here because transformers does so in training mode only, and frozen models stay in evaluation mode.
    """
    layers: list[Layer] = list(model.get_decoder().layers)
    if compiled:
        # transformers wraps the layers of all models in one function; it meets each model, device and target length
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_SHAPES)
        layers = [torch.compile(layer.forward, **COMPILED) for layer in model.get_decoder().layers]
    if checkpointed:
        layers = [
            functools.partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False) for layer in layers
        ]
    return tuple(layers)


def error_function(compiled: bool) -> Errors:
    """``cross_entropy.errors`` as it is, or compiled."""
    return torch.compile(errors, **COMPILED) if compiled else errors
