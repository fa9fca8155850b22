"""``train.micro_batch: auto``, the largest that fits from a few passes; and what two micro-batches at once need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentwire.config import parse_config
from latentwire.elastic.inventory import Inventory
from latentwire.elastic.planner import weigh
from latentwire.errors import ConfigError
from latentwire.train.memory import find_micro_batch
from latentwire.train.node import launch_variables
from latentwire.train.ranks import Ranks

ALONE = Ranks(device=torch.device("cpu"))


def found(fullness: Callable[[int], float], global_batch: int = 64, most: int = 64) -> tuple[int, list[int]]:
    """What was found, and the passes that it took."""
    result = find_micro_batch(global_batch, most, fullness, ALONE)
    assert all(result.fullness[size] == fullness(size) for size in result.fullness)
    return result.micro_batch, list(result.fullness)


@pytest.mark.parametrize(
    ("fullness", "expected"),
    [
        (lambda size: 0.3 + 0.01 * size, (64, [1, 2, 64])),
        (lambda size: 0.3 + 0.02 * size, (32, [1, 2, 32])),
        # of the full pair on an H200: small passes take whole segments of the allocator for little
        ({1: 0.3036, 2: 0.3148, 32: 0.5148, 64: 0.73}.__getitem__, (64, [1, 2, 32, 64])),
        (lambda size: 0.3 + 0.001 * size + 0.001 * size**2, (16, [1, 2, 64, 32, 16])),
        (lambda size: 0.9 if size == 1 else 2.0, (1, [1, 2])),
    ],
    ids=["as the line says", "half of it", "more than the line says", "less than the line says", "one alone"],
)
def test_few_passes_find_the_largest(fullness: Callable[[int], float], expected: tuple[int, list[int]]) -> None:
    assert found(fullness) == expected


@given(st.integers(1, 96), st.integers(1, 96), st.lists(st.floats(0, 0.2), min_size=96, max_size=96))
def test_it_fits_and_what_was_tried_beyond_it_does_not(global_batch: int, most: int, rises: list[float]) -> None:
    def fullness(size: int) -> float:
        return 0.1 + sum(rises[:size])

    try:
        micro_batch, tried = found(fullness, global_batch, most)
    except ConfigError:
        assert fullness(1) > 1
        return
    assert global_batch % micro_batch == 0
    assert micro_batch <= most
    assert fullness(micro_batch) <= 1
    assert all(fullness(size) > 1 for size in tried if size > micro_batch)


def test_where_not_even_one_fits_the_cure_is_named() -> None:
    with pytest.raises(ConfigError, match="gradient_checkpointing"):
        found(lambda size: 1.5)


def test_ranks_that_compute_two_at_once_get_room_for_launches() -> None:
    config = parse_config({"name": "a", "workload": {"target": "json:JSONDecoder"}}, "test")
    one = weigh(config, Inventory((), "", {}), None).placement()
    two = dataclasses.replace(one, in_flight=2)
    assert launch_variables(one, {}) == {}
    assert launch_variables(two, {}) == {"CUDA_SCALE_LAUNCH_QUEUES": "4x"}
    assert launch_variables(two, {"CUDA_SCALE_LAUNCH_QUEUES": "2x"}) == {}, "the user's stands"
