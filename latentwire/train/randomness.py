"""The random generators of a process: Python, NumPy, torch on the CPU and on every GPU."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch


def seed_everything(seed: int) -> None:
    """Seed all four generators of this process from one number.

    Not ``torch.manual_seed``: before CUDA is in use that queues a call, with a stack trace, each time.
    """
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def capture() -> dict[str, Any]:
    """The state of all four: plain values and CPU tensors. Of the GPUs the present one's, which stands for all.

    Not each GPU's: how many a process sees would be part of the state, and the same step would have other bits.
    """
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, numpy.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def restore(state: dict[str, Any]) -> None:
    """Set all four, every GPU alike. GPUs keep their state where the capture was made without one."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        for device in range(torch.cuda.device_count()):
            torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Inside, all generators start from ``seed``; after, they are as they were before."""
    before = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    seed_everything(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        numpy.random.set_state(before[1])
        torch.set_rng_state(before[2])
        for device, state in enumerate(cuda):
            torch.cuda.set_rng_state(state, device)
