"""Footprints of round figures, so that the arithmetic can be followed, and short words for a plan."""

from __future__ import annotations

from typing import Any

from latentwire.config import Config, parse_config
from latentwire.elastic.footprint import Footprint, FrozenModule, TrainedPart
from latentwire.elastic.inventory import GB, Device, Inventory, parse_gpus
from latentwire.elastic.planner import Placement, weigh

TFLOP = 10**12


def model(name: str, layer_gb: float, kept_gb: float, num_layers: int = 10) -> FrozenModule:
    """Two gigabytes outside the layers; a layer's backward pass costs as much as its forward pass."""
    return FrozenModule(
        name,
        num_layers=num_layers,
        front_bytes=GB,
        layer_bytes=round(layer_gb * GB),
        back_bytes=GB,
        layer_kept_bytes=round(kept_gb * GB / num_layers),
        layer_input_bytes=round(kept_gb * GB / num_layers / 100),
        layer_working_bytes=0,
        back_kept_bytes=0,
        num_outputs=0,
        output_bytes=0,
        outputs_at_once=0,
        layer_forward_flops=TFLOP // num_layers,
        layer_backward_flops=TFLOP // num_layers,
        back_flops=0,
    )


LARGE, SMALL = model("large", 1.4, 1.0), model("small", 1.3, 1.0)
TRAINED = TrainedPart(num_parameters=10**6, bytes_per_parameter=40, kept_bytes=0, flops=0)
PAIR = Footprint((LARGE, SMALL), TRAINED)
"""16 and 15 GB of weights, a gigabyte of activations for each model and sample."""


def config(num_ranks: int | None = None, micro_batch: int | str = 8, global_batch: int = 32, **sections: Any) -> Config:
    tree = {
        "name": "plan",
        "workload": {"target": "json:JSONDecoder"},
        "train": {"micro_batch": micro_batch, "global_batch": global_batch, **sections.get("train", {})},
        "elastic": {"num_ranks": num_ranks, **sections.get("elastic", {})},
        "scheduler": sections.get("scheduler", {}),
    }
    return parse_config(tree, "test")


def has(gpus: str) -> Inventory:
    return Inventory(parse_gpus(gpus), "", {})


def names(*gpus: str) -> Inventory:
    return Inventory(tuple(Device(name, 80 * GB) for name in gpus), "", {})


def plan(*args: Any, **more: Any) -> Placement:
    return weigh(*args, **more).placement()


def is_probed(placement: Placement) -> bool:
    return placement.probe_up_to is not None


def best(gpus: str, footprint: Footprint = PAIR, **changes: Any) -> Placement:
    return plan(config(**changes), has(gpus), footprint)


def cuda(*ranks: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(f"cuda:{gpu}" for gpu in rank) for rank in ranks)
