"""The ranks of an attempt: how they agree, and how their gradients travel.

They agree over gloo on the CPU. Gradients have a group of their own, NCCL's between GPUs: so what a backward pass has
sent off never stands in the way of a safe point.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from latentwire.train.memory import is_out_of_memory
from latentwire.train.watch import Standing

MEET_WITHIN = datetime.timedelta(minutes=10)
"""From the first rank to the last; torch may take minutes to come from a network file system."""

_AFTER_THE_AGENT_S = 60.0
"""By so much later than the agent gloo and NCCL give a rank up: they cannot say which one it is."""

Work: TypeAlias = Any
"""What torch.distributed returns of a collective that goes on by itself."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among the ranks. With one rank every call returns at once.

    Attributes:
        device: where this one computes.
        gradients: the process group of ``all_to_all``, ``all_gather`` and ``all_reduce``, which only begin.
        standing: what the watchdog looks at.
    """

    rank: int = 0
    world_size: int = 1
    gradients: Any = None
    standing: Standing = dataclasses.field(default_factory=Standing)
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def connect(cls, device: torch.device, timeout_s: float, standing: Standing) -> Ranks:
        """Join the others as RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say. Blocks until all came.

        Args:
            device: where this rank computes, and on a GPU the one that no other rank has.
            timeout_s: after so long the agent ends an attempt whose ranks wait for one of them.
            standing: where this rank notes that it waits.

        Raises:
            ConnectionError: they did not meet; so do all collectives where a rank is lost.
        """
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            return cls(rank, size, None, standing, device)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = datetime.timedelta(seconds=timeout_s + _AFTER_THE_AGENT_S)
        where = f"did not meet at {address}:{port}; where nodes have several networks, GLOO_SOCKET_IFNAME and "
        with _together(standing, where + "NCCL_SOCKET_IFNAME name the interface that joins them"):
            store = dist.TCPStore(address, port, size, rank == 0, timeout=MEET_WITHIN)  # type: ignore[attr-defined]
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
            gradients = dist.new_group(backend="nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        return cls(rank, size, gradients, standing, device)

    def disconnect(self) -> None:
        """Leave the group. Not collective."""
        if self.world_size > 1:
            dist.destroy_process_group()

    def highest(self, values: list[float]) -> list[float]:
        """The highest of each value over all ranks. Collective: every rank calls it at the same place."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        with _together(self.standing):
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks of a CPU tensor. Collective. Exact where each item is non-zero on one rank only."""
        if self.world_size > 1:
            with _together(self.standing):
                dist.all_reduce(values, op=dist.ReduceOp.SUM)
        return values

    # --- gradients ----------------------------------------------------------------------------------------------------

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor, from_each: list[int], to_each: list[int]) -> Work:
        """Begin to send so many rows of ``sent`` to each rank and to receive so many from each. Collective."""
        with _together(self.standing):
            return dist.all_to_all_single(received, sent, from_each, to_each, group=self.gradients, async_op=True)

    def all_gather(self, gathered: torch.Tensor, mine: torch.Tensor) -> Work:
        """Begin to set all ranks' parts side by side. Collective."""
        with _together(self.standing):
            return dist.all_gather(list(gathered.chunk(self.world_size)), mine, group=self.gradients, async_op=True)

    def all_reduce(self, tensor: torch.Tensor) -> Work | None:
        """Begin to add up all ranks' tensors in place. Collective."""
        if self.world_size == 1:
            return None
        with _together(self.standing):
            return dist.all_reduce(tensor, group=self.gradients, async_op=True)

    def wait(self, work: Work) -> None:
        """Until it is done; between GPUs the stream waits and the host goes on."""
        with _together(self.standing):
            work.wait()

    def wait_for_gpu(self, device: torch.device) -> None:
        """The host too, until a GPU has all gradients: else a missing rank is felt wherever a figure is read next."""
        if self.world_size > 1 and device.type == "cuda":
            with self.standing.waiting():
                torch.cuda.current_stream(device).synchronize()


@contextlib.contextmanager
def _together(standing: Standing, failed: str = "lost each other") -> Iterator[None]:
    """In a collective. Gloo tells of a broken connection by a bare RuntimeError, which could be anything."""
    try:
        with standing.waiting():
            yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise ConnectionError(f"the ranks {failed}: {error}") from error
