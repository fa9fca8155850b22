"""Where a rank's batches come from, and how far they have come: from map-style data, or from a stream."""

from __future__ import annotations

import abc
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import torch
from torch.utils.data import default_collate

from latentwire.config import Config
from latentwire.elastic import schedule
from latentwire.errors import CheckpointMismatch, ConfigError, WorkloadError
from latentwire.train import data as data_module
from latentwire.train import stream
from latentwire.train.lanes import Lanes, num_lanes
from latentwire.train.order import SampleOrder
from latentwire.train.ranks import Ranks
from latentwire.train.stream import Cursor, LaneReader
from latentwire.workloads.base import ShardedSource

Data = Sequence[Any] | ShardedSource
Collate = Callable[[list[Any]], Any]


def num_samples(data: Data) -> int | None:
    """How many there are; None: a stream does not know.

    Raises:
        WorkloadError: there are none, or they have no addresses.
    """
    if isinstance(data, ShardedSource):
        if not data.shards:
            raise WorkloadError("the training data has no shards: look at what it is made from")
        return None
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise WorkloadError(
            f"{type(data).__name__} has neither len() and [index], as a map-style data set, nor shards and read(), as "
            "latentwire.ShardedSource: only where a sample has an address does a restart find the next one"
        )
    if not len(data):
        raise WorkloadError("the training data has no samples: look at what it is made from")
    return len(data)


def first_samples(data: Data, seed: int, count: int) -> list[Any]:
    """So many from the beginning; from map-style data at most all, from a stream the same ones again."""
    if isinstance(data, ShardedSource):
        return LaneReader(data, Lanes(seed, len(data.shards), 1, 1), 0, Cursor()).take(range(count))
    return [data[index] for index in range(min(len(data), count))]


class Feed(abc.ABC):
    """This rank's batches of every step. Made by ``Feeds.add``.

    Attributes:
        num_samples: of the data; None: a stream does not know.
        num_micro_batches: of a step, over all ranks.
        micro_batch: samples of one.
        mine: the micro-batches of each step that are this rank's.
    """

    num_samples: int | None = None

    def __init__(
        self, config: Config, ranks: Ranks, global_batch: int, micro_batch: int, collate: Collate | None
    ) -> None:
        for size in (global_batch, micro_batch):
            if not isinstance(size, int | numpy.integer) or size < 1:
                raise ConfigError(f"a batch of {size!r} samples: give a whole number, 1 or more")
        if global_batch % micro_batch:
            raise ConfigError(f"global_batch ({global_batch}) is no multiple of micro_batch ({micro_batch})")
        self.num_micro_batches = global_batch // micro_batch
        self.micro_batch = micro_batch
        self.mine = schedule.micro_batches_of(ranks.rank, ranks.world_size, self.num_micro_batches)
        self._config, self._ranks, self._collate = config, ranks, collate

    @abc.abstractmethod
    def batches(self, step: int) -> Iterator[Any]:
        """This rank's batches in order, from the beginning of a step on; has no end. Collective."""

    @abc.abstractmethod
    def first_batches(self, count: int) -> Iterator[Any]:
        """The first samples, so many times, for a pass that is thrown away. Changes nothing; any rank."""

    def cursor(self, step: int) -> Any:
        """What says in a checkpoint where to go on after so many steps, as JSON. Collective.

        None: the number of steps is enough.
        """
        return None

    @property
    def facts(self) -> dict[str, Any]:
        """What the order of the samples depends on, as JSON."""
        return {"samples": self.num_samples, "global_batch": self.num_micro_batches * self.micro_batch}

    def check(self, facts: dict[str, Any]) -> None:
        """Hold it against a checkpoint's.

        Raises:
            CheckpointMismatch: it would go on with other samples.
        """
        if facts != self.facts:
            raise CheckpointMismatch(
                f"the run was trained on {_tell(facts)}, and now gets {_tell(self.facts)}: give it what it had, or "
                "start a new run"
            )

    def resume(self, cursor: Any) -> None:  # noqa: B027
        """Go on from a checkpoint's cursor. Every rank; before ``batches``.

        Raises:
            CheckpointMismatch: it is not of this data.
        """


class MapFeed(Feed):
    """From data of known length: any sample of any step can be asked for."""

    def __init__(self, data: Sequence[Any], *settings: Any) -> None:
        super().__init__(*settings)
        self._data = data
        self.num_samples = len(data)
        self._order = SampleOrder(self._config.seed, len(data))

    def batches(self, step: int) -> Iterator[Any]:
        """See ``Feed``."""
        return self._fetch(self._addresses(at, index) for at in itertools.count(step) for index in self.mine)

    def first_batches(self, count: int) -> Iterator[Any]:
        """See ``Feed``."""
        return self._fetch(itertools.repeat(self._addresses(0, 0), count))

    def _addresses(self, step: int, index: int) -> list[data_module.Address]:
        first = (step * self.num_micro_batches + index) * self.micro_batch
        return [self._order.address(first + i) for i in range(self.micro_batch)]

    def _fetch(self, addresses: Iterator[list[data_module.Address]]) -> Iterator[Any]:
        section = self._config.data
        return data_module.fetch(
            self._data, self._config.seed, addresses, self._collate, section.workers, section.prefetch
        )


