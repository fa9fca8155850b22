"""Fetching samples by address, in the process or in DataLoader workers, always in the same order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from latentwire.preemption.handler import ignore_signals
from latentwire.train import randomness
from latentwire.train.order import derive_seed

Address = tuple[int, int]


class AddressedDataset(Dataset[Any]):
    """A map-style data set whose items are asked for by (epoch, index), with generators seeded by just that."""

    def __init__(self, data: Sequence[Any], seed: int) -> None:
        self._data = data
        self._seed = seed

    def __getitem__(self, address: Address) -> Any:
        epoch, index = address
        with randomness.isolated(derive_seed(self._seed, "sample", epoch, index)):
            return self._data[index]


def fetch(
    data: Sequence[Any],
    seed: int,
    batches: Iterable[list[Address]],
    collate: Callable[[list[Any]], Any] | None,
    workers: int,
    prefetch: int,
) -> Iterator[Any]:
    """Batches in the order of ``batches``. Blocks for each until it is there.

    Args:
        data: map-style.
        seed: the run's, for what a sample draws at random.
        batches: the addresses of each batch; may be endless.
        collate: samples -> batch; None: torch's default.
        workers: processes; 0 fetches here. They ignore preemption signals and end with the iterator.
        prefetch: batches that each worker prepares ahead.
    """
    return iter(
        DataLoader(
            AddressedDataset(data, seed),
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            worker_init_fn=ignore_signals if workers else None,
        )
    )
