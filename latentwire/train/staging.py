"""Tensors on their way between training and the disk: staged whole in host memory, or streamed through a small ring.

Staging is what training waits for. On a GPU the copies run on a stream of their own. With ``overlap``, what only
``optimizer.step()`` changes is copied while the next forward and backward pass run, and the optimizer's kernels wait
for it on the device; the rest is copied before the next kernel. The loop itself then waits for nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Collection, Iterator
from types import TracebackType

import torch
from torch import Tensor

from latentwire.checkpoint.layout import Snapshot
from latentwire.checkpoint.tensor_file import TensorSource, num_bytes_of
from latentwire.errors import CheckpointTorn

DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16", torch.int16: "I16",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.uint32: "U32", torch.int32: "I32", torch.float32: "F32",
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip

BLOCK_BYTES = 64 << 20
"""Staging memory comes in blocks of this size: torch rounds pinned memory up to a power of two."""
RING_BYTES = 32 << 20
"""A ring's block; each thread that streams has two."""


class SideStream:
    """Copies of one device, apart from its other work and after what was queued before. On a CPU: done at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.follow_training()

    def follow_training(self) -> None:
        """Copies that are queued from now on come after all that this thread has queued on the device."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy; neither side may be touched before ``wait``."""
        with torch.cuda.stream(self._stream):  # of None: does nothing
            target.copy_(source, non_blocking=True)

    def wait(self) -> None:
        """Block until all that was queued is copied."""
        if self._stream is not None:
            self._stream.synchronize()

    def hold_up_training(self) -> None:
        """The device runs nothing that this thread queues from now on before these copies are made."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


class Ring:
    """Blocks through which any number of bytes pass between a device and the threads that write or read files."""

    def __init__(self, block_bytes: int = RING_BYTES) -> None:
        self._block_bytes = block_bytes
        self._free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()

    def pieces(self, tensor: Tensor) -> Iterator[memoryview]:
        """The tensor's bytes; the next piece is copied while the caller has this one."""
        parts = as_bytes(tensor).split(self._block_bytes)
        with _Lane(self._free, self._block_bytes, tensor.device) as lane:
            lane.fetch(0, parts[0])
            for i, part in enumerate(parts):
                lane.side.wait()
                if i + 1 < len(parts):
                    lane.fetch(i + 1, parts[i + 1])
                yield memory_of(lane.block(i, part))

    def fill(self, tensor: Tensor) -> Iterator[memoryview]:
        """Places for the tensor's bytes; each is copied to the device while the caller fills the next."""
        parts = as_bytes(tensor).split(self._block_bytes)
        with _Lane(self._free, self._block_bytes, tensor.device) as lane:
            for i, part in enumerate(parts):
                yield memory_of(lane.block(i, part))
                lane.side.wait()  # the block that is filled next was on its way until now
                lane.side.copy(part, lane.block(i, part))


