"""The text side of a frozen model: its tokenizer, and what stands around the soft prefix and the target."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from latentwire.errors import WorkloadError

PLACEHOLDER = "[the latents stand here]"
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|endoftext|>")
"""What Llama 3.1 and Qwen 2.5 keep for padding, should a tokenizer not name its pad token."""

LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The special tokens and the chat template of a tokenizer that is trained here, like those of the real family."""

    special_tokens: Sequence[str]
    named: Mapping[str, str]
    chat_template: str


DIALECTS: Mapping[str, Dialect] = {
    # Like the real one, it keeps a token for padding and does not call it its pad token.
    "llama": Dialect(
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|finetune_right_pad_id|>"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        LLAMA_TEMPLATE,
    ),
    "qwen": Dialect(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        CHATML_TEMPLATE,
    ),
}


def train_tokenizer(dialect: Dialect, vocab_size: int, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; the same texts give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(dialect.special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=dialect.chat_template,
        extra_special_tokens=[t for t in dialect.special_tokens if t not in dialect.named.values()],
        **dialect.named,
    )


@dataclasses.dataclass(frozen=True)
class Script:
    """All that a frozen model is given besides the soft prefix: ``head``, soft prefix, ``tail``, target, end.

    Without a chat template the head is the BOS token, where the model has one, and the tail is empty. With one, the
    soft prefix stands where the user's words would, and the target is the assistant's answer.

    Pickled into DataLoader workers, so it holds the tokenizer and nothing of the model.
    """

    tokenizer: PreTrainedTokenizerFast
    head: tuple[int, ...]
    tail: tuple[int, ...]
    eos_id: int
    pad_id: int

    def targets(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Token ids of every target with its end token; one that is cut at ``max_tokens`` has no end token."""
        encoded = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [[*ids, self.eos_id][:max_tokens] for ids in encoded]


def make_script(name: str, tokenizer: PreTrainedTokenizerFast, use_chat_template: bool) -> Script:
    """Find a model's special tokens and lay out its input.

    Raises:
        WorkloadError: the tokenizer has no end token, or no chat template that shows a user's words.
    """
    if tokenizer.eos_token_id is None:
        raise WorkloadError(
            f"{name}: its tokenizer ({tokenizer.name_or_path}) names no eos_token, so a target could not end; "
            "add eos_token to its tokenizer_config.json"
        )
    head, tail = _chat_frame(name, tokenizer) if use_chat_template else (_bos(tokenizer), ())
    return Script(tokenizer, head, tail, tokenizer.eos_token_id, _pad_id(tokenizer))


def _bos(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    return () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)


def _pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    return next((vocabulary[t] for t in PAD_TOKENS if t in vocabulary), int(tokenizer.eos_token_id))


def _chat_frame(name: str, tokenizer: PreTrainedTokenizerFast) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if tokenizer.chat_template is None:
        raise WorkloadError(
            f"{name}: use_chat_template is set, and its tokenizer ({tokenizer.name_or_path}) has no chat template; "
            f"set workload.options.{name}.use_chat_template: false, or use the instruct version of the model"
        )
    message: list[dict[str, Any]] = [{"role": "user", "content": PLACEHOLDER}]
    # Llama's template writes a date: given, it is the same on every day of a run.
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024")
    head, found, tail = str(text).partition(PLACEHOLDER)
    if not found:
        raise WorkloadError(
            f"{name}: the chat template of {tokenizer.name_or_path} does not show the user's words; "
            f"set workload.options.{name}.use_chat_template: false"
        )
    return tuple(_ids(tokenizer, head)), tuple(_ids(tokenizer, tail))


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
