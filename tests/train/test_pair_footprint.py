"""The pair's footprint against the real modules: every parameter, and what autograd keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import init_empty_weights
from accelerate.utils import compute_module_sizes

from latentwire.config import TrainSection
from latentwire.elastic.footprint import FrozenModule
from latentwire.workloads.pair import Options, footprint
from latentwire.workloads.pair.attention import install
from latentwire.workloads.pair.batch import TargetBatch
from latentwire.workloads.pair.cross_entropy import CHUNK_ROWS
from latentwire.workloads.pair.data import pydoc_passages
from latentwire.workloads.pair.families import FAMILIES
from latentwire.workloads.pair.footprint import (
    HEAD_TOKENS,
    LOGITS_AT_ONCE,
    TAIL_TOKENS,
    DecoderShape,
    num_wire_parameters,
)
from latentwire.workloads.pair.frozen import FrozenModel, error_function, read_once, trained_through
from latentwire.workloads.pair.options import WireOptions
from latentwire.workloads.pair.tokenizer import DIALECTS, Script, make_script, train_tokenizer
from latentwire.workloads.pair.wire import LatentWire

BATCH = 7
"""Divides no size of a weight, so that what has it as a factor of its first dimension is an activation."""

LATENTS, TARGETS = 33, 12


def make_options(shape: str, **wire: Any) -> dict[str, Any]:
    model = {"init": "random", "shape": shape}
    data = {"kind": "pydoc", "max_source_bytes": 96, "max_target_tokens": TARGETS}
    return Options.model_validate({"llama": model, "qwen": model, "wire": wire, "data": data}).model_dump(mode="json")


def of_pair(shape: str, precision: str = "bf16", **wire: Any) -> Any:
    found = footprint(make_options(shape, **wire), TrainSection(precision=precision))
    assert found is not None
    return found


def kept_bytes(weights: Iterable[torch.Tensor], forward: Callable[[], Any]) -> int:
    """What autograd keeps of a forward pass with ``BATCH`` samples for each of them: no weights, no storage twice."""
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in known and tensor.dim() and tensor.shape[0] % BATCH == 0:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    assert result.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) // BATCH


# ---- Parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["tiny", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_of_a_frozen_model_is_counted(name: str, shape: str) -> None:
    family = FAMILIES[name]
    with init_empty_weights():
        model = family.model_class(family.config(shape)).to(torch.bfloat16)
    numbers = DecoderShape.of(family.model_type, family.numbers(shape))
    assert numbers.num_parameters == sum(p.numel() for p in model.parameters())
    module: FrozenModule = next(m for m in of_pair(shape).modules if m.name == name)
    sizes = compute_module_sizes(model)
    assert module.weights_bytes == 2 * numbers.num_parameters
    assert module.num_layers == len(model.model.layers)
    assert module.front_bytes == sizes["model.embed_tokens"]
    assert module.layer_bytes == sizes["model.layers.0"]
    assert module.back_bytes == sizes["model.norm"] + sizes["lm_head"]


def test_the_published_sizes() -> None:
    assert [module.weights_bytes for module in of_pair("full").modules] == [2 * 8_030_261_248, 2 * 7_615_616_512]


@pytest.mark.parametrize(
    "options",
    [
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4, "head_dim": 16},
    ],
)
def test_variants_that_a_config_json_may_name(options: dict[str, Any]) -> None:
    family = FAMILIES["llama"]
    numbers = {**family.numbers("tiny"), "tie_word_embeddings": False, **options}
    with init_empty_weights():
        model = family.model_class(family.config_class(**numbers))
    model.tie_weights()
    assert DecoderShape.of("llama", numbers).num_parameters == sum(p.numel() for p in model.parameters())


WIRES = [
    {"latent_len": 8, "d_z": 32, "d_model": 32, "byte_layers": 2, "latent_layers": 1, "heads": 2},
    {"latent_len": 16, "d_z": 64, "d_model": 64, "byte_layers": 0, "latent_layers": 3, "heads": 4},
    {},
]


@pytest.mark.parametrize("options", WIRES)
def test_every_parameter_of_the_wire_is_counted(options: dict[str, Any]) -> None:
    wire_options, widths = WireOptions(**options), {"llama": 4096, "qwen": 3584}
    with torch.device("meta"):
        wire = LatentWire(wire_options, 1024, {name: (width, 1.0) for name, width in widths.items()})
    counted = num_wire_parameters(wire_options, 1024, widths)
    assert counted == sum(p.numel() for p in wire.parameters() if p.requires_grad)
    assert len(list(wire.buffers())) == 0


# ---- Activations -----------------------------------------------------------------------------------------------------


def frozen(name: str, dtype: torch.dtype, checkpointed: bool, template: tuple[int, int] = (1, 0)) -> FrozenModel:
    """With so many tokens before the soft prefix and behind it."""
    family, cpu = FAMILIES[name], torch.device("cpu")
    model = family.model_class._from_config(family.config("tiny"), dtype=dtype, attn_implementation=install())
    layers = trained_through(model.requires_grad_(False).eval(), compiled=False, checkpointed=checkpointed)
    head, tail = (torch.zeros(1, length, model.config.hidden_size, dtype=dtype) for length in template)
    head, past = read_once(model, head, (cpu,))
    return FrozenModel(name, model, Path(), cast(Script, None), head, past, tail, (cpu,), layers, error_function(False))


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_autograd_keeps_of_a_frozen_model(name: str, dtype: torch.dtype, checkpointed: bool) -> None:
    """To the byte."""
    module = of_model(name, dtype)
    of_layer = module.layer_input_bytes if checkpointed else module.layer_kept_bytes
    assert kept_of_loss(frozen(name, dtype, checkpointed)) == module.num_layers * of_layer + module.back_kept_bytes


@pytest.mark.parametrize("name", FAMILIES)
def test_what_autograd_keeps_beside_a_template_that_is_read_once(name: str) -> None:
    """To the byte: attention keeps its keys and values with each sample's, and nothing else is kept of it."""
    options = make_options("tiny", latent_len=LATENTS)
    options[name]["use_chat_template"] = True
    found = footprint(options, TrainSection(precision="fp32"))
    assert found is not None
    module = next(module for module in found.modules if module.name == name)
    model = frozen(name, torch.float32, False, (HEAD_TOKENS, TAIL_TOKENS))
    assert model.head.shape[1] == 0
    assert kept_of_loss(model) == module.num_layers * module.layer_kept_bytes + module.back_kept_bytes