class StreamFeed(Feed):
    """From a stream: each lane goes on where it was after the batches that were used, not those that were prepared."""

    def __init__(self, source: ShardedSource, *settings: Any) -> None:
        super().__init__(*settings)
        self._source = source
        self._shards = hashlib.sha256("\n".join(source.shards).encode()).hexdigest()
        self._begin([Cursor()] * num_lanes(self.num_micro_batches, len(source.shards)))

    def _begin(self, cursors: list[Cursor]) -> None:
        global_batch = self.num_micro_batches * self.micro_batch
        self._lanes = Lanes(self._config.seed, len(self._source.shards), len(cursors), global_batch)
        self._cursors = cursors
        """Of each lane, at the last boundary; of other ranks' lanes, when this was last asked for."""
        self._step = 0
        """The step that batches were last used in."""
        self._used: dict[int, Cursor] = {}
        """Where lanes are within it."""

    def batches(self, step: int) -> Iterator[Any]:
        """See ``Feed``."""
        self._cursors = self._gather(step)
        self._used = {}  # of a step that was broken off
        section = self._config.data
        spans = [range(i * self.micro_batch, (i + 1) * self.micro_batch) for i in self.mine]
        batches = stream.read(
            self._source, self._lanes, tuple(self._cursors), spans, self._collate, section.workers, section.prefetch
        )
        return self._using(batches, step)

    def _using(self, batches: Iterator[tuple[Any, dict[int, Cursor]]], step: int) -> Iterator[Any]:
        for number, (batch, cursors) in enumerate(batches):
            self._take_steps_before(step + number // len(self.mine))
            self._used |= cursors
            yield batch

    def _take_steps_before(self, step: int) -> None:
        if self._step < step:
            for lane, cursor in self._used.items():
                self._cursors[lane] = cursor
            self._step, self._used = step, {}

    def first_batches(self, count: int) -> Iterator[Any]:
        """See ``Feed``."""
        for _ in range(count):
            samples = first_samples(self._source, self._config.seed, self.micro_batch)
            yield (self._collate or default_collate)(samples)

    def cursor(self, step: int) -> Any:
        """See ``Feed``."""
        return {"shards": self._shards, "lanes": [list(cursor) for cursor in self._gather(step)]}

    def _gather(self, step: int) -> list[Cursor]:
        """Where all lanes are after so many steps. A lane is known to the rank that uses its last sample of a step."""
        self._take_steps_before(step)
        table = torch.zeros(self._lanes.num_lanes, len(Cursor._fields), dtype=torch.int64)
        for lane, cursor in enumerate(self._cursors):
            if ((lane + 1) * self._lanes.width - 1) // self.micro_batch in self.mine:
                table[lane] = torch.tensor(cursor)
        return [Cursor(*row) for row in self._ranks.total(table).tolist()]

    def resume(self, cursor: Any) -> None:
        """See ``Feed``."""
        if cursor["shards"] != self._shards:
            raise CheckpointMismatch(
                f"the stream has other shards than when the checkpoint was made ({len(self._source.shards)} now, the "
                f"first is {self._source.shards[0]}): give it the same ones in the same order, or start a new run"
            )
        global_batch, lanes = self.num_micro_batches * self.micro_batch, cursor["lanes"]
        if global_batch % len(lanes):
            raise CheckpointMismatch(
                f"the checkpoint's stream is read in {len(lanes)} lanes, which do not divide the global batch "
                f"({global_batch}): set it back, or start a new run"
            )
        self._begin([Cursor(*lane) for lane in lanes])


class Feeds:
    """All feeds of a session, in the order in which the loop asked for them; a checkpoint knows them by that."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self._config, self._ranks = config, ranks
        self._feeds: list[Feed] = []
        self._saved: list[Any] = []
        self._facts: list[dict[str, Any]] = []

    def add(self, data: Data, global_batch: int, micro_batch: int, collate: Collate | None) -> Feed:
        """A feed from map-style data or a stream. Every rank, before or after ``resume``.

        Raises:
            ConfigError: the micro-batch does not divide the global batch.
            WorkloadError: there is no data.
            CheckpointMismatch: see ``resume``.
        """
        num_samples(data)  # refuses what is empty
        settings = (self._config, self._ranks, global_batch, micro_batch, collate)
        feed = StreamFeed(data, *settings) if isinstance(data, ShardedSource) else MapFeed(data, *settings)
        self._feeds.append(feed)
        self._resume(len(self._feeds) - 1)
        return feed

    def progress(self, step: int) -> dict[str, Any]:
        """What of a checkpoint's progress is ours. Collective."""
        cursors = [feed.cursor(step) for feed in self._feeds]
        facts = {"feeds": [feed.facts for feed in self._feeds]}
        return facts | {"streams": cursors} if any(cursors) else facts

    def resume(self, progress: dict[str, Any]) -> None:
        """Go on from what ``progress`` returned, also on another number of ranks. Every rank.

        Raises:
            CheckpointMismatch: it is of other data.
        """
        self._saved, self._facts = progress.get("streams", []), progress["feeds"]
        for number in range(len(self._feeds)):
            self._resume(number)

    def _resume(self, number: int) -> None:
        if number < len(self._facts):
            self._feeds[number].check(self._facts[number])
        if number < len(self._saved) and self._saved[number] is not None:  # else it is new: it begins at the beginning
            self._feeds[number].resume(self._saved[number])


def _tell(facts: dict[str, Any]) -> str:
    data = "a stream" if facts["samples"] is None else f"{facts['samples']} samples"
    return f"{data} in batches of {facts['global_batch']}"
