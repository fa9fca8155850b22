"""``train.precision: auto`` is one number format for all ranks, whatever the GPUs of each."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from latentwire.train.precision import compute_dtype
from latentwire.train.ranks import Ranks

CAPABILITIES = {0: (7, 0), 1: (8, 6), 2: (9, 0)}
CPU, V100, A40, H200 = (torch.device(name) for name in ("cpu", "cuda:0", "cuda:1", "cuda:2"))


class Agreeing:
    """The ranks of one job in one process: what each says is put in by hand."""

    def __init__(self) -> None:
        self.said: list[list[float]] = []

    def highest(self, values: list[float]) -> list[float]:
        self.said.append(values)
        return [max(each) for each in zip(*self.said, strict=True)]


@pytest.fixture(autouse=True)
def _gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CAPABILITIES[device.index])


@pytest.mark.parametrize(
    ("devices", "dtype"),
    [
        (((CPU,), (CPU,)), torch.float32),
        (((A40,), (H200,)), torch.bfloat16),
        (((V100,), (V100,)), torch.float16),
        (((V100,), (H200,)), torch.float16),
        (((A40, V100), (H200, A40)), torch.float16),
        (((H200,), (CPU,)), torch.float32),
    ],
)
def test_the_oldest_gpu_of_all_ranks_decides(devices: tuple[tuple[torch.device, ...], ...], dtype: torch.dtype) -> None:
    for order in (devices, devices[::-1]):  # each rank in turn is the last to speak, who hears all
        ranks: Any = Agreeing()
        found = [compute_dtype("auto", own, cast(Ranks, ranks)) for own in order]
        assert found[-1] is dtype


def test_what_is_named_is_taken() -> None:
    assert compute_dtype("fp16", [H200], cast(Ranks, None)) is torch.float16
