"""The sum of gradients: the same bits on any number of ranks, for any number of micro-batches and backward passes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
NUM_MICRO_BATCHES = [1, 5, 8]


@pytest.fixture(scope="module")
def printed() -> dict[int, list[dict[str, Any]]]:
    """By the number of ranks, what each of them printed."""
    return {size: started(size) for size in (1, 2, 3, 4)}


def started(size: int) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, HERE / "summing.py", *map(str, NUM_MICRO_BATCHES)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
        )
        for rank in range(size)
    ]
    return [json.loads(process.communicate()[0]) for process in ranks]


def test_all_ranks_have_the_same_sum(printed: dict[int, list[dict[str, Any]]]) -> None:
    for of_ranks in printed.values():
        assert all(of_rank["digests"] == of_ranks[0]["digests"] for of_rank in of_ranks)


def test_any_number_of_ranks_has_the_same_bits(printed: dict[int, list[dict[str, Any]]]) -> None:
    exact = [{c: d for c, d in of[0]["digests"].items() if not c.startswith("plain")} for of in printed.values()]
    assert len(exact[0]) == 4 * len(NUM_MICRO_BATCHES)
    assert all(digests == exact[0] for digests in exact)


def test_a_plain_all_reduce_has_other_bits_for_each_number(printed: dict[int, list[dict[str, Any]]]) -> None:
    """Else the tests above would show nothing."""
    assert len({of[0]["digests"]["plain, 8"] for of in printed.values()}) > 1


def test_a_backward_pass_too_many_is_refused(printed: dict[int, list[dict[str, Any]]]) -> None:
    assert [of_rank["refused"] for size in (2, 4) for of_rank in printed[size]] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]
