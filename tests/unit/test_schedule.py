"""Who computes which micro-batch, in which order sums are added, and which sample comes when."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentwire.elastic.schedule import MAX_REPLICAS, canonical_sum, micro_batches_of, num_slots, segments
from latentwire.train.order import SampleOrder, derive_seed

REPLICAS = range(1, MAX_REPLICAS + 1)
NUM_MICRO_BATCHES = st.integers(1, 200)
GOLDEN = [
    (0, 1), (0, 8), (0, 2), (0, 6), (0, 0), (0, 7), (0, 4), (0, 5), (0, 9), (0, 3),
    (1, 1), (1, 0), (1, 3), (1, 6), (1, 4), (1, 8), (1, 2), (1, 9), (1, 7), (1, 5),
]  # fmt: skip
GOLDEN_SEED = 5806554439271297204


# ---- Micro-batches and segments --------------------------------------------------------------------------------------


@given(NUM_MICRO_BATCHES)
def test_every_micro_batch_is_computed_once(num: int) -> None:
    for replicas in REPLICAS:
        computed = [m for rank in range(replicas) for m in micro_batches_of(rank, replicas, num)]
        assert computed == list(range(num))


@given(NUM_MICRO_BATCHES)
def test_the_work_is_even(num: int) -> None:
    for replicas in REPLICAS:
        sizes = [len(micro_batches_of(rank, replicas, num)) for rank in range(replicas)]
        assert max(sizes) - min(sizes) <= 1
        assert num_slots(replicas, num) == max(sizes)


@given(NUM_MICRO_BATCHES)
def test_segments_tile_the_batch_and_lie_within_one_rank(num: int) -> None:
    assert [m for segment in segments(num) for m in segment] == list(range(num))
    for replicas in REPLICAS:
        for segment in segments(num):
            owners = [r for r in range(replicas) if set(segment) & set(micro_batches_of(r, replicas, num))]
            assert len(segment) > 0
            assert len(owners) == 1


def test_the_segments_of_eight_are_those_of_the_design() -> None:
    assert segments(8) == [range(2), range(2, 4), range(4, 5), range(5, 6), range(6, 8)]


@given(NUM_MICRO_BATCHES)
def test_the_blocks_of_all_ranks_tile_the_batch_and_are_few(num: int) -> None:
    for replicas in REPLICAS:
        of_ranks = [canonical_sum(num).blocks_of(rank, replicas, num) for rank in range(replicas)]
        assert [m for blocks in of_ranks for block in blocks for m in block] == list(range(num))
        assert max(map(len, of_ranks)) <= (2 if replicas == 3 else 1)


def sum_as_written(num: int, replicas: int) -> str:
    """The sum that ``replicas`` ranks make, with a bracket for every addition."""
    whole = canonical_sum(num)
    additions = list(whole.additions())
    exchanged: dict[range, str] = {}
    for rank in range(replicas):
        own: dict[range, str] = {}
        for segment in segments(num):
            if segment[0] in micro_batches_of(rank, replicas, num):
                own[segment] = functools.reduce("({}+{})".format, [f"g{m}" for m in segment])
                fold(own, additions)
        assert list(own) == whole.blocks_of(rank, replicas, num)
        exchanged |= own
    fold(exchanged, additions)
    (total,) = exchanged.values()
    return total


def fold(sums: dict[range, str], additions: list[tuple[range, range]]) -> None:
    """Add what the order of the whole batch adds, as far as both sides are there."""
    for left, right in additions:
        if left in sums and right in sums:
            sums[range(left.start, right.stop)] = f"({sums.pop(left)}+{sums.pop(right)})"


@given(NUM_MICRO_BATCHES)
def test_the_order_of_every_addition_is_the_same_on_any_number_of_ranks(num: int) -> None:
    assert len({sum_as_written(num, replicas) for replicas in REPLICAS}) == 1


# ---- The order of samples --------------------------------------------------------------------------------------------


@given(st.integers(0, 2**63 - 1), st.integers(1, 300), st.integers(0, 5))
def test_an_epoch_is_a_permutation(seed: int, num_samples: int, epoch: int) -> None:
    order = SampleOrder(seed, num_samples)
    addresses = [order.address(epoch * num_samples + i) for i in range(num_samples)]
    assert {address[0] for address in addresses} == {epoch}
    assert sorted(address[1] for address in addresses) == list(range(num_samples))


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 63, 64, 65, 1023, 1024, 1025])
def test_sizes_around_the_powers_of_two(num_samples: int) -> None:
    order = SampleOrder(1, num_samples)
    assert sorted(order.address(i)[1] for i in range(num_samples)) == list(range(num_samples))


def test_a_data_set_larger_than_memory_has_an_order_too() -> None:
    order = SampleOrder(0, 10**12)
    drawn = {order.address(10**12 * 3 + i) for i in range(1000)}
    assert len(drawn) == 1000
    assert all(epoch == 3 and 0 <= index < 10**12 for epoch, index in drawn)


def test_the_order_is_that_of_every_version_before() -> None:
    """A change here changes every result: it needs a new format and a word in the changelog."""
    order = SampleOrder(seed=7, num_samples=10)
    assert [order.address(i) for i in range(20)] == GOLDEN
    assert derive_seed(7, "order", 0) == GOLDEN_SEED


def test_epochs_and_seeds_differ() -> None:
    def epoch(seed: int, number: int) -> tuple[int, ...]:
        return tuple(SampleOrder(seed, 100).address(100 * number + i)[1] for i in range(100))

    orders = {epoch(seed, number) for seed in (0, 1, 2) for number in (0, 1, 2)}
    assert len(orders) == 9
    assert tuple(range(100)) not in orders


def test_without_shuffling_the_order_is_that_of_the_data() -> None:
    order = SampleOrder(7, 3, shuffle=False)
    assert [order.address(i) for i in range(5)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


@given(st.lists(st.integers() | st.text(max_size=5), min_size=1, max_size=4))
def test_seeds_are_of_63_bits_and_follow_from_their_parts(parts: list[int | str]) -> None:
    assert 0 <= derive_seed(*parts) < 2**63
    assert derive_seed(*parts) == derive_seed(*parts)
    assert derive_seed(*parts) != derive_seed(*parts, 0)
