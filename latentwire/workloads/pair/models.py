"""The two frozen models: found, loaded, checked."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from latentwire.errors import WorkloadError
from latentwire.workloads.base import BuildContext
from latentwire.workloads.pair.data import pydoc_passages
from latentwire.workloads.pair.digests import folder_digest, module_digest
from latentwire.workloads.pair.families import FAMILIES, Family
from latentwire.workloads.pair.folders import make_once
from latentwire.workloads.pair.options import ModelOptions
from latentwire.workloads.pair.tokenizer import DIALECTS, Script, make_script, train_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DOWNLOADED = ("*.safetensors", "*.json", "*.txt", "*.jinja")
CACHE_FORMAT = 1
"""Part of every cached folder's name: raise it when what is built into one changes."""


@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """One model on its device, in evaluation mode, that takes no gradient into its weights.

    Attributes:
        folder: what it was loaded from; holds only a tokenizer where the weights were drawn in place.
        script: its tokens.
        head, tail: (1, n, H) embeddings of the script's fixed tokens, made once.
    """

    name: str
    model: PreTrainedModel
    folder: Path
    script: Script
    head: Tensor
    tail: Tensor

    @property
    def hidden_size(self) -> int:
        """Width of its embedding space."""
        return int(self.model.config.hidden_size)

    def embedding_rms(self) -> float:
        """Root mean square of all its input embeddings. Waits for the device."""
        weight = self.model.get_input_embeddings().weight
        return float(weight.detach().float().square().mean().sqrt())

    def digest(self, cache: Path, safe_point: Callable[[], None]) -> str:
        """SHA-256 of its weights and files; blocks while they are read."""
        digest = folder_digest(self.folder, cache, safe_point)
        if _has_weights(self.folder):
            return digest
        return hashlib.sha256(f"{digest} {module_digest(self.model, safe_point)}".encode()).hexdigest()


def load_frozen(name: str, options: ModelOptions, context: BuildContext) -> FrozenModel:
    """Load one model as its options say, onto ``context.device`` in ``context.compute_dtype``. Blocks.

    Safe points are passed before a download, before anything is made, and before the weights are loaded.

    Raises:
        WorkloadError: the folder or a file in it is missing, damaged or of another family, or the hub refuses.
    """
    family = FAMILIES[name]
    context.safe_point()
    folder = _find_folder(name, options, family, context)
    script = make_script(name, _load_tokenizer(name, folder), options.use_chat_template)
    context.safe_point()
    draws_in_place = options.init == "random" and options.shape == "full"
    model = _draw(family, "full", context) if draws_in_place else _load(name, family, folder, context)
    model.requires_grad_(False).eval()
    if context.gradient_checkpointing:
        _checkpoint_layers(model)
    head, tail = (_embed(model, ids, context.device) for ids in (script.head, script.tail))
    return FrozenModel(name, model, folder, script, head, tail)


def _embed(model: PreTrainedModel, ids: tuple[int, ...], device: torch.device) -> Tensor:
    embeddings: Tensor = model.get_input_embeddings()(torch.tensor([ids], dtype=torch.long, device=device))
    return embeddings


def _find_folder(name: str, options: ModelOptions, family: Family, context: BuildContext) -> Path:
    if options.init == "random":
        return _random_folder(name, options.shape or "tiny", family, context)
    assert options.source is not None, "the options refuse a pretrained model without a source"
    if not options.is_folder:
        return _download(name, options.source, options.revision or "")
    folder = Path(options.source).expanduser()
    if not folder.is_dir():
        raise WorkloadError(
            f"{name}: there is no model folder {folder.absolute()}; set workload.options.{name}.source to a folder "
            "with config.json, tokenizer.json and *.safetensors, or to a hub id owner/name"
        )
    return folder


