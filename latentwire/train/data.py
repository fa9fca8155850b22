"""Fetching samples by address, in the process or in DataLoader workers, always in the same order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset, default_collate

from latentwire.preemption.handler import ignore_signals
from latentwire.train import randomness
from latentwire.train.order import derive_seed

Address = tuple[int, int]


class Batches(Dataset[Any]):
    """A map-style data set of batches, each asked for by the (epoch, index) of its samples.

    Generators are seeded by the address before each sample, and by that of the first before they become a batch.
    """

    def __init__(self, data: Sequence[Any], seed: int, collate: Callable[[list[Any]], Any] | None) -> None:
        self._data = data
        self._seed = seed
        self._collate = collate or default_collate

    def __getitem__(self, addresses: list[Address]) -> Any:
        samples = []
        with randomness.isolated(self._seed):  # once: to keep the generators takes longer than to seed them
            for epoch, index in addresses:
                randomness.seed_everything(derive_seed(self._seed, "sample", epoch, index))
                samples.append(self._data[index])
            randomness.seed_everything(derive_seed(self._seed, "collate", *addresses[0]))
            return self._collate(samples)


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
        seed: the run's, for what a sample or ``collate`` draws at random.
        batches: the addresses of each batch; may be endless.
        collate: samples -> batch; None: torch's default.
        workers: processes; 0 fetches here. They ignore preemption signals and end with the iterator.
        prefetch: batches that each worker prepares ahead.
    """
    return iter(
        DataLoader(
            Batches(data, seed, collate),
            sampler=batches,
            batch_size=None,
            collate_fn=as_it_is,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            worker_init_fn=ignore_signals if workers else None,
        )
    )


def as_it_is(batch: Any) -> Any:
    """For a DataLoader whose data set makes the batches."""
    return batch
