"""What holds for any plan, of whatever GPUs, footprint and config."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_parts import TRAINED, config, model

from latentwire.config import Config
from latentwire.elastic.footprint import Footprint, predict
from latentwire.elastic.inventory import GB, Device, Inventory
from latentwire.elastic.planner import Weighed, weigh
from latentwire.elastic.schedule import micro_batches_of
from latentwire.errors import ConfigError

GPUS = st.lists(
    st.builds(Device, st.sampled_from(["H100", "A100", "X1"]), st.integers(8, 200).map(lambda n: n * GB)), max_size=4
)
SIZES = st.sampled_from([0.1, 0.4, 1.0, 2.0])
FOOTPRINTS = st.builds(
    lambda sizes, kept, one_by_one: Footprint(
        tuple(model(name, size, kept) for name, size in zip("abc", sizes, strict=False)), TRAINED, one_by_one
    ),
    st.lists(SIZES, max_size=3),
    SIZES,
    st.booleans(),
)
CONFIGS = st.builds(
    lambda micro_batch, multiple, **forced: config(
        micro_batch=micro_batch,
        global_batch=multiple * (1 if micro_batch == "auto" else micro_batch),
        num_ranks=forced["num_ranks"],
        elastic={"gpus_per_replica": forced["gpus_per_replica"], "memory_target": forced["memory_target"]},
        train={"gradient_checkpointing": forced["checkpointing"]},
    ),
    st.just("auto") | st.integers(1, 16),
    st.integers(1, 24),
    num_ranks=st.none() | st.integers(1, 4),
    gpus_per_replica=st.none() | st.integers(1, 4),
    memory_target=st.sampled_from([0.5, 0.75, 0.85]),
    checkpointing=st.sampled_from([True, False, "auto"]),
)


def outcome(config: Config, gpus: list[Device], footprint: Footprint, num_nodes: int = 1) -> Weighed | None:
    """None: refused, with a cure."""
    try:
        return weigh(config, Inventory(tuple(gpus), "", {}), footprint, num_nodes=num_nodes)
    except ConfigError as error:
        said = str(error)
    assert any(word in said for word in ("set ", "null", "remove"))
    return None


@given(CONFIGS, GPUS, FOOTPRINTS, st.integers(1, 2))
def test_a_plan_covers_the_batch_fits_and_obeys(
    config: Config, gpus: list[Device], footprint: Footprint, num_nodes: int
) -> None:
    weighed = outcome(config, gpus, footprint, num_nodes)
    if weighed is None:
        return
    if weighed.chosen is None:
        with pytest.raises(ConfigError, match="are missing"):
            weighed.placement()
        return
    placement = weighed.placement()
    assert placement.micro_batch * placement.num_micro_batches == config.train.global_batch
    covered = [
        m
        for rank in range(placement.world_size)
        for m in micro_batches_of(rank, placement.world_size, placement.num_micro_batches)
    ]
    assert covered == list(range(placement.num_micro_batches))
    for node in range(num_nodes):
        used = [device for rank in placement.ranks_on(node) for device in placement.devices[rank]]
        assert not gpus or len(set(used)) == len(used)
    assert config.train.micro_batch in ("auto", placement.micro_batch)
    assert config.elastic.num_ranks in (None, placement.world_size)
    assert config.elastic.gpus_per_replica in (None, *map(len, placement.devices))
    assert config.train.gradient_checkpointing in ("auto", placement.gradient_checkpointing)
    if gpus:
        assert placement.peak_bytes is not None
        for rank in placement.devices:
            memory = [gpus[int(device.removeprefix("cuda:"))].memory_bytes for device in rank]
            for peak, all_of_it in zip(placement.peak_bytes, memory, strict=True):
                assert peak <= config.elastic.memory_target * all_of_it + 1
        assert placement.in_flight == 1 or len(placement.devices[0]) > 1
        how = (placement.micro_batch, placement.gradient_checkpointing, placement.in_flight)
        assert placement.peak_bytes == predict(footprint, placement.modules, *how)
        assert {place for places in placement.modules.values() for place in places} <= set(range(len(rank)))


@given(CONFIGS, GPUS.filter(bool), FOOTPRINTS, st.integers(1, 100))
def test_more_memory_never_makes_it_worse(
    config: Config, gpus: list[Device], footprint: Footprint, more_gb: int
) -> None:
    """Of a given micro-batch; ``auto`` may take a larger one, which leaves other ranks with less."""
    if config.train.micro_batch == "auto":
        config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": 1})})
    before = outcome(config, gpus, footprint)
    larger = [dataclasses.replace(gpu, memory_bytes=gpu.memory_bytes + more_gb * GB) for gpu in gpus]
    after = outcome(config, larger, footprint)
    if before is not None and before.chosen is not None:
        assert after is not None
        assert after.chosen is not None
        assert after.chosen.pace >= before.chosen.pace * (1 - 1e-9)


@given(CONFIGS, st.integers(1, 4), st.integers(8, 200), FOOTPRINTS)
def test_one_more_gpu_never_makes_it_slower(config: Config, num_gpus: int, gb: int, footprint: Footprint) -> None:
    gpus = [Device("H100", gb * GB)] * num_gpus
    if config.train.micro_batch == "auto":
        config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": 1})})
    before, after = outcome(config, gpus, footprint), outcome(config, [*gpus, gpus[0]], footprint)
    if before is not None and before.chosen is not None:
        assert after is not None
        assert after.chosen is not None
        assert after.chosen.pace >= before.chosen.pace * (1 - 1e-9)
