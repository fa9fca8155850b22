"""Who computes which micro-batch, in which order sums are added, and which sample comes when."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentwire.config import Config, parse_config
from latentwire.elastic.inventory import Inventory, cpu_model
from latentwire.elastic.planner import Placement, plan
from latentwire.elastic.schedule import MAX_REPLICAS, canonical_sum, micro_batches_of, num_slots, segments
from latentwire.errors import ConfigError
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


# ---- Placement -------------------------------------------------------------------------------------------------------


def config(num_ranks: int | None = 1, micro_batch: int = 8) -> Config:
    tree = {
        "name": "plan",
        "workload": {"target": "json:JSONDecoder"},
        "train": {"micro_batch": micro_batch, "global_batch": 4 * micro_batch},
        "elastic": {"num_ranks": num_ranks},
    }
    return parse_config(tree, "test")


@pytest.mark.parametrize("halvings", [0, 1, 2, 3])
def test_halving_keeps_the_global_batch(halvings: int) -> None:
    placement = plan(config(), ["H200"], halvings)
    assert placement.micro_batch == 8 // 2**halvings
    assert placement.micro_batch * placement.num_micro_batches == 32


@pytest.mark.parametrize(("micro_batch", "halvings"), [(8, 4), (6, 2), (1, 1)])
def test_a_micro_batch_that_cannot_be_halved_is_an_error_with_a_cure(micro_batch: int, halvings: int) -> None:
    with pytest.raises(ConfigError, match=r"cannot be halved.*power of two"):
        plan(config(micro_batch=micro_batch), [], halvings)


def test_ranks_take_one_device_each() -> None:
    assert plan(config(3), ["a", "b", "c", "d"], 0).devices == (("cuda:0",), ("cuda:1",), ("cuda:2",))
    assert plan(config(2), [], 0).devices == (("cpu",), ("cpu",))
    assert plan(config(2), [], 0).world_size == 2


@pytest.mark.parametrize(("num_ranks", "gpus"), [(3, ["a", "b"]), (MAX_REPLICAS + 1, []), (5, ["a"] * 8)])
def test_more_ranks_than_there_is_room_for(num_ranks: int, gpus: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"elastic\.num_ranks"):
        plan(config(num_ranks), gpus, 0)


@pytest.mark.parametrize(
    ("num_ranks", "gpus", "num_nodes", "num_gpus", "devices", "nodes"),
    [
        (None, ["H200"] * 2, 2, 2, ["cuda:0", "cuda:1", "cuda:0", "cuda:1"], [0, 0, 1, 1]),
        (None, [], 2, 2, ["cpu"] * 4, [0, 0, 1, 1]),
        (None, [], 1, 4, ["cpu"] * 4, [0] * 4),
        (None, [], 1, None, ["cpu"], [0]),
        (None, [], 2, None, ["cpu"] * 2, [0, 1]),
        (None, ["H200"] * 4, 1, 2, ["cuda:0", "cuda:1"], [0, 0]),
        (None, ["H200"] * 4, 2, 4, ["cuda:0", "cuda:1", "cuda:0", "cuda:1"], [0, 0, 1, 1]),
        (3, ["H200"] * 2, 2, 2, ["cuda:0", "cuda:1", "cuda:0"], [0, 0, 1]),
        (1, ["H200"] * 2, 2, 2, ["cuda:0"], [0]),
    ],
)
def test_ranks_are_spread_over_nodes_in_order(
    num_ranks: int | None,
    gpus: list[str],
    num_nodes: int,
    num_gpus: int | None,
    devices: list[str],
    nodes: list[int],
) -> None:
    placement = plan(config(num_ranks), gpus, 0, num_nodes, num_gpus)
    assert ([device for (device,) in placement.devices], list(placement.nodes)) == (devices, nodes)
    assert [rank for node in range(num_nodes) for rank in placement.ranks_on(node)] == list(range(len(devices)))
    assert Placement.from_json(json.loads(json.dumps(dataclasses.asdict(placement)))) == placement


def test_more_ranks_than_a_node_has_room_for() -> None:
    with pytest.raises(ConfigError, match="the job sees 1 GPUs on each node"):
        plan(config(4), ["H200"], 0, num_nodes=2, num_gpus=1)


def test_an_inventory_says_what_may_change_bits() -> None:
    now = Inventory(("H200", "H200"), "EPYC", {"torch": "2.13.0"})
    assert now.changes_since({"gpus": ["H200"], "cpu_model": "EPYC", "versions": {"torch": "2.13.0"}}) == []
    changes = now.changes_since({"gpus": ["A100"], "cpu_model": "Xeon", "versions": {"torch": "2.12.0"}})
    assert [change.partition(":")[0] for change in changes] == ["gpus", "cpu_model", "versions"]
    assert len(now.changes_since({})) == 3


def test_the_processor_of_this_machine_has_a_name() -> None:
    assert cpu_model(["processor : 0\n", "model name\t: Some CPU @ 2 GHz\n"]) == "Some CPU @ 2 GHz"
    assert cpu_model([]) == "unknown"
    assert cpu_model(Path("/proc/cpuinfo").read_text().splitlines())
