"""Which number format the forward and backward pass use, and making a process's arithmetic repeatable."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch

from latentwire.train.ranks import Ranks

_NAMED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_HAS_BF16 = 8
"""The first compute capability that multiplies in it."""


def compute_dtype(precision: str, devices: Sequence[torch.device], ranks: Ranks) -> torch.dtype:
    """The dtype that ``train.precision`` means on all ranks together. Collective.

    ``auto`` is bf16, fp16 where a GPU of any rank is too old for it, and fp32 on a CPU: gradients of one step that were
    computed in two formats, some of them scaled, must not be added.

    Args:
        precision: as in the config.
        devices: this rank's.
        ranks: this one among all.
    """
    if precision != "auto":
        return _NAMED[precision]
    gpus = [device for device in devices if device.type == "cuda"]
    is_old = any(torch.cuda.get_device_capability(gpu)[0] < _HAS_BF16 for gpu in gpus)
    without_gpu, any_is_old = ranks.highest([float(not gpus), float(is_old)])
    if without_gpu:
        return torch.float32
    return torch.float16 if any_is_old else torch.bfloat16


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
