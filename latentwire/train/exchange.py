"""How the sums of several ranks become one total: by copies and ordered additions, or by an all-reduce."""

from __future__ import annotations

import abc
import dataclasses

import torch
from torch import Tensor

from latentwire.elastic import schedule
from latentwire.train.ranks import Ranks, Work
from latentwire.train.side_streams import let_go

Sums = dict[range, Tensor]
"""By the micro-batches whose gradients they are the sum of: rows of float32 numbers."""


@dataclasses.dataclass(frozen=True)
class UnderWay:
    """A collective that was begun; ``tensor`` holds its result when ``work`` is done. None: it is there."""

    work: Work | None
    tensor: Tensor


class Exchange(abc.ABC):
    """Called by every rank with rows of the same length, in the same order."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def padded(self, numel: int) -> int:
        """The length of a row that holds so many numbers."""
        return numel

    def fold(self, sums: Sums) -> None:  # noqa: B027
        """Add up what has its place in the order already."""

    @abc.abstractmethod
    def launch(self, sums: Sums, numel: int, device: torch.device) -> UnderWay:
        """Send this rank's sums off. Does not block."""

    def add_up(self, sent: UnderWay) -> UnderWay:
        """From all ranks' sums to the total, which is sent off in turn."""
        return sent

    def wait(self, under_way: UnderWay) -> Tensor:
        """The result; a GPU's stream waits for it, not the host."""
        if under_way.work is not None:
            self._ranks.wait(under_way.work)
        return under_way.tensor


class ExactExchange(Exchange):
    """The canonical sum. With one rank nothing travels, and the order of the additions is the same."""

    def __init__(self, ranks: Ranks, num_micro_batches: int) -> None:
        super().__init__(ranks)
        whole = schedule.canonical_sum(num_micro_batches)
        size = ranks.world_size
        self._blocks = [whole.blocks_of(rank, size, num_micro_batches) for rank in range(size)]
        self._additions = list(whole.additions())
        self._whole = whole.span

    def padded(self, numel: int) -> int:
        """Divisible among the ranks."""
        return -(-numel // self._ranks.world_size) * self._ranks.world_size

    def fold(self, sums: Sums) -> None:
        """Add neighbours of which the canonical order adds just these two."""
        for left, right in self._additions:
            if left in sums and right in sums:
                added = sums.pop(right)
                sums[range(left.start, right.stop)] = sums.pop(left).add_(added)
                let_go(added)

    def launch(self, sums: Sums, numel: int, device: torch.device) -> UnderWay:
        """To each rank its part of all blocks: an all-to-all."""
        size, mine = self._ranks.world_size, self._blocks[self._ranks.rank]
        assert list(sums) == mine, "fold() leaves the rank's blocks, in order"
        if size == 1:
            return UnderWay(None, sums[self._whole])
        part = numel // size
        sent = torch.stack([*sums.values()]) if mine else torch.empty(0, numel, device=device)
        sent = sent.view(len(mine), size, part).transpose(0, 1).contiguous()
        received = torch.empty(sum(map(len, self._blocks)), part, device=device)
        splits = [len(blocks) for blocks in self._blocks]
        work = self._ranks.all_to_all(received, sent.view(-1, part), splits, [len(mine)] * size)
        return UnderWay(work, received)

    def add_up(self, sent: UnderWay) -> UnderWay:
        """Add the blocks of this rank's part, and hand the total round: an all-gather."""
        received = self.wait(sent)
        if self._ranks.world_size == 1:
            return sent
        blocks = [block for blocks in self._blocks for block in blocks]
        sums = dict(zip(blocks, received.unbind(), strict=True))
        self.fold(sums)
        total = torch.empty(self._ranks.world_size * received.shape[1], device=received.device)
        return UnderWay(self._ranks.all_gather(total, sums[self._whole]), total)


class PlainExchange(Exchange):
    """One all-reduce: less to remember, and the order of the additions is the network library's."""

    def __init__(self, ranks: Ranks, mine: range) -> None:
        super().__init__(ranks)
        self._mine = mine

    def launch(self, sums: Sums, numel: int, device: torch.device) -> UnderWay:
        """All at once; a rank without micro-batches adds nothing."""
        total = sums[self._mine] if self._mine else torch.zeros(numel, device=device)
        return UnderWay(self._ranks.all_reduce(total), total)
