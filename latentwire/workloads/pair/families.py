"""The two model families as classes of transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from latentwire.workloads.pair.shapes import SHAPES, Shapes


@dataclasses.dataclass(frozen=True)
class Family(Shapes):
    """One architecture, with its numbers."""

    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]

    def config(self, shape: str) -> PreTrainedConfig:
        """The config of the named shape, with weights that are not tied; token ids are the tokenizer's business."""
        fixed = {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None}
        return self.config_class(**self.numbers(shape), **fixed)


FAMILIES: Mapping[str, Family] = {
    "llama": Family(**vars(SHAPES["llama"]), config_class=LlamaConfig, model_class=LlamaForCausalLM),
    "qwen": Family(**vars(SHAPES["qwen"]), config_class=Qwen2Config, model_class=Qwen2ForCausalLM),
}
