"""A step of the pair: a plain transformers loop, ours with each of its tricks, and what the chip's matrix units allow.

``python benchmarks/pair_step.py [--shape tiny|full] [--batch 64] [--target-tokens 96] [--chat] [--json FILE]``
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pair_parts import batch_of, build, flops_per_sample, gradient_digest, in_chat, on_devices, seconds_of, synchronize
from torch.nn import functional

from latentwire.train.precision import make_repeatable
from latentwire.workloads.pair import PairWorkload
from latentwire.workloads.pair.batch import PairBatch

Step = Callable[[PairWorkload, PairBatch], Any]
GIB = 2**30


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="Samples per second of the pair, by loop.")
    parser.add_argument("--shape", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--target-tokens", type=int, default=96)
    parser.add_argument("--chat", action="store_true", help="with as many tokens around as a chat template has")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=Path, default=Path("build/pair-step-benchmark.json"))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"| loop | samples/s | step (ms) | TFLOP/s | peak (GiB) | first step (s) | gradient |\n|{'---|' * 7}")
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for way in ways(device):
            try:
                rows.append(measure(options, Path(folder), device, *way))
            except torch.OutOfMemoryError:
                print(f"| {way[0]} | out of memory |{' - |' * 5}", flush=True)
            gc.collect()  # or the next pair finds no room
            torch.cuda.empty_cache()
    if device.type == "cuda" and rows:
        rows.append(limit(options.batch * rows[-1]["flops_per_sample"]))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(rows, indent=1))


def ways(device: torch.device) -> Iterator[tuple[str, Step, dict[str, Any]]]:
    """Name, step and how to build; each adds to the one before, the last is for short memory."""
    yield "plain transformers", plain, {}
    make_repeatable(torch.get_num_threads(), deterministic=True)
    yield "plain transformers, repeatable bits", plain, {}
    yield "ours: no masks, logits in chunks", ours, {}
    if device.type == "cuda":
        yield "ours: and compiled layers", ours, {"compile": True}
        yield "the same, gradient checkpointing", ours, {"compile": True, "checkpointed": True}


def plain(workload: PairWorkload, batch: PairBatch) -> None:
    """What a script would do: the models' own forward with labels; logits at every position."""
    losses = []
    latents = workload._encode(batch.source)
    for name, frozen in workload._frozen.items():
        target = batch.targets[name]
        head = frozen.model.get_input_embeddings()(torch.tensor([frozen.script.head], device=latents.device).long())
        rest = frozen._assemble(workload._prefix(name, latents), target.tokens)
        embeds = torch.cat([head.expand(len(rest), -1, -1), rest], dim=1)
        labels = functional.pad(target.tokens, (embeds.shape[1] - target.tokens.shape[1], 0), value=-100)
        mask = torch.ones_like(labels)
        losses.append(frozen.model(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False).loss)
    torch.stack(losses).mean().backward()


def ours(workload: PairWorkload, batch: PairBatch) -> None:
    """As the training loop does."""
    workload.step(batch, lambda loss: loss.backward())


def measure(
    options: argparse.Namespace, folder: Path, device: torch.device, name: str, step: Step, how: dict[str, Any]
) -> dict[str, Any]:
    """Build, take a first step, look at its bits, measure the rest; prints its row."""
    workload = build(folder, options.shape, device, **how)
    if options.chat:
        in_chat(workload)
    batch = on_devices(workload, batch_of(workload, options.batch, options.target_tokens))
    digests, first = [], 0.0
    for _ in range(2):
        workload.trainable.zero_grad()
        started = time.perf_counter()
        step(workload, batch)
        synchronize()
        first = first or time.perf_counter() - started
        digests.append(gradient_digest(workload.trainable))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def once() -> None:
        workload.trainable.zero_grad()
        step(workload, batch)

    seconds = seconds_of(once, options.rounds)
    flops = flops_per_sample(workload, options.target_tokens)
    row = {
        "loop": name,
        "samples_per_s": options.batch / seconds,
        "step_s": seconds,
        "tflops": flops * options.batch / seconds / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None,
        "first_s": first,
        "gradient": digests[0] if len(set(digests)) == 1 else "differs",
        "flops_per_sample": flops,
    }
    peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
    print(
        f"| {name} | {row['samples_per_s']:.1f} | {seconds * 1e3:.0f} | {row['tflops']:.0f} | {peak} | {first:.1f} "
        f"| {row['gradient']} |",
        flush=True,
    )
    return row


def limit(flops: float) -> dict[str, Any]:
    """One large product of random bf16 numbers; what the step would take at that speed."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    multiply = functools.partial(torch.mm, a, b)
    seconds_of(multiply, 5)
    speed = 2 * 8192**3 / seconds_of(multiply, 50)
    print(f"| *limit:* a large matrix product | - | {flops / speed * 1e3:.0f} | {speed / 1e12:.0f} | - | - | - |")
    return {"loop": "limit", "tflops": speed / 1e12, "step_s": flops / speed}


if __name__ == "__main__":
    main()
