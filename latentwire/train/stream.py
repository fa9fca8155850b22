"""Reading a stream by lanes, in the process or in DataLoader workers, always in the same order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, IterableDataset, default_collate

from latentwire.errors import WorkloadError
from latentwire.preemption.handler import ignore_signals
from latentwire.train import randomness
from latentwire.train.data import as_it_is
from latentwire.train.lanes import Lanes
from latentwire.train.order import derive_seed
from latentwire.workloads.base import ShardedSource

Collate = Callable[[list[Any]], Any]


class Cursor(NamedTuple):
    """Where a lane goes on: its epoch, the place in the list of its shards of that epoch, the offset in that shard."""

    epoch: int = 0
    place: int = 0
    offset: int = 0


class LaneReader:
    """Reads one lane forward from a cursor. Has no end.

    Attributes:
        cursor: where the lane goes on after what was taken.
    """

    def __init__(self, source: ShardedSource, lanes: Lanes, lane: int, cursor: Cursor) -> None:
        self.cursor = cursor
        self._source, self._lanes, self._lane = source, lanes, lane
        self._num_read = 0
        self._samples = self._forward()

    def take(self, wanted: range) -> list[Any]:
        """Samples by number, counted from the cursor that the reader began at; those before them are passed over.

        Raises:
            WorkloadError: no shard of the stream holds a sample, or the source's own.
        """
        # once for all: to keep the generators takes longer than to seed them
        with randomness.isolated(self._lanes.seed):
            for _ in range(wanted.start - self._num_read):
                next(self._samples)
            self._num_read = wanted.stop
            return [next(self._samples) for _ in wanted]

    def _forward(self) -> Iterator[Any]:
        epoch, place, offset = self.cursor
        empty: set[int] = set()
        while len(empty) < self._lanes.num_shards:
            shard = self._lanes.shard(self._lane, epoch, place)
            if shard is None:
                epoch, place = epoch + 1, 0
                continue
            if offset == 0:
                empty.add(shard)
            for sample, after in self._read(epoch, shard, offset):
                empty.discard(shard)
                self.cursor = Cursor(epoch, place, after)
                yield sample
            place, offset = place + 1, 0
        raise WorkloadError(f"none of the {len(empty)} shards holds a sample; the first is {self._source.shards[0]}")

    def _read(self, epoch: int, shard: int, offset: int) -> Iterator[tuple[Any, int]]:
        """The rest of a shard; what a sample draws at random depends on where it is, and on nothing before it."""
        rest = self._source.read(self._source.shards[shard], offset)
        while True:
            randomness.seed_everything(derive_seed(self._lanes.seed, "sample", epoch, shard, offset))
            found = next(rest, None)
            if found is None:
                return
            sample, offset = found[0], int(found[1])
            yield sample, offset


def read(
    source: ShardedSource,
    lanes: Lanes,
    cursors: Sequence[Cursor],
    spans: Sequence[range],
    collate: Collate | None,
    workers: int,
    prefetch: int,
) -> Iterator[tuple[Any, dict[int, Cursor]]]:
    """Batch after batch, each with where its lanes go on after it. Endless; blocks for each until it is there.

    Each worker has lanes of its own, so that nothing is read twice: more workers than a rank has lanes are not started.
    Where one lane serves several ranks, each of them reads all of it.

    Args:
        source: the stream.
        lanes: how it is divided.
        cursors: where each lane begins.
        spans: of the global batch, those that make up this rank's batches of each step.
        collate: samples -> batch; None: torch's default.
        workers: processes; 0 reads here. They ignore preemption signals and end with the iterator.
        prefetch: batches that each worker prepares ahead.
    """
    first_lanes = [next(lanes.parts(span))[0] for span in spans]
    owned = sorted(set(first_lanes))
    num_readers = min(max(1, workers), len(owned))
    turns = [owned.index(lane) % num_readers for lane in first_lanes]
    readers = []
    for number in range(num_readers):
        own = [span for span, turn in zip(spans, turns, strict=True) if turn == number]
        loader = DataLoader(
            _Batches(source, lanes, cursors, own, collate),
            batch_size=None,
            collate_fn=as_it_is,
            num_workers=min(1, workers),
            prefetch_factor=prefetch if workers else None,
            worker_init_fn=ignore_signals if workers else None,
        )
        readers.append(iter(loader))
    while turns:
        for turn in turns:
            yield next(readers[turn])


class _Batches(IterableDataset[Any]):
    """What one worker reads."""

    def __init__(
        self,
        source: ShardedSource,
        lanes: Lanes,
        cursors: Sequence[Cursor],
        spans: Sequence[range],
        collate: Collate | None,
    ) -> None:
        self._source, self._lanes, self._cursors, self._spans = source, lanes, cursors, spans
        self._collate = collate or default_collate

    def __iter__(self) -> Iterator[tuple[Any, Mapping[int, Cursor]]]:
        readers: dict[int, LaneReader] = {}
        for step in itertools.count():
            for span in self._spans:
                samples, after = [], {}
                for lane, wanted in self._lanes.parts(span):
                    if lane not in readers:
                        readers[lane] = LaneReader(self._source, self._lanes, lane, self._cursors[lane])
                    before = step * self._lanes.width
                    samples += readers[lane].take(range(before + wanted.start, before + wanted.stop))
                    after[lane] = readers[lane].cursor
                yield self._collated(samples, after), after

    def _collated(self, samples: list[Any], after: Mapping[int, Cursor]) -> Any:
        """What it draws at random depends on where the lanes are, and on nothing before that."""
        places = (number for lane, cursor in sorted(after.items()) for number in (lane, *cursor))
        with randomness.isolated(derive_seed(self._lanes.seed, "collate", *places)):
            return self._collate(samples)
