"""Tensors on their way between training and the disk: staged whole in host memory, or streamed through a small ring.

Staging is what training waits for. On a GPU the copies run on a stream of their own: what only ``optimizer.step()``
changes is copied while the next forward and backward pass run, and the optimizer's kernels wait for it on the device;
the rest is copied before the next kernel. The loop itself waits for nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Collection, Iterator

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


class Ring:
    """Pinned blocks through which any number of bytes pass between a GPU and the threads that write or read files."""

    def __init__(self) -> None:
        self._free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()

    def pieces(self, tensor: Tensor) -> Iterator[memoryview]:
        """The tensor's bytes; the next piece is copied while the caller has this one."""
        parts = [part for part in as_bytes(tensor).split(RING_BYTES) if part.numel()]
        stream = torch.cuda.Stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with self._two_blocks() as blocks, torch.cuda.stream(stream):
            for i, part in enumerate(parts):
                if i == 0:
                    blocks[0][: part.numel()].copy_(part, non_blocking=True)
                stream.synchronize()
                if i + 1 < len(parts):
                    blocks[(i + 1) % 2][: parts[i + 1].numel()].copy_(parts[i + 1], non_blocking=True)
                yield memory_of(blocks[i % 2][: part.numel()])

    def fill(self, tensor: Tensor) -> Iterator[memoryview]:
        """Places for the tensor's bytes; each is copied to the GPU while the caller fills the next."""
        parts = [part for part in as_bytes(tensor).split(RING_BYTES) if part.numel()]
        stream = torch.cuda.Stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with self._two_blocks() as blocks, torch.cuda.stream(stream):
            for i, part in enumerate(parts):
                yield memory_of(blocks[i % 2][: part.numel()])
                stream.synchronize()  # the block that is filled next was on its way until now
                part.copy_(blocks[i % 2][: part.numel()], non_blocking=True)
            stream.synchronize()

    @contextlib.contextmanager
    def _two_blocks(self) -> Iterator[list[Tensor]]:
        blocks = [self._take(), self._take()]
        try:
            yield blocks
        finally:
            for block in blocks:
                self._free.put(block)

    def _take(self) -> Tensor:
        try:
            return self._free.get_nowait()
        except queue.Empty:
            return torch.empty(RING_BYTES, dtype=torch.uint8, pin_memory=True)


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
            yield from self.ring.pieces(self.tensor)
        else:
            yield memory_of(as_bytes(self.tensor))

    def fill(self) -> Iterator[memoryview]:
        """See ``Destination``. The tensor must be contiguous."""
        if self.tensor.is_cuda:
            yield from self.ring.fill(self.tensor)
        else:
            yield memory_of(as_bytes(self.tensor))


@dataclasses.dataclass(frozen=True)
class StagedTensor:
    """A copy of a tensor in pieces of staging memory."""

    dtype: str
    shape: tuple[int, ...]
    views: tuple[memoryview, ...]

    def pieces(self) -> Iterator[memoryview]:
        """See ``TensorSource``."""
        yield from self.views


class Staging:
    """Host memory that one snapshot at a time is copied into, used again for the next. Pinned where there is a GPU.

    It takes as much memory as one snapshot has bytes, rounded up to blocks of 64 MiB.

    Args:
        limit_bytes: it never takes more; what does not fit must be streamed.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._blocks: list[Tensor] = []
        self._reserving: threading.Thread | None = None
        self._copy: _Copy | None = None

    def reserve(self, num_bytes: int, pinned: bool) -> None:
        """Take memory in the background, before the first snapshot needs it. Pinning costs seconds for gigabytes."""
        if num_bytes <= self.limit_bytes:
            self._reserving = threading.Thread(target=self._grow, args=(num_bytes, pinned), daemon=True)
            self._reserving.start()

    def stage(self, snapshot: Snapshot, mine: Collection[tuple[str, str]], overlap: bool) -> Snapshot | None:
        """Copy the tensors that this rank writes; None where they do not fit into the limit.

        The snapshot before it must be written by now. With ``overlap`` this returns while a GPU still copies what
        only the optimizer changes: ``before_update`` must be called before it does.
        """
        live = [(group, name, snapshot.tensors[group][name]) for group, name in mine]
        num_bytes = sum(num_bytes_of(tensor) for *_, tensor in live)
        if num_bytes > self.limit_bytes:
            return None
        pinned = any(isinstance(tensor, LiveTensor) and tensor.tensor.is_cuda for *_, tensor in live)
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None
        self._grow(num_bytes, pinned)
        copy = _Copy(self._blocks)
        staged = {group: dict(tensors) for group, tensors in snapshot.tensors.items()}
        for group, name, tensor in sorted(live, key=lambda entry: _is_late(entry[2])):
            assert isinstance(tensor, LiveTensor)
            staged[group][name] = copy.add(tensor)
        copy.started()
        if not overlap:
            copy.settle()
        self._copy = copy
        return dataclasses.replace(snapshot, tensors=staged, settle=copy.settle)

    def before_update(self) -> None:
        """The optimizer is about to change the parameters: its kernels shall come after the copies. Never blocks."""
        if self._copy is not None:
            self._copy.guard()

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
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._done: list[torch.cuda.Event] = []
        self._late: list[tuple[Tensor, int]] = []
        self._sources: list[Tensor] = []
        self._lock = threading.Lock()
        self._guarded = False
        self._torn = False

    def add(self, live: LiveTensor) -> StagedTensor:
        if live.late and live.tensor.is_cuda:
            if not self._late:
                self._hold_up_training()
            self._late.append((live.tensor, live.tensor._version))
        views = []
        with self._side_stream(live.tensor.device):
            source = as_bytes(live.tensor)
            self._sources.append(source)  # not to be freed before it is copied
            for target, part in self._places(source):
                target.copy_(part, non_blocking=True)
                views.append(memory_of(target))
        return StagedTensor(live.dtype, live.shape, tuple(views))

    def started(self) -> None:
        """All copies are queued."""
        if not self._late:
            self._hold_up_training()
        self._done = [stream.record_event() for stream in self._streams.values()]

    def guard(self) -> None:
        """From here on the GPU's own order protects the copies."""
        with self._lock:
            if self._guarded:
                return
            self._guarded, self._torn = True, self._is_changed()
        for device, event in zip(self._streams, self._done, strict=True):
            torch.cuda.current_stream(device).wait_event(event)

    def settle(self) -> None:
        """Block until all copies are made.

        Raises:
            CheckpointTorn: the loop wrote to a parameter before its copy was safe.
        """
        for event in self._done:
            event.synchronize()
        with self._lock:
            torn = self._torn if self._guarded else self._is_changed()
            self._guarded = True
        self._sources.clear()
        if torn:
            raise CheckpointTorn(
                "a parameter or an optimizer's state was changed outside of optimizer.step() while it was copied; "
                "the next save waits for its copy. Change parameters only in optimizer.step(), or set "
                "checkpoint.overlap to false"
            )

    def _side_stream(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        if device.type != "cuda":
            return contextlib.nullcontext()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
            self._streams[device].wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(self._streams[device])

    def _places(self, source: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        while source.numel():
            if not self._rest.numel():
                self._rest = next(self._blocks)
            size = min(self._rest.numel(), source.numel())
            yield self._rest[:size], source[:size]
            self._rest, source = self._rest[size:], source[size:]

    def _hold_up_training(self) -> None:
        """No kernel of the training runs before what was queued so far is copied."""
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)

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
