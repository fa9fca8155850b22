"""From pairs of texts to batches of tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from latentwire.workloads.pair.data import Pair
from latentwire.workloads.pair.tokenizer import Script
from latentwire.workloads.pair.wire import PADDING

_FEWEST_TOKENS = 32


class TargetBatch(NamedTuple):
    """The targets of one batch in one model's tokens.

    Attributes:
        tokens: (B, T) token ids, padded on the right.
        rows: (N,) places of the tokens that belong to targets in the flattened (B * T). Known on the host, so that
            picking them out of the hidden states makes nobody wait for the device.
        labels: (N,) the tokens at these places.
    """

    tokens: Tensor
    rows: Tensor
    labels: Tensor


class PairBatch(NamedTuple):
    """One micro-batch: source bytes (B, S) padded with ``PADDING``, and the targets by model name."""

    source: Tensor
    targets: dict[str, TargetBatch]


@dataclasses.dataclass(frozen=True)
class Collator:
    """Turns pairs into a batch; holds tokenizers only, so that it can be pickled into DataLoader workers.

    Attributes:
        few_lengths: pad targets to a power of two, so that compiled layers meet few shapes.
    """

    scripts: Mapping[str, Script]
    max_target_tokens: int
    few_lengths: bool = False

    def __call__(self, samples: list[Pair]) -> PairBatch:
        """Pad the sources, tokenize and pad the targets. Returns CPU tensors."""
        source, _ = _pad([list(pair.source) for pair in samples], PADDING)
        return PairBatch(source, {name: self._targets(script, samples) for name, script in self.scripts.items()})

    def _targets(self, script: Script, samples: list[Pair]) -> TargetBatch:
        rows = script.targets([pair.target for pair in samples], self.max_target_tokens)
        tokens, is_target = _pad(rows, script.pad_id, self._length(max(map(len, rows))))
        places = is_target.flatten().nonzero().squeeze(1)
        return TargetBatch(tokens, places, tokens.flatten()[places])

    def _length(self, longest: int) -> int:
        if not self.few_lengths:
            return longest
        return min(self.max_target_tokens, max(_FEWEST_TOKENS, 1 << (longest - 1).bit_length()))


def _pad(rows: list[list[int]], value: int, length: int = 0) -> tuple[Tensor, Tensor]:
    """Lists -> (B, longest or ``length``) padded on the right, and the mask of what is not padding."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(max(length, int(lengths.max())))[None] < lengths[:, None]
    padded = torch.full(mask.shape, value)
    padded[mask] = torch.tensor([item for row in rows for item in row])
    return padded, mask
