"""How a stream is divided: no shard is read twice, and no rank is needed to know who reads what."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from latentwire.elastic.schedule import MAX_REPLICAS, micro_batches_of
from latentwire.train.lanes import Lanes, num_lanes

REPLICAS = range(1, MAX_REPLICAS + 1)
NUM_MICRO_BATCHES, NUM_SHARDS, MICRO_BATCH = st.integers(1, 40), st.integers(1, 100), st.integers(1, 6)
SEEDS, EPOCHS = st.integers(0, 2**63 - 1), st.integers(0, 5)
GOLDEN = [[[6, 4, 7], [5, 9, 8], [10, 0, 2], [3, 1]], [[1, 2, 7], [9, 5, 3], [10, 0, 8], [4, 6]]]


def shards_of(lanes: Lanes, lane: int, epoch: int) -> list[int]:
    """What a lane reads in an epoch, in order."""
    found, place = [], 0
    while (shard := lanes.shard(lane, epoch, place)) is not None:
        found.append(shard)
        place += 1
    return found


def spans_of(rank: int, replicas: int, num_micro_batches: int, micro_batch: int) -> list[range]:
    """A rank's micro-batches as spans of the global batch."""
    mine = micro_batches_of(rank, replicas, num_micro_batches)
    return [range(i * micro_batch, (i + 1) * micro_batch) for i in mine]


@given(SEEDS, NUM_MICRO_BATCHES, NUM_SHARDS, EPOCHS)
def test_in_every_epoch_each_shard_is_read_by_one_lane(seed: int, num: int, num_shards: int, epoch: int) -> None:
    lanes = Lanes(seed, num_shards, num_lanes(num, num_shards), num)
    dealt = [shards_of(lanes, lane, epoch) for lane in range(lanes.num_lanes)]
    assert sorted(shard for shards in dealt for shard in shards) == list(range(num_shards))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


@given(NUM_MICRO_BATCHES, NUM_SHARDS)
def test_there_is_a_lane_for_each_micro_batch_where_there_are_shards_enough(num: int, num_shards: int) -> None:
    number = num_lanes(num, num_shards)
    assert number <= num_shards
    assert num % number == 0
    assert number == num or num_shards < num


@given(NUM_MICRO_BATCHES, NUM_SHARDS, MICRO_BATCH)
def test_on_any_number_of_ranks_each_sample_of_each_lane_is_used_once(num: int, num_shards: int, size: int) -> None:
    """Also when the micro-batch has another size than when the lanes were chosen."""
    global_batch = num * size * 4
    lanes = Lanes(0, num_shards, num_lanes(num, num_shards), global_batch)
    whole = [(lane, i) for lane in range(lanes.num_lanes) for i in range(lanes.width)]
    for replicas, micro_batch in itertools.product(REPLICAS, (size, 2 * size, 4 * size, global_batch)):
        of_ranks = [spans_of(rank, replicas, global_batch // micro_batch, micro_batch) for rank in range(replicas)]
        parts = [part for spans in of_ranks for span in spans for part in lanes.parts(span)]
        assert [(lane, i) for lane, wanted in parts for i in wanted] == whole


@given(NUM_MICRO_BATCHES, MICRO_BATCH)
def test_with_shards_enough_no_two_ranks_read_one_lane(num: int, micro_batch: int) -> None:
    lanes = Lanes(0, num, num_lanes(num, num), num * micro_batch)
    for replicas in REPLICAS:
        spans = [spans_of(rank, replicas, num, micro_batch) for rank in range(replicas)]
        read = [lane for own in spans for lane in {lane for span in own for lane, _ in lanes.parts(span)}]
        assert sorted(read) == list(range(num))


def test_the_lanes_are_those_of_every_version_before() -> None:
    """A change here changes every result of a stream: it needs a new format and a word in the changelog."""
    lanes = Lanes(seed=7, num_shards=11, num_lanes=4, global_batch=16)
    assert [[shards_of(lanes, lane, epoch) for lane in range(4)] for epoch in (0, 1)] == GOLDEN
