"""The CUDA streams on which a replica over several GPUs computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch


class SideStreams:
    """One stream on each GPU of a rank, for its micro-batches. Does nothing on a CPU or a single GPU.

    On the default streams a copy from GPU to GPU waits for all that either was given, and holds up what either is given
    later (CUDA C++ Programming Guide, "Peer-to-Peer Memory Copy"): models on different GPUs would take turns.

    Args:
        devices: of the replica.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        is_alone = len(devices) < 2 or devices[0].type != "cuda"
        self._streams = [] if is_alone else [torch.cuda.Stream(gpu) for gpu in devices]
        if self._streams:
            torch.cuda.empty_cache()  # what was kept for the default streams is of no use to these

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, GPUs compute on them, after all that was launched before; what is launched afterwards waits for them.

        The host waits for nothing.
        """
        with contextlib.ExitStack() as stack:
            for stream in reversed(self._streams):  # the first GPU stays the current one
                stream.wait_stream(torch.cuda.current_stream(stream.device))
                stack.enter_context(torch.cuda.stream(stream))
            yield
        for stream in self._streams:
            torch.cuda.current_stream(stream.device).wait_stream(stream)
