"""Passes that change nothing, for warming up and for trying out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from latentwire.train.feed import Data, first_samples

_LOOKED_AT = 256
"""So many samples are looked at for the heaviest."""


@contextlib.contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Inside, passes may be made; after, gradients are gone and buffers as they were."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        for parameter in model.parameters():
            parameter.grad = None
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


def heaviest(data: Data, seed: int, collate: Callable[[list[Any]], Any] | None) -> Any:
    """Of the first samples the one whose batch is the largest: what a step may have to hold many of."""
    samples = first_samples(data, seed, _LOOKED_AT)
    return samples[0] if collate is None else max(samples, key=lambda sample: _num_bytes(collate([sample])))


def _num_bytes(batch: Any) -> int:
    """Of all tensors in a batch, however it is nested."""
    if isinstance(batch, torch.Tensor):
        return batch.numel() * batch.element_size()
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return sum(map(_num_bytes, parts))
