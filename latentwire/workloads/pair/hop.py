"""From GPU to GPU and, in the backward pass, back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Hop(torch.autograd.Function):
    """A copy whose gradient arrives on the stream that the copy left from.

    Autograd's threads know the streams of the GPU that each is for. A plain copy's gradient goes to the other GPU's
    default stream there, and waits for, and holds up, what has nothing to do with it.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device) -> Tensor:
        ctx.device = tensor.device
        ctx.stream = torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None
        return tensor.to(device, non_blocking=True)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        with torch.cuda.stream(ctx.stream):
            return grad_outputs[0].to(ctx.device, non_blocking=True), None


def hop(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on this device; itself where it is there already. Waits for nothing."""
    if tensor.device == device:
        return tensor
    moved: Tensor = _Hop.apply(tensor, device)
    return moved
