"""A model of PyTorch's allocator for GPUs, fed by what operations on fake tensors would make: peaks without a GPU.

The rules are those of ``c10/cuda/CUDACachingAllocator.cpp`` (torch 2.13), for one stream and default settings: sizes
are rounded to 512 bytes; up to 1 MiB is cut out of segments of 2 MiB, less than 10 MiB out of segments of 20 MiB, and
more has a segment of its own, of whole 2 MiB. The smallest free block that is large enough is taken, and split where
the rest is worth it; free neighbours within a segment become one. Segments stay: their sum is what the driver counts.
"""

from __future__ import annotations

import bisect
import dataclasses
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 1 << 20
SMALLEST, SMALL, MEDIUM, WHOLE = 512, MIB, 10 * MIB, 2 * MIB


@dataclasses.dataclass(eq=False)
class Block:
    """A piece of a segment, between its neighbours there."""

    size: int
    is_small: bool
    is_free: bool = True
    before: Block | None = None
    after: Block | None = None


class CachingAllocator:
    """Counts bytes: ``allocated`` by tensors, ``reserved`` in segments."""

    def __init__(self) -> None:
        self.allocated = 0
        self.reserved = 0
        self._free: dict[bool, list[Block]] = {True: [], False: []}

    def allocate(self, num_bytes: int) -> Block:
        """A block for so many bytes, of the cache or of a new segment."""
        size = max(SMALLEST, _up(num_bytes, SMALLEST))
        block = self._cached(size) or self._segment(size)
        rest = block.size - size
        if rest >= (SMALLEST if block.is_small else SMALL + 1):
            behind = Block(rest, block.is_small, before=block, after=block.after)
            if behind.after:
                behind.after.before = behind
            block.size, block.after = size, behind
            self._keep(behind)
        block.is_free = False
        self.allocated += block.size
        return block

    def release(self, block: Block) -> None:
        """It goes to the cache, with its free neighbours."""
        self.allocated -= block.size
        for other in (block.before, block.after):
            if other and other.is_free:
                self._free[other.is_small].remove(other)
                block.size += other.size
        if block.before and block.before.is_free:
            block.before = block.before.before
        if block.after and block.after.is_free:
            block.after = block.after.after
        if block.before:
            block.before.after = block
        if block.after:
            block.after.before = block
        self._keep(block)

    def _cached(self, size: int) -> Block | None:
        free = self._free[size <= SMALL]
        place = bisect.bisect_left(free, size, key=lambda block: block.size)
        return free.pop(place) if place < len(free) else None

    def _segment(self, size: int) -> Block:
        is_small = size <= SMALL
        whole = WHOLE if is_small else 2 * MEDIUM if size < MEDIUM else _up(size, WHOLE)
        self.reserved += whole
        return Block(whole, is_small)

    def _keep(self, block: Block) -> None:
        block.is_free = True
        bisect.insort(self._free[block.is_small], block, key=lambda block: block.size)


class Traced(TorchDispatchMode):
    """While it is entered, an allocator holds every storage that an operation makes, for as long as it lives."""

    def __init__(self, allocator: CachingAllocator) -> None:
        super().__init__()
        self._allocator = allocator
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; what it returns may have storages that were not there before."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        if storage.nbytes() and storage not in self._known:
            self._known.add(storage)
            weakref.finalize(storage, self._allocator.release, self._allocator.allocate(storage.nbytes()))


def _up(size: int, to: int) -> int:
    return -(-size // to) * to
