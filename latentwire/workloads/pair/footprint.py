"""What the pair takes, by arithmetic from its shapes: neither torch nor transformers, nor any weights, are needed."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentwire.config import TrainSection
from latentwire.elastic.footprint import Footprint, FrozenModule, TrainedPart
from latentwire.workloads.pair.options import ModelOptions, Options, WireOptions
from latentwire.workloads.pair.shapes import LLAMA_31_8B, QWEN25_7B, SHAPES

# ---- What cannot be derived from shapes ------------------------------------------------------------------------------

LOGITS_AT_ONCE = 1024
"""Rows of logits: ``cross_entropy.CHUNK_ROWS``, whose module needs torch."""

LOGIT_WORK_BYTES = 17
"""Of each logit beside itself while its error is computed: float32 logits, their exponentials, what should be predicted
as bool and as float32, and the difference, from the order of the operations of ``cross_entropy.errors``."""

HEAD_TOKENS, TAIL_TOKENS = 30, 10
"""With a chat template: what stands before the soft prefix and between it and the target. Llama 3.1's template has 30
and 5, Qwen2.5's 24 and 5. The head is read once for all; samples attend to it."""

WORKING_WIDTHS = (4, 2)
"""Tensors of a token's intermediate and hidden size that are alive while the backward pass is in one layer's MLP, from
the order of its operations: gradients of the product, of its two factors and of the gate; residual and its gradient."""

BYTES_TRAINED = 4 + 4 + 8
"""Of each trained parameter in float32: weight, gradient, AdamW's two moments."""

REDUCTION_SUMS = 3
"""Sums that the reduction holds beside the gradient that grows, at most, for any number of micro-batches and ranks: it
adds quarters and halves of the batch as soon as they are there. What it sends comes when activations have gone."""

EFFICIENCY, EFFICIENCY_COMPILED = 0.47, 0.60
"""Of a data sheet's TFLOP/s, on one H200 in bf16: ``benchmarks/pair_step.py --shape full``."""

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "meta-llama/Meta-Llama-3.1-8B-Instruct": LLAMA_31_8B,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_31_8B,
    "meta-llama/Llama-3.1-8B": LLAMA_31_8B,
    "Qwen/Qwen2.5-7B-Instruct": QWEN25_7B,
    "Qwen/Qwen2.5-7B": QWEN25_7B,
}
"""Hub ids whose shape is known without their config.json."""


def footprint(options: Mapping[str, Any], train: TrainSection) -> Footprint | None:
    """What the pair takes; None where a model's config.json is not on this machine and its shape is not known.

    Reads at most that file of each model; called by the agent and by ``latentwire plan``.
    """
    checked = Options.model_validate(options)
    notes: list[str] = []
    models: dict[str, DecoderShape] = {}
    for name in SHAPES:
        numbers = _numbers(name, getattr(checked, name), notes)
        if numbers is None:
            return None
        models[name] = DecoderShape.of(SHAPES[name].model_type, numbers)
    number_bytes = 4 if train.precision == "fp32" else 2
    modules = tuple(_frozen(name, model, checked, number_bytes) for name, model in models.items())
    widths = {name: model.hidden for name, model in models.items()}
    trained = _trained(checked.wire, checked.data.max_source_bytes, widths, train, number_bytes)
    efficiency = EFFICIENCY_COMPILED if checked.compile else EFFICIENCY
    return Footprint(modules, trained, True, efficiency, tuple(notes))


