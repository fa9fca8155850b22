"""The pair as the benchmarks use it: random weights, batches of one length, one step at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from latentwire.workloads.base import BuildContext
from latentwire.workloads.pair import PairWorkload
from latentwire.workloads.pair.batch import PairBatch, TargetBatch
from latentwire.workloads.pair.frozen import read_once

LATENTS = 32
SIZES: dict[str, dict[str, int]] = {
    "full": {"d_z": 256, "d_model": 512, "byte_layers": 4, "latent_layers": 4, "heads": 8},
    "tiny": {"d_z": 64, "d_model": 64, "byte_layers": 1, "latent_layers": 1, "heads": 4},
}

CHAT_TEMPLATES = {"llama": (30, 5), "qwen": (24, 5)}
"""Tokens before the user's words and between them and the answer, of Llama-3.1-8B-Instruct and Qwen2.5-7B-Instruct."""


def build(
    folder: Path,
    shape: str,
    device: torch.device,
    *,
    devices: Mapping[str, tuple[torch.device, ...]] | None = None,
    checkpointed: bool = False,
    **options: Any,
) -> PairWorkload:
    """A pair of random models in bf16, with the wire of the production config."""
    model = {"init": "random", "shape": shape}
    data = {"kind": "pydoc", "max_source_bytes": 512, "max_target_tokens": 96}
    wire = {"latent_len": LATENTS, **SIZES[shape]}
    workload = PairWorkload({"llama": model, "qwen": model, "wire": wire, "data": data, **options})
    workload.build(
        BuildContext(
            device=device,
            compute_dtype=torch.bfloat16,
            seed=0,
            run_path=folder / "experiment_benchmark",
            gradient_checkpointing=checkpointed,
            safe_point=lambda: None,
            event=lambda name, **fields: None,
            devices=devices or {},
        )
    )
    return workload


def in_chat(workload: PairWorkload) -> None:
    """From here on each model reads as many tokens around the soft prefix as its published chat template has."""
    for name, num_tokens in CHAT_TEMPLATES.items():
        frozen = workload._frozen[name]
        ids = torch.arange(sum(num_tokens), device=frozen.devices[0])[None]
        head, tail = frozen.model.get_input_embeddings()(ids).split(num_tokens, dim=1)
        script = dataclasses.replace(frozen.script, head=tuple(ids[0, : num_tokens[0]].tolist()))
        head, past = read_once(frozen.model, head, frozen.devices)
        workload._frozen[name] = dataclasses.replace(frozen, script=script, head=head, past=past, tail=tail)


def batch_of(workload: PairWorkload, size: int, target_tokens: int, source_bytes: int = 512) -> PairBatch:
    """Random bytes and tokens, all of one length: no padding for anybody to save."""
    generator = torch.Generator().manual_seed(size)
    source = torch.randint(0, 256, (size, source_bytes), generator=generator)
    targets = {}
    for name, frozen in workload._frozen.items():
        vocabulary = int(frozen.model.config.vocab_size)
        tokens = torch.randint(0, vocabulary, (size, target_tokens), generator=generator)
        targets[name] = TargetBatch(tokens, torch.arange(tokens.numel()), tokens.flatten())
    return PairBatch(source, targets)


def on_devices(workload: PairWorkload, batch: PairBatch) -> PairBatch:
    """The batch where its models are, so that no step is measured with its copy."""
    targets = {
        name: TargetBatch(*(tensor.to(workload._frozen[name].devices[0]) for tensor in target))
        for name, target in batch.targets.items()
    }
    return PairBatch(batch.source.to(workload._device), targets)


def flops_per_sample(workload: PairWorkload, target_tokens: int) -> float:
    """Matrix products of the frozen models that nobody can leave out: forward, and the gradient of the inputs."""
    total = 0.0
    for frozen in workload._frozen.values():
        layers = sum(p.numel() for p in frozen.model.get_decoder().layers.parameters() if p.ndim == 2)
        positions = LATENTS + frozen.tail.shape[1] + target_tokens - 1
        total += 4.0 * (layers * positions + frozen.model.get_output_embeddings().weight.numel() * target_tokens)
    return total


def synchronize() -> None:
    """Wait for all GPUs."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)


def seconds_of(step: Callable[[], Any], rounds: int) -> float:
    """The mean of some steps."""
    synchronize()
    started = time.perf_counter()
    for _ in range(rounds):
        step()
    synchronize()
    return (time.perf_counter() - started) / rounds


def gradient_digest(module: torch.nn.Module) -> str:
    """SHA-256 over all gradients, shortened."""
    digest = hashlib.sha256()
    for parameter in module.parameters():
        assert parameter.grad is not None
        digest.update(parameter.grad.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
