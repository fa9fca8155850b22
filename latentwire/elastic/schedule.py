"""Micro-batches -> ranks -> canonical segments -> one sum. Pure.

A global batch is M micro-batches. Rank r of D computes micro-batches [floor(M*r/D), floor(M*(r+1)/D)). The cut points
of all D from 1 to MAX_REPLICAS together divide 0..M into canonical segments, so that for every D each segment lies
within one rank. Gradients are accumulated within a segment in order. The segments of a quarter of the batch are added
in order, then the quarters of each half, then the halves. So the order of every addition is the same for any D, and so
are the bits of the sum; and because quarters and halves are what 4 and 2 ranks compute, each of them has one block to
hand on: an exchange costs what a ring all-reduce does. Of 3 ranks each has at most two.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

MAX_REPLICAS = 4


def micro_batches_of(rank: int, replicas: int, num_micro_batches: int) -> range:
    """The micro-batches that a rank computes, possibly none."""
    assert 0 <= rank < replicas <= MAX_REPLICAS
    return range(num_micro_batches * rank // replicas, num_micro_batches * (rank + 1) // replicas)


def num_slots(replicas: int, num_micro_batches: int) -> int:
    """The most micro-batches that a rank has in a step: all ranks meet at so many safe points."""
    return max(len(micro_batches_of(rank, replicas, num_micro_batches)) for rank in range(replicas))


def segments(num_micro_batches: int) -> list[range]:
    """The canonical segments of a global batch, in order. M=8: 0-2, 2-4, 4-5, 5-6, 6-8."""
    cuts = {num_micro_batches * r // d for d in range(1, MAX_REPLICAS + 1) for r in range(d + 1)}
    return [range(a, b) for a, b in itertools.pairwise(sorted(cuts))]


@dataclasses.dataclass(frozen=True)
class Sum:
    """A node of the canonical sum: the gradient of ``span``, as ``left`` + ``right``, or one segment's own.

    M=8: ((0-2 + 2-4) + ((4-5 + 5-6) + 6-8)).
    """

    span: range
    left: Sum | None = None
    right: Sum | None = None

    def blocks_of(self, rank: int, replicas: int, num_micro_batches: int) -> list[range]:
        """The spans that a rank sums up by itself and hands on: the largest nodes that lie within it, in order."""
        mine = micro_batches_of(rank, replicas, num_micro_batches)
        if mine.start <= self.span.start and self.span.stop <= mine.stop:
            return [self.span]
        if self.left is None or self.right is None:
            return []
        return [
            block for child in (self.left, self.right) for block in child.blocks_of(rank, replicas, num_micro_batches)
        ]

    def additions(self) -> Iterator[tuple[range, range]]:
        """Every addition, (left span, right span), children before their parents."""
        if self.left is not None and self.right is not None:
            yield from self.left.additions()
            yield from self.right.additions()
            yield self.left.span, self.right.span


def canonical_sum(num_micro_batches: int) -> Sum:
    """The one order in which the gradients of a global batch are added, whatever the number of ranks."""
    parts = [Sum(segment) for segment in segments(num_micro_batches)]
    for divisor in (4, 2, 1):  # the segments of each quarter, the quarters of each half, the halves
        cuts = [num_micro_batches * i // divisor for i in range(divisor + 1)]
        groups = [[p for p in parts if a <= p.span.start < b] for a, b in itertools.pairwise(cuts)]
        parts = [_in_order(group) for group in groups if group]
    (whole,) = parts
    return whole


def _in_order(parts: list[Sum]) -> Sum:
    total = parts[0]
    for part in parts[1:]:
        total = Sum(range(total.span.start, part.span.stop), total, part)
    return total