# ---- The frozen models -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DecoderShape:
    """The sizes of a Llama or Qwen2 decoder. Counts of parameters are exact."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab: int
    is_tied: bool
    has_qkv_bias: bool
    has_out_bias: bool
    has_mlp_bias: bool

    @classmethod
    def of(cls, model_type: str, numbers: Mapping[str, Any]) -> DecoderShape:
        """From what a config.json says, with the defaults of the family where it says nothing."""
        hidden, heads = int(numbers["hidden_size"]), int(numbers["num_attention_heads"])
        attention_bias = bool(numbers.get("attention_bias", False))
        return cls(
            hidden,
            int(numbers["intermediate_size"]),
            int(numbers["num_hidden_layers"]),
            heads,
            int(numbers.get("num_key_value_heads") or heads),
            int(numbers.get("head_dim") or hidden // heads),
            int(numbers["vocab_size"]),
            is_tied=bool(numbers.get("tie_word_embeddings", False)),
            has_qkv_bias=attention_bias or model_type == "qwen2",
            has_out_bias=attention_bias and model_type == "llama",
            has_mlp_bias=bool(numbers.get("mlp_bias", False)) and model_type == "llama",
        )

    @property
    def query_size(self) -> int:
        """All heads side by side."""
        return self.num_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """All heads of keys, or of values, side by side."""
        return self.num_key_value_heads * self.head_dim

    @property
    def matrix_parameters(self) -> int:
        """Of one layer, those that take part in products."""
        return self.hidden * (2 * self.query_size + 2 * self.key_size + 3 * self.intermediate)

    @property
    def layer_parameters(self) -> int:
        """Of one layer: products, two norms, biases."""
        biases = self.has_qkv_bias * (self.query_size + 2 * self.key_size)
        biases += self.has_out_bias * self.hidden + self.has_mlp_bias * (2 * self.intermediate + self.hidden)
        return self.matrix_parameters + 2 * self.hidden + biases

    @property
    def front_parameters(self) -> int:
        """Embeddings."""
        return self.vocab * self.hidden

    @property
    def back_parameters(self) -> int:
        """Last norm, and the head where it has weights of its own."""
        return self.hidden + (0 if self.is_tied else self.vocab * self.hidden)

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return self.front_parameters + self.num_layers * self.layer_parameters + self.back_parameters

    def layer_kept_bytes(self, length: int, num_past: int, number_bytes: int, is_compiled: bool) -> int:
        """What autograd keeps of a layer with frozen weights for a sequence; a product keeps nothing but its weights.

        The inputs of both norms and their inverse means in float32; gate, its SiLU and the other factor. Compiled, the
        norms' inputs are kept as they came and the SiLU is computed again. Of these and of what the sequence
        continues: queries, keys, values, what attention makes of them and its float32 normaliser.
        """
        attention = 2 * (self.query_size + self.key_size) * number_bytes + 4 * self.num_heads
        if is_compiled:
            rest = (2 * self.hidden + 2 * self.intermediate) * number_bytes + 2 * 4
        else:
            rest = 2 * 4 * (self.hidden + 1) + 3 * self.intermediate * number_bytes
        return length * rest + (length + num_past) * attention

    def layer_working_bytes(self, length: int, number_bytes: int) -> int:
        """Taken beside that, while the backward pass is in the layer."""
        wide, narrow = WORKING_WIDTHS
        return length * number_bytes * (wide * self.intermediate + narrow * self.hidden)

    def attention_flops(self, length: int) -> int:
        """Forward, of one layer: scores and mixing, of what each position may read."""
        return 2 * length**2 * self.query_size


def _frozen(name: str, shape: DecoderShape, options: Options, number_bytes: int) -> FrozenModule:
    model: ModelOptions = getattr(options, name)
    targets = options.data.max_target_tokens
    num_past = HEAD_TOKENS if model.use_chat_template else 0
    length = options.wire.latent_len + (TAIL_TOKENS if model.use_chat_template else 1) + targets - 1
    products, attention = 2 * length * shape.matrix_parameters, shape.attention_flops(num_past + length)
    return FrozenModule(
        name,
        num_layers=shape.num_layers,
        front_bytes=shape.front_parameters * number_bytes,
        layer_bytes=shape.layer_parameters * number_bytes,
        back_bytes=shape.back_parameters * number_bytes,
        layer_kept_bytes=shape.layer_kept_bytes(length, num_past, number_bytes, options.compile),
        layer_input_bytes=length * shape.hidden * number_bytes,
        layer_working_bytes=shape.layer_working_bytes(length, number_bytes),
        # of each state that predicts: the last norm's, its gradient, which is known at once, and its place
        back_kept_bytes=targets * (4 * (shape.hidden + 1) + shape.hidden * number_bytes + 8),
        num_outputs=targets,
        output_bytes=shape.vocab * (number_bytes + (number_bytes if options.compile else LOGIT_WORK_BYTES)),
        outputs_at_once=LOGITS_AT_ONCE,
        layer_forward_flops=products + attention,
        layer_backward_flops=products + 2 * attention,  # no gradient of a frozen weight
        back_flops=2 * 2 * targets * shape.vocab * shape.hidden,
    )


# ---- The wire --------------------------------------------------------------------------------------------------------


def num_wire_parameters(wire: WireOptions, max_source_bytes: int, widths: Mapping[str, int]) -> int:
    """Of ``LatentWire``; ``widths`` are the hidden sizes of the models by name. Exact."""
    width, d_z = wire.d_model, wire.d_z
    block = 12 * width**2 + 13 * width
    blocks = (wire.byte_layers + 2 * wire.latent_layers) * block
    tables = (257 + max_source_bytes + wire.latent_len) * width
    out = 2 * width + 2 * width + width * d_z + d_z  # the norm of the bytes, then norm and product
    adapters = sum(2 * d_z + 2 * d_z * (d_z + 1) + 2 * d_z * hidden + 2 * hidden for hidden in widths.values())
    return blocks + tables + out + adapters


def _trained(
    wire: WireOptions, max_source_bytes: int, widths: Mapping[str, int], train: TrainSection, number_bytes: int
) -> TrainedPart:
    num_bytes = BYTES_TRAINED + 4 * REDUCTION_SUMS
    num_bytes += 4 * (train.ema_decay is not None)
    num_bytes += number_bytes if number_bytes < 4 else 0  # autocast keeps a copy of each weight
    return TrainedPart(
        num_wire_parameters(wire, max_source_bytes, widths),
        num_bytes,
        _wire_kept_bytes(wire, max_source_bytes, widths, number_bytes),
        _wire_flops(wire, max_source_bytes, widths),
    )


def _wire_kept_bytes(wire: WireOptions, length: int, widths: Mapping[str, int], number_bytes: int) -> int:
    """What autograd keeps of the wire for one sample: float32 between the blocks, the compute dtype inside."""
    own = wire.latent_layers * wire.latent_len
    readers = wire.byte_layers * length + own  # positions that attend to themselves
    dropped = 2 * (wire.dropout > 0)
    # Of each position of a block and its width: the inputs of both norms; the norms' outputs, cast for each product;
    # queries; attention's output; the MLP's hidden state before and after GELU.
    inside = 2 * 4 + number_bytes * (1 + 1 + 1 + 1 + 4 + 4) + dropped
    kept = inside * (readers + own)
    # Keys and values, of all bytes in a block that crosses; and what they are made from, cast anew for each block.
    pairs = readers + wire.latent_layers * length
    kept += number_bytes * (2 * pairs + (pairs if number_bytes < 4 else length))
    outside = 4 * (length + wire.latent_len) + number_bytes * wire.latent_len
    adapters = sum(
        wire.latent_len * (4 * wire.d_z + number_bytes * (1 + 2 + 2) * wire.d_z + 2 * 4 * hidden)
        for hidden in widths.values()
    )
    return wire.d_model * (kept + outside) + adapters


def _wire_flops(wire: WireOptions, length: int, widths: Mapping[str, int]) -> int:
    """Forward, and twice that backward."""
    width, latents = wire.d_model, wire.latent_len
    byte_block = 2 * length * 12 * width**2 + 4 * length**2 * width
    latent_block = 2 * latents * 12 * width**2 + 4 * latents**2 * width
    cross_block = 2 * (latents * 10 + length * 2) * width**2 + 4 * latents * length * width
    adapters = sum(2 * latents * 2 * wire.d_z * (wire.d_z + hidden) for hidden in widths.values())
    forward = wire.byte_layers * byte_block + wire.latent_layers * (latent_block + cross_block) + adapters
    return 3 * forward


# ---- Where the sizes are read ----------------------------------------------------------------------------------------


def _numbers(name: str, options: ModelOptions, notes: list[str]) -> Mapping[str, Any] | None:
    """What the model's config.json says, or will say; adds to ``notes`` what was assumed."""
    if options.init == "random":
        return SHAPES[name].numbers(options.shape or "tiny")
    assert options.source is not None, "the options refuse a pretrained model without a source"
    folder = Path(options.source).expanduser() if options.is_folder else _cached(options.source, options.revision or "")
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        DecoderShape.of(SHAPES[name].model_type, found)
    except (OSError, ValueError, KeyError, TypeError):
        numbers = PUBLISHED.get(options.source)
        if numbers is not None:
            notes.append(f"{name}: {options.source} is not on this machine, its published shape is taken")
        return numbers
    return found if isinstance(found, dict) else None


def _cached(hub_id: str, revision: str) -> Path:
    """Where huggingface_hub keeps a model, found as it does; asked here without it, as it takes long to import."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    home = Path(os.environ.get("HF_HOME") or home)
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub"
    return Path(cache).expanduser() / f"models--{hub_id.replace('/', '--')}" / "snapshots" / revision
