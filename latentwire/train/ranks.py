"""The ranks of an attempt and how they agree: over gloo on the CPU, apart from any traffic of the GPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

MEET_WITHIN = datetime.timedelta(minutes=10)
"""From the first rank to the last; torch may take minutes to come from a network file system."""
TIMEOUT = datetime.timedelta(minutes=30)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among the ranks. With one rank every call returns at once."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def connect(cls) -> Ranks:
        """Join the others as RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT say. Blocks until all came.

        Raises:
            ConnectionError: they did not meet; so do all collectives where a rank is lost.
        """
        ranks = cls(*(int(os.environ.get(key, d)) for key, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))
        rank, size = ranks.rank, ranks.world_size
        if size > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            with _lost_ranks_are_a_network_failure():
                store = dist.TCPStore(address, port, size, rank == 0, timeout=MEET_WITHIN)  # type: ignore[attr-defined]
                dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        return ranks

    def disconnect(self) -> None:
        """Leave the group. Not collective."""
        if self.world_size > 1:
            dist.destroy_process_group()

    def highest(self, values: list[float]) -> list[float]:
        """The highest of each value over all ranks. Collective: every rank calls it at the same place."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        with _lost_ranks_are_a_network_failure():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks of a CPU tensor. Collective. Exact where each item is non-zero on one rank only."""
        if self.world_size > 1:
            with _lost_ranks_are_a_network_failure():
                dist.all_reduce(values, op=dist.ReduceOp.SUM)
        return values

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Overwrite the tensor with the source rank's. Collective."""
        if self.world_size > 1:
            with _lost_ranks_are_a_network_failure():
                dist.broadcast(tensor, src=source)


@contextlib.contextmanager
def _lost_ranks_are_a_network_failure() -> Iterator[None]:
    """Gloo tells of a broken connection by a bare RuntimeError, which could be anything."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(f"the ranks lost each other: {error}") from error
