"""The CUDA streams on which a replica over several GPUs computes."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Sequence

import torch


class SideStreams:
    """Lanes of one stream on each GPU of a rank; micro-batches take them in turn. Nothing on a CPU or a single GPU.

    On the default streams a copy from GPU to GPU waits for all that either was given, and holds up what either is given
    later (CUDA C++ Programming Guide, "Peer-to-Peer Memory Copy"): models on different GPUs would take turns. On a lane
    of its own the next micro-batch begins where this one has left a GPU; only backward passes wait for each other,
    so that gradients are added in order. The host waits for nothing.

    Args:
        devices: of the replica, the one with the trained module first.
        in_flight: micro-batches at once, each with memory for its activations.
    """

    def __init__(self, devices: Sequence[torch.device], in_flight: int = 1) -> None:
        is_alone = len(devices) < 2 or devices[0].type != "cuda"
        lanes = [] if is_alone else [[torch.cuda.Stream(gpu) for gpu in devices] for _ in range(in_flight)]
        self._lanes = collections.deque(lanes)  # the next one first
        if lanes:
            torch.cuda.empty_cache()  # what was kept for the default streams is of no use to these

    @contextlib.contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Inside, GPUs compute on the next lane, after all that was launched outside before."""
        with contextlib.ExitStack() as stack:
            for stream in reversed(self._lanes[0] if self._lanes else []):  # the first GPU stays the current one
                stream.wait_stream(torch.cuda.current_stream(stream.device))
                stack.enter_context(torch.cuda.stream(stream))
            yield
        self._lanes.rotate(-1)

    def before_backward(self) -> None:
        """Within a micro-batch: what follows waits for all of the one before, whose sums it adds to."""
        if self._lanes:
            self._lanes[0][0].wait_stream(self._lanes[-1][0])

    def join(self) -> None:
        """What is launched afterwards, outside, waits for all micro-batches."""
        for stream in (stream for lane in self._lanes for stream in lane):
            torch.cuda.current_stream(stream.device).wait_stream(stream)


def let_go(tensor: torch.Tensor) -> None:
    """Before the last reference goes: another lane made it, and the present one still reads it."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
