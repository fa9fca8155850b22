"""What a config may say about the pair, under ``workload.options``."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from latentwire.config import Fraction, Positive, Section

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")


class ModelOptions(Section):
    """Where one frozen model comes from."""

    init: Literal["pretrained", "random"] = "pretrained"
    source: str | None = None
    """For ``pretrained``: a hub id ``owner/name``, or a folder written with a leading ``/``, ``.`` or ``~``."""
    revision: str | None = None
    """The commit of the hub id, 40 hexadecimal digits: a branch name would let the weights change under a run."""
    shape: Literal["tiny", "full"] | None = None
    """For ``random``: ``full`` has the numbers of the 8B or 7B model, ``tiny`` runs on a laptop."""
    use_chat_template: bool = False
    """Put the latents where a user's message would stand, and the target where the assistant answers."""

    @property
    def is_folder(self) -> bool:
        """Whether ``source`` is a folder rather than a hub id."""
        return self.source is not None and self.source.startswith(("/", ".", "~"))

    @pydantic.model_validator(mode="after")
    def _can_be_loaded(self) -> ModelOptions:
        if self.init == "random":
            self._refuse_pretrained_keys()
        elif self.source is None:
            raise ValueError("init: pretrained needs source: a hub id or a folder; or set init: random and a shape")
        elif self.shape is not None:
            raise ValueError("shape belongs to init: random; a pretrained model brings its own, so remove shape")
        elif self.is_folder:
            if self.revision is not None:
                raise ValueError(f"a folder has no revision: remove revision, or name a hub id (source {self.source})")
        else:
            self._check_hub_id(self.source)
        return self

    def _refuse_pretrained_keys(self) -> None:
        if self.shape is None:
            raise ValueError("init: random needs shape: tiny or full")
        if self.source is not None or self.revision is not None:
            raise ValueError("init: random loads nothing: set source and revision to null, or init: pretrained")

    def _check_hub_id(self, source: str) -> None:
        if not HUB_ID.fullmatch(source):
            raise ValueError(
                f"source {source!r} is no hub id owner/name; write a folder with a leading '/', './' or '~'"
            )
        if self.revision is None or not COMMIT.fullmatch(self.revision):
            raise ValueError(
                f"revision must pin {source} to a commit of 40 hexadecimal digits; they are listed at "
                f"https://huggingface.co/{source}/commits/main"
            )


class WireOptions(Section):
    """The trained part: byte encoder, latents, adapters."""

    latent_len: Positive = 32
    """Latent vectors per source text."""
    d_z: Positive = 256
    """Width of a latent vector."""
    d_model: Positive = 512
    """Width inside the encoder."""
    byte_layers: Annotated[int, Field(ge=0)] = 4
    """Self-attention layers over the source bytes."""
    latent_layers: Positive = 4
    """Layers in which the latent queries read the bytes, then each other."""
    heads: Positive = 8
    dropout: Annotated[Fraction, Field(lt=1)] = 0.0

    @pydantic.model_validator(mode="after")
    def _heads_fit(self) -> WireOptions:
        if self.d_model % self.heads:
            raise ValueError(
                f"d_model ({self.d_model}) must be a multiple of heads ({self.heads}): "
                f"try d_model: {self.heads * round(self.d_model / self.heads) or self.heads}"
            )
        return self


class DataOptions(Section):
    """Pairs of source and target text."""

    kind: Literal["squad", "jsonl", "datasets", "pydoc"]
    """``squad``: SQuAD-format JSON; ``jsonl``: one ``{"source", "target"}`` a line; ``datasets``: a name for the
    library of that name; ``pydoc``: the English prose that ships with every CPython."""
    path: str | None = None
    """File of ``squad`` and ``jsonl``."""
    eval_path: str | None = None
    """A second file, to evaluate on; without it ``eval_size`` pairs are taken out of the first."""
    name: str | None = None
    """Name for ``datasets``; its rows are like those of ``jsonl`` or of SQuAD."""
    split: str = "train"
    eval_split: str | None = None
    train_size: Positive | None = None
    """Use only so many training pairs."""
    eval_size: Annotated[int, Field(ge=0)] = 256
    """So many evaluation pairs at most, chosen by the hash of their text."""
    max_source_bytes: Positive = 1024
    """Longer sources are cut; of a SQuAD source the context is cut and the question kept."""
    max_target_tokens: Positive = 96
    """Longer targets are cut, and then have no end-of-text token."""

    @pydantic.model_validator(mode="after")
    def _has_its_keys(self) -> DataOptions:
        is_file, is_named = self.kind in ("squad", "jsonl"), self.kind == "datasets"
        if is_file != (self.path is not None):
            raise ValueError(
                f"kind: {self.kind} " + ("needs path: a file" if is_file else "reads no file: remove path")
            )
        if is_named != (self.name is not None):
            raise ValueError(
                f"kind: {self.kind} " + ("needs name: a data set" if is_named else "takes no name: remove it")
            )
        if self.eval_path is not None and not is_file:
            raise ValueError(f"kind: {self.kind} reads no file: remove eval_path")
        if self.eval_split is not None and not is_named:
            raise ValueError(f"kind: {self.kind} has no named splits: remove eval_split and set eval_size")
        return self


class Options(Section):
    """``workload.options`` of the pair."""

    llama: ModelOptions
    qwen: ModelOptions
    wire: WireOptions = WireOptions()
    data: DataOptions
    compile: bool = False
    """Compile the models' layers for the GPU: a third faster on an H200, for 15 s at a node's first start. Rounds
    otherwise than without."""
