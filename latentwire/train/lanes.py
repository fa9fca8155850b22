"""How a stream is divided: shards -> lanes -> the places of a global batch. Pure.

A stream is read forward, in shards. It is divided into lanes, by which a step's samples are known without a rank: each
lane gives the same number of consecutive samples to every global batch, lane 0 the first ones. In each epoch the shards
are permuted and dealt out in turn, so that no two lanes read one shard. A lane begins its own next epoch when its
shards of this one are used up; lanes with fewer samples are some epochs ahead of the others.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

from latentwire.train.order import SampleOrder, derive_seed


def num_lanes(num_micro_batches: int, num_shards: int) -> int:
    """One for each micro-batch, or with too few shards the most that divide the micro-batches evenly."""
    return max(n for n in range(1, num_micro_batches + 1) if num_micro_batches % n == 0 and n <= num_shards)


@dataclasses.dataclass(frozen=True)
class Lanes:
    """The lanes of a run, of fixed number for its whole life.

    Attributes:
        seed: the run's.
        num_shards: of the stream.
        num_lanes: at most ``num_shards``; divides ``global_batch``.
        global_batch: samples of one step over all ranks.
    """

    seed: int
    num_shards: int
    num_lanes: int
    global_batch: int

    def __post_init__(self) -> None:
        assert 0 < self.num_lanes <= self.num_shards
        assert self.global_batch % self.num_lanes == 0

    @property
    def width(self) -> int:
        """Samples that each lane gives to every step."""
        return self.global_batch // self.num_lanes

    def shard(self, lane: int, epoch: int, place: int) -> int | None:
        """The shard that a lane reads at that place of its epoch; None: its epoch is over."""
        position = lane + place * self.num_lanes
        if position >= self.num_shards:
            return None
        return self._order.address(epoch * self.num_shards + position)[1]

    def parts(self, span: range) -> Iterator[tuple[int, range]]:
        """A span of a global batch as (lane, which of the samples that it gives to the step), in order."""
        first = span.start
        while first < span.stop:
            lane, start = divmod(first, self.width)
            stop = min(self.width, start + span.stop - first)
            yield lane, range(start, stop)
            first += stop - start

    @functools.cached_property
    def _order(self) -> SampleOrder:
        return SampleOrder(derive_seed(self.seed, "shards"), self.num_shards)
