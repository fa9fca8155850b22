"""Numbers of the two model families: the published ones, and tiny ones for machines without weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

TINY: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    # About 1/sqrt(hidden_size): untrained layers then pass signals on at full strength, so that a soft prefix can
    # steer the output. With the usual 0.02 a model this narrow ignores its input.
    "initializer_range": 0.1,
}

LLAMA_31_8B: Mapping[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}

QWEN25_7B: Mapping[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The numbers of one model family.

    Attributes:
        model_type: what ``config.json`` of such a model says.
        full: what it says of the published model.
        tiny_vocab: size of the tokenizer that is trained for a random model of this family.
    """

    model_type: str
    full: Mapping[str, Any]
    tiny_vocab: int

    def numbers(self, shape: str) -> dict[str, Any]:
        """What the config of the named shape, ``tiny`` or ``full``, says."""
        return dict(self.full) if shape == "full" else {**TINY, "vocab_size": self.tiny_vocab}


# The two vocabularies differ in size, as the real ones do, so that mixing them up cannot go unnoticed.
SHAPES: Mapping[str, Shapes] = {
    "llama": Shapes("llama", LLAMA_31_8B, tiny_vocab=1024),
    "qwen": Shapes("qwen2", QWEN25_7B, tiny_vocab=1152),
}
