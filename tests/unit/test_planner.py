"""Which GPUs a run uses, how, and why."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from planner_parts import LARGE, PAIR, SMALL, TRAINED, best, config, cuda, has, is_probed, model, names, plan

from latentwire.elastic.footprint import CONTEXT_BYTES, TURN_COST, Footprint, TrainedPart
from latentwire.elastic.inventory import GB, Device, Inventory
from latentwire.elastic.planner import Placement, weigh
from latentwire.elastic.schedule import MAX_REPLICAS
from latentwire.errors import ConfigError

# ---- Without a footprint ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("halvings", [0, 1, 2, 3])
def test_halving_keeps_the_global_batch(halvings: int) -> None:
    for footprint in (None, PAIR):
        placement = plan(config(1), has("H200-141GB"), footprint, halvings)
        assert placement.micro_batch == 8 // 2**halvings
        assert placement.micro_batch * placement.num_micro_batches == 32
        assert ("halved" in placement.why) == bool(halvings)


@pytest.mark.parametrize(("micro_batch", "halvings"), [(8, 4), (6, 2), (1, 1)])
def test_a_micro_batch_that_cannot_be_halved_is_an_error_with_a_cure(micro_batch: int, halvings: int) -> None:
    for inventory, footprint in ((has("0"), None), (has("H200-141GB"), PAIR)):
        with pytest.raises(ConfigError, match=r"cannot be halved.*power of two"):
            plan(config(1, micro_batch, 4 * micro_batch), inventory, footprint, halvings)


def test_ranks_take_one_device_each() -> None:
    assert plan(config(3), names("a", "b", "c", "d"), None).devices == (("cuda:0",), ("cuda:1",), ("cuda:2",))
    assert plan(config(2), names(), None).devices == (("cpu",), ("cpu",))
    assert plan(config(2), names(), None).world_size == 2


@pytest.mark.parametrize(("num_ranks", "num_gpus"), [(3, 2), (MAX_REPLICAS + 1, 0), (5, 8)])
def test_more_ranks_than_there_is_room_for(num_ranks: int, num_gpus: int) -> None:
    for footprint in (None, PAIR):
        with pytest.raises(ConfigError, match=r"elastic\.num_ranks"):
            plan(config(num_ranks), names(*["H200"] * num_gpus), footprint)


@pytest.mark.parametrize("footprint", [None, Footprint((model("tiny", 0.1, 0.1),), TRAINED)], ids=["without", "with"])
@pytest.mark.parametrize(
    ("num_ranks", "seen", "num_nodes", "num_gpus", "devices", "nodes"),
    [
        (None, 2, 2, 2, ["cuda:0", "cuda:1", "cuda:0", "cuda:1"], [0, 0, 1, 1]),
        (None, 0, 2, 2, ["cpu"] * 4, [0, 0, 1, 1]),
        (None, 0, 1, 4, ["cpu"] * 4, [0] * 4),
        (None, 0, 1, None, ["cpu"], [0]),
        (None, 0, 2, None, ["cpu"] * 2, [0, 1]),
        (None, 4, 1, 2, ["cuda:0", "cuda:1"], [0, 0]),
        (None, 4, 2, 4, ["cuda:0", "cuda:1", "cuda:0", "cuda:1"], [0, 0, 1, 1]),
        (None, 1, 2, None, ["cuda:0", "cuda:0"], [0, 1]),
        (3, 2, 2, 2, ["cuda:0", "cuda:1", "cuda:0"], [0, 0, 1]),
        (1, 1, 2, 1, ["cuda:0"], [0]),
    ],
)
def test_ranks_are_spread_over_nodes_in_order(
    footprint: Footprint | None,
    num_ranks: int | None,
    seen: int,
    num_nodes: int,
    num_gpus: int | None,
    devices: list[str],
    nodes: list[int],
) -> None:
    placement = plan(config(num_ranks), names(*["H200"] * seen), footprint, 0, num_nodes, num_gpus)
    assert ([device for (device,) in placement.devices], list(placement.nodes)) == (devices, nodes)
    assert [rank for node in range(num_nodes) for rank in placement.ranks_on(node)] == list(range(len(devices)))
    assert Placement.from_json(json.loads(json.dumps(dataclasses.asdict(placement)))) == placement


def test_more_ranks_than_a_node_has_room_for() -> None:
    with pytest.raises(ConfigError, match="the job sees 1 GPUs on each node"):
        plan(config(4), names("H200"), None, num_nodes=2, num_gpus=1)


def test_what_gives_no_footprint_cannot_be_divided() -> None:
    divided = config(elastic={"gpus_per_replica": 2})
    with pytest.raises(ConfigError, match=r"gpus_per_replica is 2 and the workload gives no footprint.*remove it"):
        plan(divided, names("H200", "H200"), None)
    with pytest.raises(ConfigError, match=r"gpus_per_replica is 2 and there is no GPU.*remove it"):
        plan(divided, names(), PAIR)


@pytest.mark.parametrize(("global_batch", "micro_batch"), [(32, 8), (12, 4), (6, 2), (7, 1)])
def test_on_a_cpu_auto_is_a_power_of_two(global_batch: int, micro_batch: int) -> None:
    placement = plan(config(micro_batch="auto", global_batch=global_batch), names(), PAIR)
    assert (placement.micro_batch, is_probed(placement)) == (micro_batch, False)


def test_on_a_gpu_auto_is_probed_even_if_nothing_is_known() -> None:
    auto = config(micro_batch="auto")
    assert is_probed(plan(auto, names("H200"), None))
    recorded = plan(auto, names("H200"), None, micro_batch=4)
    assert (recorded.micro_batch, is_probed(recorded)) == (4, False)


# ---- The rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "devices", "modules"),
    [
        ("1xH200-141GB", cuda((0,)), {"large": (0,), "small": (0,)}),
        ("2xH200-141GB", cuda((0,), (1,)), {"large": (0,), "small": (0,)}),
        ("3xH200-141GB", cuda((0,), (1,), (2,)), {"large": (0,), "small": (0,)}),
        ("4xH200-141GB", cuda((0,), (1,), (2,), (3,)), {"large": (0,), "small": (0,)}),
        ("2xA100-40GB", cuda((0, 1)), {"large": (0,), "small": (1,)}),
        ("3xL4-23GB", cuda((0, 1, 2)), {"large": (0, 1), "small": (2,)}),
        ("4xA100-40GB", cuda((0, 1), (2, 3)), {"large": (0,), "small": (1,)}),
        ("4xL4-16GB", cuda((0, 1, 2, 3)), {"large": (0, 1), "small": (2, 3)}),
    ],
)
def test_whole_replicas_where_they_fit_else_the_models_are_divided(
    gpus: str, devices: tuple[tuple[str, ...], ...], modules: dict[str, tuple[int, ...]]
) -> None:
    footprint = dataclasses.replace(PAIR, modules=(model("large", 1.4, 0.2), model("small", 1.3, 0.2)))
    placement = best(gpus, footprint, micro_batch=4, global_batch=48)
    assert (placement.devices, placement.modules) == (devices, modules)


def test_three_gpus_of_which_two_hold_the_models_leave_the_third_alone() -> None:
    placement = best("3xA100-40GB")
    assert placement.devices == cuda((0, 1))
    assert "no faster, with more GPUs: 1 replica, large 0-1 | small 2" in placement.why


def test_the_larger_model_goes_to_the_larger_gpu() -> None:
    placement = best(
        "A100-24GB+A100-40GB", dataclasses.replace(PAIR, modules=(model("large", 1.6, 0.2), SMALL)), micro_batch=1
    )
    assert placement.devices == cuda((1, 0))
    assert placement.devices_of(0) == {"large": ("cuda:1",), "small": ("cuda:0",)}


def test_each_replica_gets_equally_large_gpus() -> None:
    heavy = dataclasses.replace(PAIR, modules=(model("large", 2.6, 1.0), SMALL))
    placement = best("2xA100-40GB+2xA100-80GB", heavy)
    assert placement.devices == cuda((2, 0), (3, 1))


def test_of_mixed_gpus_only_those_that_hold_a_replica_are_used() -> None:
    placement = best("2xH100-20GB+2xH100-80GB")
    assert placement.devices == cuda((2,), (3,))


def test_checkpointing_is_turned_on_only_where_it_is_needed() -> None:
    auto = {"train": {"gradient_checkpointing": "auto"}}
    assert best("H200-141GB", **auto).gradient_checkpointing is False
    assert best("H100-48GB", **auto).gradient_checkpointing is True
    on = {"train": {"gradient_checkpointing": True}}
    assert best("H200-141GB", **on).gradient_checkpointing is True


def test_a_divided_replica_is_preferred_to_checkpointing() -> None:
    placement = best("2xA100-60GB", train={"gradient_checkpointing": "auto"})
    assert (placement.devices, placement.gradient_checkpointing) == (cuda((0, 1)), False)


def test_a_global_batch_of_one_micro_batch_needs_one_gpu() -> None:
    alone = Footprint((LARGE,), TRAINED)
    assert best("4xH200-141GB", alone, micro_batch=8, global_batch=8).devices == cuda((0,))
    assert best("4xH200-141GB", alone, micro_batch=8, global_batch=48).devices == cuda((0,), (1,), (2,)), "2 each"


def test_a_replica_never_spans_nodes() -> None:
    placement = plan(config(), has("2xA100-40GB"), PAIR, num_nodes=2)
    assert (placement.devices, placement.nodes) == (cuda((0, 1), (0, 1)), (0, 1))
    with pytest.raises(ConfigError, match="does not fit"):
        plan(config(), has("1xA100-40GB"), PAIR, num_nodes=2)


# ---- What is expected ------------------------------------------------------------------------------------------------


def test_samples_per_second_follow_from_the_data_sheet() -> None:
    whole = 989 * PAIR.efficiency / 4  # each model computes 2 TFLOP for a sample
    assert best("1xH100-80GB").samples_per_s == pytest.approx(whole)
    assert best("4xH100-80GB").samples_per_s == pytest.approx(4 * whole)
    assert best("3xH100-80GB").samples_per_s == pytest.approx(4 / 2 * whole), "one of three ranks has two of four"
    assert best("2xH100-40GB").samples_per_s == pytest.approx(2 * whole), "both models at the same time"
    checkpointed = best("1xH100-80GB", train={"gradient_checkpointing": True})
    assert checkpointed.samples_per_s == pytest.approx(whole / 1.5), "a third pass beside two"
    only = Footprint((LARGE,), TRAINED)
    cut = best("2xH100-18GB", only, micro_batch=8, global_batch=8, elastic={"memory_target": 0.85})
    assert cut.modules == {"large": (0, 1)}
    assert cut.samples_per_s == pytest.approx(2 * whole), "what is cut is not faster than what is whole"


def test_two_micro_batches_at_once_where_it_pays_and_fits() -> None:
    only, cut = Footprint((LARGE,), TRAINED), {"memory_target": 0.85}
    two = best("2xH100-18GB", only, micro_batch=4, elastic=cut)
    alone = plan(config(micro_batch=4, elastic=cut), has("2xH100-18GB"), only, one_at_a_time=True)
    assert (two.modules, two.in_flight, alone.in_flight) == ({"large": (0, 1)}, 2, 1)
    assert "2 micro-batches at once" in two.why
    assert "one micro-batch at a time, as the run went out of memory" in alone.why
    assert two.samples_per_s == pytest.approx(alone.samples_per_s * 8 / (1 + 7 * TURN_COST / 2)), (
        "the first of 8 fills the line"
    )
    assert two.peak_bytes is not None
    assert alone.peak_bytes is not None
    for one, both in zip(alone.peak_bytes, two.peak_bytes, strict=True):
        assert both - one == pytest.approx(2 * GB, rel=0.1), "activations of four more samples"
    full = best("2xH100-18GB", only, micro_batch=8, elastic=cut)
    assert (full.modules, full.in_flight) == ({"large": (0, 1)}, 1), "8 GB of activations are too many"
    assert "train.micro_batch: 4, in a new run, would be 1.46 times as fast;" in full.why
    assert "in a new run" not in alone.why + two.why
    assert best("2xH100-18GB", only, micro_batch=4, global_batch=4, elastic=cut).in_flight == 1, "there is one only"
    assert best("2xH100-40GB", PAIR).in_flight == 1, "a model on each: no place waits"


def test_auto_takes_the_largest_of_which_two_at_once_fit_where_that_is_faster() -> None:
    only, how = Footprint((LARGE,), TRAINED), {"micro_batch": "auto", "global_batch": 64}
    first = plan(config(elastic={"memory_target": 0.85}, **how), has("2xH100-18GB"), only)
    alone = plan(config(elastic={"memory_target": 0.85}, **how), has("2xH100-18GB"), only, one_at_a_time=True)
    assert (first.in_flight, alone.in_flight) == (2, 1)
    assert (first.micro_batch, first.probe_up_to, alone.micro_batch, alone.probe_up_to) == (4, 4, 8, 8)
    assert first.samples_per_s == pytest.approx(alone.samples_per_s * 16 / (1 + 15 * TURN_COST / 2))


def test_an_unknown_chip_has_no_pace_and_yet_a_plan() -> None:
    placement = plan(config(), Inventory((Device("X9000", 80 * GB),) * 2, "", {}), PAIR)
    assert (placement.world_size, placement.samples_per_s) == (2, None)
    assert "the speed of X9000 is not known" in placement.why


def test_a_footprint_of_bytes_alone_has_no_pace_and_yet_a_plan() -> None:
    still = dataclasses.replace(LARGE, layer_forward_flops=0, layer_backward_flops=0)
    placement = best("4xH100-80GB", Footprint((still,), TRAINED))
    assert (placement.world_size, placement.samples_per_s) == (4, None)
    assert "the footprint names no operations" in placement.why


def test_the_slower_chip_of_two_is_waited_for() -> None:
    mixed = best("H100-80GB+A100-80GB").samples_per_s
    assert mixed == pytest.approx(989 * PAIR.efficiency / 4), "two A100s would give less: the H100 works alone"
    assert best("H200-80GB+H100-80GB").samples_per_s == pytest.approx(2 * 989 * PAIR.efficiency / 4)


@pytest.mark.parametrize(
    ("gpu", "precision"), [("H100-80GB", "bf16"), ("V100-80GB", "fp16"), ("X1-80GB", "bf16 or fp16")]
)
def test_the_number_format_is_that_of_the_chip(gpu: str, precision: str) -> None:
    assert {c.precision for c in weigh(config(), has(gpu), PAIR).candidates} == {precision}
    assert weigh(config(), has(gpu), PAIR).placement().precision == precision
    forced = config(train={"precision": "fp16"})
    assert {c.precision for c in weigh(forced, has(gpu), PAIR).candidates} == {"fp16"}


@pytest.mark.parametrize(
    ("gpus", "precision"),
    [("H100-80GB+A100-80GB", "bf16"), ("V100-80GB+A100-80GB", "fp16"), ("X1-80GB+V100-80GB", "fp16")],
)
def test_chips_of_two_kinds_compute_in_one_number_format(gpus: str, precision: str) -> None:
    on_both = [each for each in weigh(config(), has(gpus), PAIR).candidates if each.num_gpus == 2]
    assert {each.precision for each in on_both} == {precision}


# ---- The micro-batch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "sections", "micro_batch"),
    [
        ("1xH200-141GB", {}, 32),  # 32 GB stand, a sample takes 2.1 GB, 105 GB may be filled
        ("1xH100-80GB", {}, 8),
        ("4xH200-141GB", {}, 16),  # four ranks
        ("1xH200-141GB", {"scheduler": {"gpus": [4, 2, 1]}}, 16),  # four ranks in the largest job
        ("4xH200-141GB", {"elastic": {"smallest_gpu_gb": 80}}, 16),  # divided: 8 fit on one GPU, 16 on two
        ("4xH200-141GB", {"elastic": {"smallest_gpu_gb": 80}, "scheduler": {"gpus": [4, 1]}}, 8),
        ("1xH200-141GB", {"elastic": {"memory_target": 0.5}}, 16),
    ],
)
def test_auto_is_the_largest_divisor_that_fits_everywhere(
    gpus: str, sections: dict[str, Any], micro_batch: int
) -> None:
    placement = best(gpus, micro_batch="auto", global_batch=64, **sections)
    assert (placement.micro_batch, is_probed(placement)) == (micro_batch, True)


def test_auto_for_a_given_number_of_ranks() -> None:
    alone = Footprint((LARGE,), TRAINED)
    assert best("4xH200-141GB", alone, num_ranks=1, micro_batch="auto", global_batch=64).micro_batch == 64
    assert best("4xH200-141GB", alone, num_ranks=2, micro_batch="auto", global_batch=64).micro_batch == 32
    assert best("4xH200-141GB", alone, num_ranks=3, micro_batch="auto", global_batch=30).micro_batch == 10


def test_a_recorded_micro_batch_is_kept() -> None:
    placement = plan(config(micro_batch="auto", global_batch=64), has("H200-141GB"), PAIR, micro_batch=4)
    assert (placement.micro_batch, is_probed(placement)) == (4, False)
    placement = plan(config(micro_batch="auto", global_batch=64), has("H200-141GB"), PAIR, halvings=1, micro_batch=4)
    assert (placement.micro_batch, is_probed(placement)) == (2, False)
    with pytest.raises(ConfigError, match="recorded micro-batch of 5"):
        plan(config(micro_batch="auto", global_batch=64), has("H200-141GB"), PAIR, micro_batch=5)


def test_a_guess_that_ran_out_of_memory_is_halved() -> None:
    placement = plan(config(micro_batch="auto", global_batch=64), has("H200-141GB"), PAIR, halvings=2)
    assert (placement.micro_batch, is_probed(placement)) == (8, True)


def test_a_smallest_gpu_that_is_too_small_is_told_at_the_start() -> None:
    with pytest.raises(ConfigError, match=r"smallest_gpu_gb is 10, and the workload does not fit on 1 GPUs"):
        best("H200-141GB", micro_batch="auto", elastic={"smallest_gpu_gb": 10})


# ---- Forced, refused -------------------------------------------------------------------------------------------------


def test_a_number_of_ranks_or_gpus_is_obeyed() -> None:
    assert best("4xH200-141GB", num_ranks=2).devices == cuda((0, 1), (2, 3)), "the models of a replica side by side"
    assert best("4xH200-141GB", num_ranks=2, elastic={"gpus_per_replica": 1}).devices == cuda((0,), (1,))
    assert best("4xH200-141GB", elastic={"gpus_per_replica": 2}).devices == cuda((0, 1), (2, 3))
    assert best("4xH200-141GB", num_ranks=1, elastic={"gpus_per_replica": 3}).devices == cuda((0, 1, 2))


@pytest.mark.parametrize(
    ("num_ranks", "gpus_per_replica", "message"),
    [
        (3, None, r"elastic\.num_ranks is 3, and the job sees 2 GPUs"),
        (2, 2, r"elastic\.num_ranks is 2 and elastic\.gpus_per_replica is 2, and the job sees 2 GPUs"),
        (None, 4, r"elastic\.gpus_per_replica is 4, and the job sees 2 GPUs .*set less"),
    ],
)
def test_what_there_are_too_few_gpus_for(num_ranks: int | None, gpus_per_replica: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        best("2xH200-141GB", num_ranks=num_ranks, elastic={"gpus_per_replica": gpus_per_replica})


def test_models_are_cut_between_layers_only() -> None:
    flat = Footprint((model("one", 10, 1, num_layers=1), model("two", 10, 1, num_layers=1)), TRAINED)
    assert best("4xH200-141GB", flat, elastic={"gpus_per_replica": 2}).world_size == 2
    with pytest.raises(ConfigError, match="too few layers"):
        best("4xH200-141GB", flat, elastic={"gpus_per_replica": 3})


def test_a_process_sees_one_slice() -> None:
    placement = best("2xH200-MIG-71GB")
    assert placement.devices == cuda((0,))
    assert "as a process sees one MIG slice" in placement.why
    for forced in ({"num_ranks": 2}, {"elastic": {"gpus_per_replica": 2}}):
        with pytest.raises(ConfigError, match="MIG slices, of which a process sees one: set it to 1"):
            best("2xH200-MIG-71GB", **forced)
    assert plan(config(2), has("H200-MIG-71GB"), PAIR, num_nodes=2).devices == cuda((0,), (0,))


@pytest.mark.parametrize(
    ("gpus", "changes", "cure"),
    [
        ("1xH100-60GB", {}, r"4\.0 GB are missing.* What helps: .*micro_batch: 4, or .*gradient_checkpointing: auto"),
        ("1xH100-40GB", {}, r"helps: train\.gradient_checkpointing: auto and elastic\.memory_target: 0\.85, or 2 such"),
        ("2xA100-40GB", {"num_ranks": 2}, r"What helps: elastic\.num_ranks: null"),
        ("2xA100-40GB", {"elastic": {"gpus_per_replica": 1}}, r"What helps: elastic\.gpus_per_replica: null"),
        ("1xH100-58GB", {"train": {"gradient_checkpointing": True}, "elastic": {"memory_target": 0.5}}, "target: 0.85"),
        ("1xH100-4GB", {}, "Use larger GPUs, or shorter samples"),
        ("1xH100-16GB", {}, r"What helps: 4 such GPUs and train\.micro_batch: 1$"),
        ("1xH100-MIG-40GB", {}, r"gradient_checkpointing: auto and elastic\.memory_target: 0\.85$"),
    ],
)
def test_where_nothing_fits_the_error_names_what_would(gpus: str, changes: dict[str, Any], cure: str) -> None:
    with pytest.raises(ConfigError, match=rf"does not fit: closest is .* on GPU 0 .*{cure}"):
        best(gpus, **changes)


def test_the_words_say_why_this_and_not_the_others() -> None:
    why = best("2xA100-60GB", train={"gradient_checkpointing": "auto"}).why
    assert why.startswith("2 of 2 GPUs: 1 replica, large 0 | small 1; expected ")
    assert "slower: 1 whole replica (3.00 times) / 2 whole replicas (1.50 times)" in why
    why = best("2xA100-40GB").why
    assert "does not fit: 1 whole replica (19.0 GB too much on GPU 0)" in why


def test_the_words_name_what_stays_idle() -> None:
    assert "1 of 2 GPUs (not 0: L4)" in best("1xL4-24GB+1xH100-80GB").why
    assert "not" not in best("2xH100-80GB", num_ranks=1).why.split(";")[0]
    assert "4 of 5 GPUs, 4 of 5 nodes" in plan(config(), has("H100-80GB"), PAIR, num_nodes=5).why


def test_what_the_workload_assumed_is_passed_on() -> None:
    assert "large: a guess" in best("H200-141GB", dataclasses.replace(PAIR, notes=("large: a guess",))).why


def test_a_plan_needs_room_for_the_context() -> None:
    empty = Footprint((), TrainedPart(0, 0, 0, 0))
    with pytest.raises(ConfigError, match="does not fit"):
        best("H100-1GB", empty)
    assert best("H100-2GB", empty).peak_bytes == (CONTEXT_BYTES,)
