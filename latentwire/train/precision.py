"""Which number format the forward and backward pass use, and making a process's arithmetic repeatable."""

from __future__ import annotations

import os
import sys

import torch


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype that ``train.precision`` means on a device: ``auto`` is bf16, fp16 on old GPUs, fp32 on a CPU."""
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if precision != "auto":
        return named[precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def make_repeatable(cpu_threads: int, deterministic: bool) -> None:
    """Fix what the bits of a sum depend on. Called on every rank before the first tensor operation."""
    torch.set_num_threads(cpu_threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when its handle is made
        os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"  # the compiler reads it when it is imported
        if "torch._inductor.config" in sys.modules:
            torch.use_deterministic_algorithms(True)
        else:  # the same, without importing the compiler
            torch.set_deterministic_debug_mode("error")
        # filling is for finding bugs, and costs 2 % of a step
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