def _download(name: str, source: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    fetch = functools.partial(
        snapshot_download, source, revision=revision, allow_patterns=list(DOWNLOADED), ignore_patterns=["original/*"]
    )
    try:  # a pinned commit never changes: where it is complete on disk, the hub need not be asked
        folder = Path(fetch(local_files_only=True))
        if _missing_files(folder) == []:
            return folder
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(fetch())
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise WorkloadError(
            f"{name}: {source} at {revision} is not on this machine and cannot be fetched: {error}\n"
            f"Accept the model's terms at https://huggingface.co/{source}, run `hf auth login`, then, where there is "
            f"internet, `hf download {source} --revision {revision}`; or set workload.options.{name}.source to a folder"
        ) from error


def _random_folder(name: str, shape: str, family: Family, context: BuildContext) -> Path:
    """The folder of a random model's tokenizer and, if it is tiny, of its weights; made when first needed."""
    texts = [text for pair in pydoc_passages() for text in pair]
    corpus = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    recipe = [CACHE_FORMAT, name, shape, context.seed, family.numbers(shape), corpus]
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]

    def make(folder: Path) -> None:
        tokenizer = train_tokenizer(DIALECTS[name], family.tiny_vocab, texts)
        tokenizer.save_pretrained(folder)
        if shape == "tiny":
            on_cpu = dataclasses.replace(context, device=torch.device("cpu"), compute_dtype=torch.float32)
            _draw(family, shape, on_cpu).save_pretrained(folder)

    return make_once(context.run_path.parent / "cache" / f"{name}-{shape}-{key}", make)


def _draw(family: Family, shape: str, context: BuildContext) -> PreTrainedModel:
    """Draw random weights on the device, from the seed and the family alone."""
    seed = int.from_bytes(hashlib.sha256(f"{context.seed} {family.model_type}".encode()).digest()[:8], "big")
    cuda = [context.device] if context.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), context.device:
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            family.config(shape), dtype=context.compute_dtype, attn_implementation="sdpa"
        )
    return model


def _load(name: str, family: Family, folder: Path, context: BuildContext) -> PreTrainedModel:
    _check_folder(name, family, folder)
    arguments: dict[str, Any] = {
        "dtype": context.compute_dtype,
        "device_map": {"": context.device},
        "attn_implementation": "sdpa",
        "use_safetensors": True,
        "local_files_only": True,
        "output_loading_info": True,
    }
    try:
        model, info = family.model_class.from_pretrained(folder, **arguments)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise WorkloadError(f"{name}: {folder} cannot be loaded: {error}; {_cure(name, folder)}") from error
    # from_pretrained draws what it does not find at random and goes on
    absent = sorted(info["missing_keys"])
    if absent:
        raise WorkloadError(
            f"{name}: the weights in {folder} lack {len(absent)} tensors ({', '.join(absent[:3])}, ...); "
            f"{_cure(name, folder)}"
        )
    loaded: PreTrainedModel = model
    return loaded


def _load_tokenizer(name: str, folder: Path) -> PreTrainedTokenizerFast:
    if not (folder / "tokenizer.json").is_file():
        raise WorkloadError(f"{name}: {folder} has no tokenizer.json; {_cure(name, folder)}")
    try:
        # tokenizer.json as it stands: both families have one, and no class of transformers may rebuild it
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust parser raises bare Exception
        raise WorkloadError(f"{name}: the tokenizer in {folder} is damaged: {error}; {_cure(name, folder)}") from error


def _check_folder(name: str, family: Family, folder: Path) -> None:
    missing = _missing_files(folder)
    if missing:
        raise WorkloadError(f"{name}: {folder.absolute()} has no {', '.join(missing[:3])}; {_cure(name, folder)}")
    found = _read_json(name, folder / "config.json").get("model_type")
    if found != family.model_type:
        raise WorkloadError(
            f"{name}: {folder} holds a {found!r} model and must hold a {family.model_type!r} model; "
            f"set workload.options.{name}.source to another folder"
        )


def _missing_files(folder: Path) -> list[str]:
    """What a complete model folder would have and this one has not."""
    missing = [file for file in ("config.json", "tokenizer.json") if not (folder / file).is_file()]
    if (folder / WEIGHTS).is_file():
        return missing
    if not (folder / INDEX).is_file():
        return [*missing, WEIGHTS]
    shards = set(_read_json(folder.name, folder / INDEX).get("weight_map", {}).values())
    return [*missing, *sorted(shard for shard in shards if not (folder / shard).is_file())]


def _has_weights(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def _read_json(name: str, file: Path) -> dict[str, Any]:
    try:
        tree: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WorkloadError(f"{name}: {file} is damaged: {error}; {_cure(name, file.parent)}") from error
    return tree


def _cure(name: str, folder: Path) -> str:
    return (
        f"delete {folder} and fetch or let it be made again, or set workload.options.{name}.source to a folder that "
        "holds the whole model"
    )


def _checkpoint_layers(model: PreTrainedModel) -> None:
    """Recompute each decoder layer in the backward pass.

    Done here because transformers checkpoints in training mode only, and frozen models stay in evaluation mode.
    """
    for layer in model.get_decoder().layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
