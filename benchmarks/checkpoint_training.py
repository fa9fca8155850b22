"""What background saves cost a training loop: the third measurement of ``benchmarks/checkpoint.py``."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from statistics import median

import torch
from checkpoint_ways import Engine
from torch import nn


@dataclasses.dataclass
class Window:
    """Steps of the loop, and the seconds that they took; ``stall_s`` of them went into staging ``saves`` saves."""

    steps: int = 0
    seconds: float = 0.0
    stall_s: float = 0.0
    saves: int = 0

    @property
    def working(self) -> float:
        """Steps per second while the loop was not stopped."""
        return self.steps / (self.seconds - self.stall_s)

    @property
    def overall(self) -> float:
        """Steps per second, stalls counted in."""
        return self.steps / self.seconds


class Loop:
    """A small training loop of its own: forward, backward and AdamW of a few matrices."""

    def __init__(self, device: str) -> None:
        size, self._rows = (4096, 8192) if device.startswith("cuda") else (512, 256)
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        blocks = [layer for _ in range(8) for layer in (nn.Linear(size, size), nn.GELU())]
        self._model = nn.Sequential(*blocks).to(device, dtype)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4)
        self._inputs = torch.randn(self._rows, size, device=device, dtype=dtype)

    def step(self) -> None:
        """One step, to its end: the loss is read, as training loops do."""
        loss = (self._model(self._inputs) - self._inputs).square().mean()
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        loss.item()


def training_speed(model: nn.Module, folder: Path, rounds: int, seconds: float) -> dict[str, float]:
    """Steps per second without saves and with one after the other, in alternating windows.

    Args:
        model: what is saved; it changes before each save.
        folder: for the checkpoints; at most two at a time.
        rounds: pairs of windows.
        seconds: of each window. A window with saves ends with the save under way at that time.
    """
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    loop = Loop(str(next(model.parameters()).device))
    saver = Engine(model, folder / "latentwire")
    saver.begin(overlap=True)  # allocates the buffers
    saver.manager.wait()
    for _ in range(5):
        loop.step()
    without, saving = [], []
    for _ in range(rounds):
        without.append(_window(loop, seconds))
        saving.append(_window(loop, seconds, saver))
    saver.manager.close()
    base = median(window.working for window in without)
    while_saving, with_stalls = (median(getattr(w, kind) for w in saving) for kind in ("working", "overall"))
    return {
        "without_saves": base,
        "while_saving": while_saving,
        "with_stalls": with_stalls,
        "drop_while_saving_percent": 100 * (1 - while_saving / base),
        "drop_with_stalls_percent": 100 * (1 - with_stalls / base),
        "saves": sum(window.saves for window in saving),
    }


def _window(loop: Loop, seconds: float, saver: Engine | None = None) -> Window:
    window = Window()
    started = time.perf_counter()
    while time.perf_counter() < started + seconds or (saver is not None and saver.manager.busy):
        if saver is not None and not saver.manager.busy:
            saver.change()
            window.stall_s += saver.begin(overlap=True)
            window.saves += 1
        loop.step()
        window.steps += 1
    window.seconds = time.perf_counter() - started
    return window