def of_model(name: str, dtype: torch.dtype) -> FrozenModule:
    found = of_pair("tiny", "fp32" if dtype == torch.float32 else "bf16", latent_len=LATENTS)
    return next(module for module in found.modules if module.name == name)


def kept_of_loss(model: FrozenModel) -> int:
    tokens = torch.zeros(BATCH, TARGETS, dtype=torch.long)
    target = TargetBatch(tokens, torch.arange(BATCH * TARGETS), tokens.flatten())
    prefix = torch.zeros(BATCH, LATENTS, model.hidden_size, requires_grad=True)
    return kept_bytes(model.model.parameters(), lambda: model.loss(prefix, target))


def test_the_loss_is_computed_in_chunks_of_the_assumed_size() -> None:
    assert LOGITS_AT_ONCE == CHUNK_ROWS


@pytest.mark.parametrize("options", WIRES[:2])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_what_autograd_keeps_of_the_wire(options: dict[str, Any], precision: str) -> None:
    """To within a twentieth: means and normalisers are left out."""
    wire = LatentWire(WireOptions(**options), 96, {"llama": (128, 1.0), "qwen": (128, 1.0)}).train()

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            latents = wire.encode(torch.zeros(BATCH, 96, dtype=torch.long))
            return torch.cat([wire.prefix(name, latents) for name in ("llama", "qwen")])

    expected = of_pair("tiny", precision, **options).trained.kept_bytes
    assert kept_bytes(wire.parameters(), forward) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", DIALECTS)
def test_the_chat_template_is_no_longer_than_assumed(name: str) -> None:
    texts = [text for pair in pydoc_passages() for text in pair]
    tokenizer = train_tokenizer(DIALECTS[name], FAMILIES[name].tiny_vocab, texts)
    script = make_script(name, tokenizer, use_chat_template=True)
    assert len(script.head) <= HEAD_TOKENS
    assert len(script.tail) <= TAIL_TOKENS
