"""Bytes and seconds from footprints, and their correction by measurements. The pair's own: tests/train."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentwire.config import Config, TrainSection, WorkloadSection
from latentwire.elastic.footprint import (
    ALLOCATOR_SLACK,
    CONTEXT_BYTES,
    Footprint,
    FrozenModule,
    Probe,
    TrainedPart,
    cut,
    fitted,
    footprint_of,
    lay_out,
    predict,
    seconds_per_sample,
    weights_bytes,
)
from latentwire.workloads.pair import footprint as pair_footprint
from latentwire.workloads.pair.shapes import LLAMA_31_8B

A = FrozenModule(
    "a",
    num_layers=5,
    front_bytes=1000,
    layer_bytes=100,
    back_bytes=3000,
    layer_kept_bytes=70,
    layer_input_bytes=10,
    layer_working_bytes=40,
    back_kept_bytes=9,
    num_outputs=2,
    output_bytes=30,
    outputs_at_once=8,
    layer_forward_flops=1,
    layer_backward_flops=2,
    back_flops=10,
)
B = dataclasses.replace(A, name="b", front_bytes=500)
TRAINED = TrainedPart(num_parameters=7, bytes_per_parameter=20, kept_bytes=11, flops=4)
BOTH = Footprint((A, B), TRAINED)
ONE = {"a": (0,), "b": (0,)}
TWO = {"a": (0,), "b": (1,)}


def slack(num_bytes: int) -> int:
    return round(num_bytes * (1 + ALLOCATOR_SLACK))


# ---- Laying out ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 80), st.integers(1, 4))
def test_a_cut_gives_each_place_equally_many_layers(num_layers: int, num_places: int) -> None:
    parts = cut(num_layers, num_places)
    assert [layer for part in parts for layer in part] == list(range(num_layers))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("num_places", "modules"),
    [
        (1, ONE),
        (2, TWO),
        (3, {"a": (0, 1), "b": (2,)}),
        (4, {"a": (0, 1), "b": (2, 3)}),
        (5, {"a": (0, 1, 2), "b": (3, 4)}),
        (10, {"a": (0, 1, 2, 3, 4), "b": (5, 6, 7, 8, 9)}),
        (11, None),
    ],
)
def test_the_largest_model_is_cut_first(num_places: int, modules: Any) -> None:
    assert lay_out(BOTH, num_places) == modules


def test_with_few_places_models_stay_whole() -> None:
    c = dataclasses.replace(B, name="c", front_bytes=0)
    assert lay_out(Footprint((B, c, A), TRAINED), 2) == {"b": (1,), "c": (1,), "a": (0,)}
    assert lay_out(Footprint((), TRAINED), 1) == {}
    assert lay_out(Footprint((), TRAINED), 2) is None


def test_what_is_in_front_and_behind_goes_with_the_first_and_the_last_layers() -> None:
    assert weights_bytes(BOTH, {"a": (0, 1), "b": (2,)}) == (1000 + 300, 3000 + 200, B.weights_bytes)


# ---- Peak ------------------------------------------------------------------------------------------------------------


def test_the_peak_by_hand() -> None:
    trained, batch = 7 * 20, 3
    kept = batch * (5 * 70 + 9)
    transient = max(batch * 2 * 30, batch * 40)
    whole = CONTEXT_BYTES + trained + A.weights_bytes + B.weights_bytes + slack(2 * kept + transient + batch * 11)
    assert predict(BOTH, ONE, batch, False) == (whole,)
    one_by_one = dataclasses.replace(BOTH, one_by_one=True)
    single = CONTEXT_BYTES + trained + A.weights_bytes + B.weights_bytes + slack(kept + transient + batch * 11)
    assert predict(one_by_one, ONE, batch, False) == (single,)
    assert predict(BOTH, TWO, batch, False) == (
        CONTEXT_BYTES + trained + A.weights_bytes + slack(kept + transient + batch * 11),
        CONTEXT_BYTES + B.weights_bytes + slack(kept + transient),
    )
    recomputed = batch * (5 * 10 + 9) + batch * (40 + 70) + batch * 11
    assert predict(Footprint((A,), TRAINED), {"a": (0,)}, batch, True) == (
        CONTEXT_BYTES + trained + A.weights_bytes + slack(recomputed),
    )


def test_outputs_are_computed_a_few_rows_at_a_time() -> None:
    head = dataclasses.replace(A, num_layers=1, layer_kept_bytes=0, layer_working_bytes=0, back_kept_bytes=0)
    alone = Footprint((head,), dataclasses.replace(TRAINED, kept_bytes=0))
    peaks = [predict(alone, {"a": (0,)}, batch, False)[0] for batch in (1, 4, 5, 100)]
    assert peaks[1] - peaks[0] == slack(8 * 30) - slack(2 * 30)
    assert peaks[1:] == [peaks[1]] * 3


@given(st.integers(1, 100), st.integers(1, 100), st.booleans(), st.sampled_from([1, 2, 3, 4]))
def test_more_samples_never_take_less(few: int, more: int, checkpointing: bool, num_places: int) -> None:
    modules = lay_out(BOTH, num_places)
    assert modules is not None
    less, greater = (predict(BOTH, modules, size, checkpointing) for size in (few, few + more))
    assert all(a <= b for a, b in zip(less, greater, strict=True))


# ---- Pace ------------------------------------------------------------------------------------------------------------


def test_the_pace_by_hand() -> None:
    each = 5 * 3 + 10
    assert seconds_per_sample(BOTH, ONE, False, [1.0]) == 4 + 2 * each
    assert seconds_per_sample(BOTH, ONE, False, [2.0]) == (4 + 2 * each) / 2
    assert seconds_per_sample(BOTH, ONE, True, [1.0]) == 4 + 2 * (each + 5)
    assert seconds_per_sample(BOTH, TWO, False, [1.0, 1.0]) == 4 + each
    assert seconds_per_sample(BOTH, TWO, False, [1.0, 0.5]) == 4 + 2 * each
    assert seconds_per_sample(BOTH, {"a": (0, 1), "b": (2,)}, False, [1.0, 1.0, 1.0]) == 4 + each


# ---- Correction by measurements --------------------------------------------------------------------------------------


def measured(footprint: Footprint, scale: float, batch: int, checkpointing: bool) -> Probe:
    true = dataclasses.replace(footprint, activation_scale=scale)
    return Probe(batch, predict(true, TWO, batch, checkpointing)[0])


@given(st.floats(0.3, 3), st.integers(1, 50), st.booleans())
def test_a_probe_scales_the_activations(scale: float, batch: int, checkpointing: bool) -> None:
    probe = measured(BOTH, scale, batch, checkpointing)
    corrected = fitted(BOTH, probe, TWO, checkpointing)
    assert corrected.activation_scale == pytest.approx(scale, rel=0.02)
    assert predict(corrected, TWO, batch, checkpointing)[0] == pytest.approx(probe.peak_bytes, abs=1)
    assert fitted(corrected, probe, TWO, checkpointing) == corrected, "it starts from the workload's figures"


def test_less_than_the_weights_alone_is_taken_as_it_is() -> None:
    standing = CONTEXT_BYTES + 7 * 20 + A.weights_bytes
    below = fitted(BOTH, Probe(2, standing - 100), TWO, False)
    assert (predict(below, TWO, 2, False)[0], below.activation_scale) == (standing - 100, 1.0)


# ---- What a config's workload says -----------------------------------------------------------------------------------


RANDOM = {"init": "random", "shape": "full"}
DATA = {"kind": "pydoc"}


def test_a_workload_says_it_beside_itself() -> None:
    options = {"llama": RANDOM, "qwen": RANDOM, "data": DATA}
    section = WorkloadSection(target="latentwire.workloads.pair:PairWorkload", options=options)
    found = footprint_of(Config(name="a", workload=section))
    assert found is not None
    assert [module.name for module in found.modules] == ["llama", "qwen"]
    assert footprint_of(Config(name="a", workload=WorkloadSection(target="json:JSONDecoder"))) is None
    assert footprint_of(Config(name="a", workload=WorkloadSection(target="script"))) is None


REVISION = "0" * 40


def source(name: str) -> dict[str, Any]:
    return {"init": "pretrained", "source": name, "revision": REVISION}


def llama_footprint(model: dict[str, Any]) -> Footprint | None:
    return pair_footprint({"llama": model, "qwen": RANDOM, "data": DATA}, TrainSection())


def test_the_published_models_are_known_without_their_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    known, random = llama_footprint(source("meta-llama/Meta-Llama-3.1-8B-Instruct")), llama_footprint(RANDOM)
    assert known is not None
    assert random is not None
    assert known.modules == random.modules
    assert known.notes == (
        "llama: meta-llama/Meta-Llama-3.1-8B-Instruct is not on this machine, its published shape is taken",
    )
    assert llama_footprint(source("somebody/something")) is None


@pytest.mark.parametrize("place", ["hub", "home", "folder"])
def test_else_the_config_on_this_machine_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str) -> None:
    """In the hub's cache, where HF_HUB_CACHE or HF_HOME puts it, or in a folder of one's own."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    snapshot = Path("models--somebody--something") / "snapshots" / REVISION
    folder, model = tmp_path, {"init": "pretrained", "source": str(tmp_path)}
    if place != "folder":
        monkeypatch.setenv("HF_HUB_CACHE" if place == "hub" else "HF_HOME", str(tmp_path))
        folder, model = tmp_path / ("" if place == "hub" else "hub") / snapshot, source("somebody/something")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA_31_8B, "num_hidden_layers": 3}))
    found = llama_footprint(model)
    assert found is not None
    assert (found.modules[0].num_layers, found.notes) == (3, ())
    (folder / "config.json").write_text("[]")
    assert llama_footprint(model) is None


def test_what_is_trained_counts_what_the_config_asks_for() -> None:
    def per_parameter(**train: Any) -> int:
        found = pair_footprint({"llama": RANDOM, "qwen": RANDOM, "data": DATA}, TrainSection(**train))
        assert found is not None
        return found.trained.bytes_per_parameter

    assert per_parameter(ema_decay=0.9) == per_parameter() + 4
    assert per_parameter(precision="fp32") == per_parameter() - 2, "autocast makes no copies"
