"""Micro-batches -> ranks -> canonical segments. Pure.

A global batch is M micro-batches. Rank r of D computes micro-batches [floor(M*r/D), floor(M*(r+1)/D)). The cut points
of all D from 1 to MAX_REPLICAS together divide 0..M into canonical segments, so that for every D each segment lies
within one rank. Gradients are accumulated within a segment in order, and the sums of the segments are added in the
order of the segments: the order of every addition is the same for any D, and so are the bits of the sum.
"""

from __future__ import annotations

import itertools

MAX_REPLICAS = 4


def micro_batches_of(rank: int, replicas: int, num_micro_batches: int) -> range:
    """The micro-batches that a rank computes, possibly none."""
    assert 0 <= rank < replicas <= MAX_REPLICAS
    return range(num_micro_batches * rank // replicas, num_micro_batches * (rank + 1) // replicas)


def segments(num_micro_batches: int) -> list[range]:
    """The canonical segments of a global batch, in order. M=8: 0-2, 2-4, 4-5, 5-6, 6-8."""
    cuts = {num_micro_batches * r // d for d in range(1, MAX_REPLICAS + 1) for r in range(d + 1)}
    ordered = sorted(cuts)
    return [range(a, b) for a, b in itertools.pairwise(ordered)]


def owner_of(segment: range, replicas: int, num_micro_batches: int) -> int:
    """The one rank that computes a segment."""
    return next(
        rank for rank in range(replicas) if segment.start in micro_batches_of(rank, replicas, num_micro_batches)
    )


def num_slots(replicas: int, num_micro_batches: int) -> int:
    """The most micro-batches that a rank has in a step: all ranks meet at so many safe points."""
    return max(len(micro_batches_of(rank, replicas, num_micro_batches)) for rank in range(replicas))
