"""The two frozen models: found, checked, loaded, laid over their devices."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from latentwire.errors import WorkloadError
from latentwire.workloads.base import BuildContext
from latentwire.workloads.pair import attention
from latentwire.workloads.pair.data import pydoc_passages
from latentwire.workloads.pair.families import FAMILIES, Family
from latentwire.workloads.pair.folders import INDEX, WEIGHTS, make_once
from latentwire.workloads.pair.frozen import FrozenModel, devices_of_layers, error_function, read_once, trained_through
from latentwire.workloads.pair.options import ModelOptions
from latentwire.workloads.pair.tokenizer import DIALECTS, make_script, train_tokenizer

DOWNLOADED = ("*.safetensors", "*.json", "*.txt", "*.jinja")
CACHE_FORMAT = 1
"""Part of every cached folder's name: raise it when what is built into one changes."""


def load_frozen(name: str, options: ModelOptions, context: BuildContext, compiled: bool = False) -> FrozenModel:
    """Load one model as its options say, onto its devices in ``context.compute_dtype``. Blocks.

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
    devices = context.devices.get(name, (context.device,))
    at_first = dataclasses.replace(context, device=devices[0])
    model = _draw(family, "full", at_first) if draws_in_place else _load(name, family, folder, context, devices)
    if draws_in_place and len(devices) > 1:
        model = dispatch_model(model, _device_map(model.config.num_hidden_layers, devices))
    remove_hook_from_submodules(model)  # accelerate's copy inputs to each layer; FrozenModel does so where devices meet
    model.requires_grad_(False).eval()
    head, tail = (_embed(model, ids, devices[0]) for ids in (script.head, script.tail))
    head, past = read_once(model, head, devices)
    layers = trained_through(model, compiled, context.gradient_checkpointing)
    return FrozenModel(name, model, folder, script, head, past, tail, devices, layers, error_function(compiled))


def _device_map(num_layers: int, devices: tuple[torch.device, ...]) -> dict[str, torch.device]:
    """Which part of a model goes where, in accelerate's words."""
    if len(devices) == 1:
        return {"": devices[0]}
    layers = {f"model.layers.{i}": device for i, device in enumerate(devices_of_layers(num_layers, devices))}
    first, last = devices[0], devices[-1]
    return {"model.embed_tokens": first, "model.rotary_emb": first, **layers, "model.norm": last, "lm_head": last}


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
            model = _draw(family, shape, on_cpu)
            # not by the model's own save_pretrained, which writes nothing on ranks other than 0: any may be the first
            model.config.save_pretrained(folder)
            save_file(model.state_dict(), folder / WEIGHTS, metadata={"format": "pt"})

    return make_once(context.run_path.parent / "cache" / f"{name}-{shape}-{key}", make)


def _draw(family: Family, shape: str, context: BuildContext) -> PreTrainedModel:
    """Draw random weights on the device, from the seed and the family alone."""
    seed = int.from_bytes(hashlib.sha256(f"{context.seed} {family.model_type}".encode()).digest()[:8], "big")
    cuda = [context.device] if context.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), context.device:
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            family.config(shape), dtype=context.compute_dtype, attn_implementation=attention.install()
        )
    return model


def _load(
    name: str, family: Family, folder: Path, context: BuildContext, devices: tuple[torch.device, ...]
) -> PreTrainedModel:
    config = _check_folder(name, family, folder)
    arguments: dict[str, Any] = {
        "dtype": context.compute_dtype,
        "device_map": _device_map(config["num_hidden_layers"], devices),
        "attn_implementation": attention.install(),
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


def _check_folder(name: str, family: Family, folder: Path) -> dict[str, Any]:
    """The folder's config.json, when all that it needs is there."""
    missing = _missing_files(folder)
    if missing:
        raise WorkloadError(f"{name}: {folder.absolute()} has no {', '.join(missing[:3])}; {_cure(name, folder)}")
    config = _read_json(name, folder / "config.json")
    found = config.get("model_type")
    if found != family.model_type:
        raise WorkloadError(
            f"{name}: {folder} holds a {found!r} model and must hold a {family.model_type!r} model; "
            f"set workload.options.{name}.source to another folder"
        )
    return config


def _missing_files(folder: Path) -> list[str]:
    """What a complete model folder would have and this one has not."""
    missing = [file for file in ("config.json", "tokenizer.json") if not (folder / file).is_file()]
    if (folder / WEIGHTS).is_file():
        return missing
    if not (folder / INDEX).is_file():
        return [*missing, WEIGHTS]
    shards = set(_read_json(folder.name, folder / INDEX).get("weight_map", {}).values())
    return [*missing, *sorted(shard for shard in shards if not (folder / shard).is_file())]


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
