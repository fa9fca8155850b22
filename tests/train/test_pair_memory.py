"""The full pair's peak memory without a GPU: its real step on fake tensors, and a model of PyTorch's allocator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from caching_allocator import MIB, CachingAllocator, Traced
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from latentwire.config import TrainSection
from latentwire.elastic.footprint import CONTEXT_BYTES, lay_out, predict
from latentwire.workloads.base import BuildContext
from latentwire.workloads.pair import PairWorkload, footprint
from latentwire.workloads.pair.frozen import FrozenModel
from latentwire.workloads.pair.wire import LatentWire

FULL = {"init": "random", "shape": "full"}
SEEN_BYTES = 53.2e9
"""By the driver of an H200: plain layers, micro-batches of 16, Llama before Qwen (benchmarks/README.md)."""


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """As tests/gpu/test_memory.py: every sample as long as may be."""
    data = tmp_path / "long.jsonl"
    data.write_text((json.dumps({"source": "source " * 100, "target": "target " * 200}) + "\n") * 64)
    return {
        "llama": FULL,
        "qwen": FULL,
        "wire": {"latent_len": 32, "d_z": 256, "d_model": 512, "byte_layers": 4, "latent_layers": 4, "heads": 8},
        "data": {"kind": "jsonl", "path": str(data), "eval_size": 0, "max_source_bytes": 512, "max_target_tokens": 96},
    }


@pytest.fixture(autouse=True)
def _what_fakes_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake embeddings have no values to take a mean of, and a fake module cannot be moved, not even to where it is."""
    monkeypatch.setattr(FrozenModel, "embedding_rms", lambda model: 1.0)
    monkeypatch.setattr(LatentWire, "to", lambda wire, device: wire)


def reserved_bytes(options: dict[str, Any], runs: Path, micro_batch: int) -> int:
    """By a step of two micro-batches with AdamW."""
    allocator = CachingAllocator()
    context = BuildContext(
        device=torch.device("cpu"),
        compute_dtype=torch.bfloat16,
        seed=1,
        run_path=runs / "experiment_a",
        gradient_checkpointing=False,
        safe_point=lambda: None,
        event=lambda name, **fields: None,
    )
    fake, traced = FakeTensorMode(), Traced(allocator)
    workload = PairWorkload(options)
    with fake, traced:
        workload.build(context)
    batch = workload.collate([workload.train_data[i] for i in range(micro_batch)])
    with fake, traced:
        batch = tree_map(lambda leaf: fake.from_tensor(leaf), batch)
        optimizer = torch.optim.AdamW(workload.trainable.parameters())
        for _ in range(2):
            workload.step(batch, torch.Tensor.backward)
        optimizer.step()
    return allocator.reserved


@pytest.mark.parametrize("micro_batch", [8, 16, 32])
def test_the_peak_is_as_expected_to_a_tenth(options: dict[str, Any], tmp_path: Path, micro_batch: int) -> None:
    said = footprint(options, TrainSection(precision="bf16"))
    assert said is not None
    modules = lay_out(said, 1)
    assert modules is not None
    (expected,) = predict(said, modules, micro_batch, checkpointing=False)
    found = CONTEXT_BYTES + reserved_bytes(options, tmp_path, micro_batch)
    print(f"| plain | {micro_batch} | 1 | {expected / 1e9:.1f} | {found / 1e9:.1f} | {expected / found - 1:+.1%} |")
    assert expected == pytest.approx(found, rel=0.1)


def test_the_wrong_model_first_takes_what_a_gpu_was_seen_to_need(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Llama's tensors leave in the cache is too small for Qwen's, so the process holds both."""
    monkeypatch.setattr(FrozenModel, "intermediate_size", property(lambda model: model.name == "llama"))
    found = CONTEXT_BYTES + reserved_bytes(options, tmp_path, 16)
    print(f"with Llama first: {found / 1e9:.1f} GB; an H200 showed {SEEN_BYTES / 1e9:.1f}")
    assert found == pytest.approx(SEEN_BYTES, rel=0.02)


# ---- The model of the allocator --------------------------------------------------------------------------------------


def test_segments_come_in_three_sizes() -> None:
    for num_bytes, reserved in [(1, 2), (MIB, 2), (MIB + 1, 20), (10 * MIB, 10), (31 * MIB + 1, 32)]:
        allocator = CachingAllocator()
        allocator.allocate(num_bytes)
        assert allocator.reserved == reserved * MIB


def test_free_neighbours_become_one_and_serve_what_is_larger() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(5 * MIB) for _ in range(4)]
    assert allocator.reserved == allocator.allocated == 20 * MIB
    allocator.release(blocks[0])
    allocator.release(blocks[2])
    allocator.allocate(6 * MIB)
    assert allocator.reserved == 40 * MIB  # no free block was large enough
    allocator.release(blocks[1])
    allocator.allocate(15 * MIB)
    assert allocator.reserved == 40 * MIB
    assert allocator.allocated == 26 * MIB
