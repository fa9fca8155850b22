"""Causal attention of sequences that all continue one fixed sequence, whose keys and values were computed once."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

KeysValues: TypeAlias = tuple[Tensor, Tensor]
"""Of one layer, each (1, key-value heads, positions, head size), with their rotary embedding."""


def install() -> str:
    """Make ``continued`` known to transformers. Returns its name, for ``attn_implementation``."""
    name = "continued"
    AttentionInterface.register(name, continued)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def continued(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    past: KeysValues | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention in the form that transformers calls; reads ``past`` first, if it is given.

    Causal attention has fast kernels for squares only, so nothing asks at the places of the past, and what is found
    there is dropped: next to a layer's products that costs nothing.

    Args:
        module: the attention layer.
        query: (B, heads, L, head size).
        key: (B, key-value heads, L, head size), as ``value``.
        value: what is mixed.
        attention_mask: of the model's own forward pass; None with a past.
        past: of this layer; was passed to the layer by name.
        options: what else transformers gives.

    Returns:
        (B, L, heads, head size), and no weights.
    """
    if past is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    num_past = past[0].shape[2]
    key, value = (
        torch.cat([known.expand(len(own), -1, -1, -1), own], dim=2)
        for known, own in zip(past, (key, value), strict=True)
    )
    query = functional.pad(query, (0, 0, num_past, 0))
    mixed, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return mixed[:, num_past:], None
