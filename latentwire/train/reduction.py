"""Summing gradients over micro-batches and ranks in one fixed order, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from latentwire.elastic import schedule
from latentwire.train.ranks import Ranks


class OrderedReduction:
    """Takes the gradient sum of each canonical segment and adds them in the order of the segments.

    Between ``after_micro_batch`` calls autograd accumulates into ``.grad`` as usual; ``finish`` leaves the total there.

    Args:
        parameters: the trainable ones, in the same order on every rank.
        ranks: who computes.
        num_micro_batches: M.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], ranks: Ranks, num_micro_batches: int) -> None:
        self._parameters = list(parameters)
        self._ranks = ranks
        self._segments = schedule.segments(num_micro_batches)
        self._owners = [schedule.owner_of(s, ranks.world_size, num_micro_batches) for s in self._segments]
        self._last_micro_batches = {segment[-1]: index for index, segment in enumerate(self._segments)}
        self._sums: dict[int, list[torch.Tensor]] = {}

    def after_micro_batch(self, micro_batch: int) -> None:
        """Called after each backward pass; takes the gradients away where a segment ends."""
        index = self._last_micro_batches.get(micro_batch)
        if index is not None:
            self._sums[index] = [self._take(parameter) for parameter in self._parameters]

    def finish(self) -> None:
        """Exchange the segment sums and leave their total in ``.grad``. Collective."""
        total: list[torch.Tensor] | None = None
        for index, owner in enumerate(self._owners):
            sums = self._sums.pop(index, None) or [torch.empty_like(p) for p in self._parameters]
            for tensor in sums:
                self._ranks.broadcast(tensor, owner)
            if total is None:
                total = sums
            else:
                torch._foreach_add_(total, sums)
        assert total is not None
        for parameter, gradient in zip(self._parameters, total, strict=True):
            parameter.grad = gradient

    def _take(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        gradient, parameter.grad = parameter.grad, None
        return torch.zeros_like(parameter) if gradient is None else gradient
