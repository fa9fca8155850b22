"""The pair as the benchmarks use it: random weights, batches of one length, one step at a time."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from latentwire.workloads.base import BuildContext
from latentwire.workloads.pair import PairWorkload
from latentwire.workloads.pair.batch import PairBatch, TargetBatch

LATENTS = 32
SIZES: dict[str, dict[str, int]] = {
    "full": {"d_z": 256, "d_model": 512, "byte_layers": 4, "latent_layers": 4, "heads": 8},
    "tiny": {"d_z": 64, "d_model": 64, "byte_layers": 1, "latent_layers": 1, "heads": 4},
}


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
        positions = frozen.head.shape[1] + LATENTS + frozen.tail.shape[1] + target_tokens - 1
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