class _Lane:
    """Two of a ring's blocks, for one thread's one tensor. They go back when nothing is on its way any more."""

    def __init__(self, free: queue.SimpleQueue[Tensor], block_bytes: int, device: torch.device) -> None:
        self._free = free
        self._block_bytes = block_bytes
        self._pinned = device.type == "cuda"
        self.side = SideStream(device)

    def __enter__(self) -> _Lane:
        self._blocks = [self._take(), self._take()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.side.wait()  # whoever looked at the first piece only has the second still coming
        for block in self._blocks:
            self._free.put(block)

    def block(self, number: int, part: Tensor) -> Tensor:
        return self._blocks[number % 2][: part.numel()]

    def fetch(self, number: int, part: Tensor) -> None:
        self.side.copy(self.block(number, part), part)

    def _take(self) -> Tensor:
        with contextlib.suppress(queue.Empty):
            return self._free.get_nowait()
        return torch.empty(self._block_bytes, dtype=torch.uint8, pin_memory=self._pinned)


@dataclasses.dataclass(frozen=True)
class LiveTensor:
    """A tensor of the training itself: to be written or read where it is, while nobody changes it.

    Attributes:
        tensor: detached; on any device.
        ring: for those on a GPU.
        late: only ``optimizer.step()`` changes it.
    """

    tensor: Tensor
    ring: Ring
    late: bool = False

    @property
    def dtype(self) -> str:
        """See ``TensorSource``."""
        return DTYPES[self.tensor.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        """See ``TensorSource``."""
        return tuple(self.tensor.shape)

    def pieces(self) -> Iterator[memoryview]:
        """See ``TensorSource``."""
        if self.tensor.is_cuda:
            return self.ring.pieces(self.tensor)
        return iter([memory_of(as_bytes(self.tensor))])

    def fill(self) -> Iterator[memoryview]:
        """See ``Destination``. The tensor must be contiguous."""
        if self.tensor.is_cuda:
            return self.ring.fill(self.tensor)
        return iter([memory_of(as_bytes(self.tensor))])


@dataclasses.dataclass(frozen=True)
class StagedTensor:
    """A copy of a tensor in pieces of staging memory."""

    dtype: str
    shape: tuple[int, ...]
    views: tuple[memoryview, ...]

    def pieces(self) -> Iterator[memoryview]:
        """See ``TensorSource``."""
        return iter(self.views)


class Staging:
    """Host memory that one snapshot at a time is copied into, used again for the next. Pinned where there is a GPU.

    It takes as much memory as one snapshot has bytes, rounded up to a block of at most 64 MiB.

    Args:
        limit_bytes: it never takes more; what does not fit must be streamed.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._blocks: list[Tensor] = []
        self._reserving: threading.Thread | None = None
        self._copy: _Copy | None = None

    def reserve(self, num_bytes: int, pinned: bool) -> None:
        """Take memory in the background, before the first snapshot needs it. Pinning costs seconds for gigabytes."""
        if pinned and num_bytes <= self._limit_bytes:
            self._reserving = threading.Thread(target=self._try_to_grow, args=(num_bytes, pinned), daemon=True)
            self._reserving.start()

    def stage(self, snapshot: Snapshot, mine: Collection[tuple[str, str]], overlap: bool) -> Snapshot | None:
        """Copy the tensors that this rank writes; None where they do not fit into the limit.

        The snapshot before it must be written by now. With ``overlap`` this returns while a GPU still copies what
        only the optimizer changes: ``before_update`` must be called before it does.
        """
        live = [(group, name, snapshot.tensors[group][name]) for group, name in mine]
        num_bytes = sum(num_bytes_of(tensor) for *_, tensor in live)
        if num_bytes > self._limit_bytes:
            return None
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None
        self._grow(num_bytes, any(isinstance(tensor, LiveTensor) and tensor.tensor.is_cuda for *_, tensor in live))
        self._copy = copy = _Copy(self._blocks)
        staged = {group: dict(tensors) for group, tensors in snapshot.tensors.items()}
        for group, name, tensor in sorted(live, key=lambda entry: _is_late(entry[2])):
            assert isinstance(tensor, LiveTensor)
            staged[group][name] = copy.add(tensor)
        if not overlap:
            copy.settle()
        copy.hold_up_early()
        return dataclasses.replace(snapshot, tensors=staged, settle=copy.settle)

    def before_update(self) -> None:
        """The optimizer is about to change the parameters: its kernels shall come after the copies. Never blocks."""
        if self._copy is not None:
            self._copy.guard()

    def _try_to_grow(self, num_bytes: int, pinned: bool) -> None:
        with contextlib.suppress(RuntimeError, MemoryError):  # the first save meets it again, and tells
            self._grow(num_bytes, pinned)

    def _grow(self, num_bytes: int, pinned: bool) -> None:
        if pinned and self._blocks and not self._blocks[0].is_pinned():
            self._blocks = []
        missing = num_bytes - sum(block.numel() for block in self._blocks)
        while missing > 0:
            size = min(BLOCK_BYTES, 1 << (missing - 1).bit_length())
            self._blocks.append(torch.empty(size, dtype=torch.uint8, pin_memory=pinned))
            missing -= size


class _Copy:
    """One snapshot's copies: early ones first, then late ones; and whether these were still right when they were made.

    A late tensor that is written to before ``guard`` and before its copy is done would be torn. Autograd counts the
    writes to each tensor (``_version``): the count must be the same after the copies as before, or at the guard.
    """

    def __init__(self, blocks: list[Tensor]) -> None:
        self._blocks = iter(blocks)
        self._rest = torch.empty(0, dtype=torch.uint8)
        self._early: dict[torch.device, SideStream] = {}
        self._after: dict[torch.device, SideStream] = {}
        self._late: list[tuple[Tensor, int]] = []
        self._sources: list[Tensor] = []
        self._lock = threading.Lock()
        self._guarded = False
        self._torn = False

    def add(self, live: LiveTensor) -> StagedTensor:
        """Queue the copy of one tensor; the early ones come first."""
        device = live.tensor.device
        sides = self._after if live.late else self._early
        if device not in sides:
            sides[device] = SideStream(device)
        if live.late:
            self._late.append((live.tensor, live.tensor._version))
        source = as_bytes(live.tensor)
        self._sources.append(source)  # not to be freed before it is copied
        if not live.tensor.is_contiguous():
            sides[device].follow_training()  # the source is being made only now
        views = []
        for target, part in self._places(source):
            sides[device].copy(target, part)
            views.append(memory_of(target))
        return StagedTensor(live.dtype, live.shape, tuple(views))

    def hold_up_early(self) -> None:
        """All are queued: what anything may change is copied before training goes on."""
        for side in self._early.values():
            side.hold_up_training()

    def guard(self) -> None:
        """From here on the device's own order protects the copies."""
        with self._lock:
            if not self._guarded:
                self._guarded, self._torn = True, self._is_changed()
        for side in self._after.values():
            side.hold_up_training()

    def settle(self) -> None:
        """Block until all copies are made.

        Raises:
            CheckpointTorn: the loop wrote to a parameter before its copy was safe.
        """
        for side in (*self._early.values(), *self._after.values()):
            side.wait()
        with self._lock:
            if not self._guarded:
                self._guarded, self._torn = True, self._is_changed()
        self._sources.clear()
        self._late.clear()
        if self._torn:
            raise CheckpointTorn(
                "a parameter or an optimizer's state was changed outside of optimizer.step() while it was copied; "
                "the next save waits for its copy. Change parameters only in optimizer.step(), or set "
                "checkpoint.overlap to false"
            )

    def _places(self, source: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        while source.numel():
            if not self._rest.numel():
                self._rest = next(self._blocks)
            size = min(self._rest.numel(), source.numel())
            yield self._rest[:size], source[:size]
            self._rest, source = self._rest[size:], source[size:]

    def _is_changed(self) -> bool:
        return any(tensor._version != version for tensor, version in self._late)


def _is_late(tensor: TensorSource) -> bool:
    return isinstance(tensor, LiveTensor) and tensor.late


def as_bytes(tensor: Tensor) -> Tensor:
    """A tensor's bytes, flat; a view where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)


def memory_of(flat: Tensor) -> memoryview:
    """The memory of a flat CPU tensor of bytes."""
    view: memoryview = flat.numpy().data
    return view
