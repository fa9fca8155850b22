"""Cross-entropy over a frozen output layer, without keeping logits: a chunk of rows at a time.

The gradient of the loss by the hidden states follows from a chunk's logits at once, so they can go before the next
chunk's come: at most ``CHUNK_ROWS`` rows of the vocabulary are in memory. The idea is that of fused linear
cross-entropy (P.-L. Hsu et al., "Liger Kernel", 2024, section 3.2); the frozen weight needs no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_ROWS = 1024

Errors = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def errors(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of logits (N, V) and the tokens (N,) they should name -> losses (N,) and their gradients (N, V).

    Computed in float32, the gradients given in the logits' dtype.
    """
    wide = logits.float()
    normalisers = wide.logsumexp(dim=-1, keepdim=True)
    is_token = torch.arange(wide.shape[1], device=wide.device) == tokens[:, None]
    losses = normalisers.squeeze(1) - wide.gather(1, tokens[:, None]).squeeze(1)
    return losses, ((wide - normalisers).exp() - is_token.float()).to(logits.dtype)


class _MeanOverRows(torch.autograd.Function):
    """The mean loss of rows of hidden states; see ``cross_entropy``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, errors_of_whole: Errors) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            of_chunk = errors_of_whole if start + CHUNK_ROWS <= len(hidden) else errors
            losses, error = of_chunk(functional.linear(hidden[rows], weight), tokens[rows])
            total += losses.sum()
            if gradient is not None:
                torch.mm(error, weight, out=gradient[rows])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # divided only here: the errors of a mean over many rows would be too small for half precision
        return gradient * (grad_outputs[0] / len(gradient)), None, None, None


def cross_entropy(hidden: Tensor, weight: Tensor, tokens: Tensor, errors_of_whole: Errors = errors) -> Tensor:
    """The mean cross-entropy, float32.

    Args:
        hidden: (N, H) states that predict.
        weight: (V, H) of the output layer; gets no gradient.
        tokens: (N,) what they should predict.
        errors_of_whole: ``errors`` of this module, perhaps compiled, for chunks of the one full size. The last chunk is
            of another size in every batch and never compiled.
    """
    loss: Tensor = _MeanOverRows.apply(hidden, weight, tokens, errors_of_whole)
    return loss
