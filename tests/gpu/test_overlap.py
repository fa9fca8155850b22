"""Copies beside training on a GPU: each checkpoint holds one step's bits, and a change that is no step's is seen."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from latentwire.checkpoint import reader
from latentwire.checkpoint.layout import Snapshot
from latentwire.checkpoint.manager import CheckpointManager
from latentwire.errors import CheckpointTorn
from latentwire.monitor.gpu import list_gpus
from latentwire.train.staging import Staging
from latentwire.train.state import TrainingState

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not list_gpus(), reason="there is no GPU here"),
]
SIZE, LAYERS, STEPS = 4096, 12, 12


def open_manager(folder: Path) -> CheckpointManager:
    return CheckpointManager(
        folder, token=1, version="test", identity={}, fence=lambda: None, event=lambda name, **fields: None, keep=STEPS
    )


def make() -> tuple[torch.nn.Module, torch.optim.Optimizer, TrainingState]:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(SIZE, SIZE, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(LAYERS)]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = TrainingState()
    state.track("model", model)
    state.track("optimizer", optimizer)
    return model, optimizer, state


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(64, SIZE, device="cuda", dtype=torch.bfloat16)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def stage(staging: Staging, state: TrainingState, number: int, overlap: bool) -> Snapshot:
    live = state.snapshot(number, {}, {"step": number}, {})
    mine = [(group, name) for group, tensors in live.tensors.items() for name in tensors]
    staged = staging.stage(live, mine, overlap)
    assert staged is not None
    return staged


def test_every_overlapped_checkpoint_holds_the_bits_of_its_step(tmp_path: Path) -> None:
    """Against the same training with a plain ``.cpu()`` copy at each step; streamed ones too, and loaded back."""
    model, optimizer, _ = make()
    expected = []
    for _ in range(STEPS):
        step(model, optimizer)
        expected.append({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    model, optimizer, state = make()
    staging, manager = Staging(1 << 40), open_manager(tmp_path / "overlapped")
    optimizer.register_step_pre_hook(lambda *_: staging.before_update())
    for number in range(1, STEPS + 1):
        step(model, optimizer)
        manager.wait()
        manager.save(stage(staging, state, number, overlap=True))
    manager.close()
    streamed = open_manager(tmp_path / "streamed")
    streamed.save(state.snapshot(STEPS, {}, {"step": STEPS}, {}))
    streamed.close()
    model, optimizer, state = make()
    for path, weights in zip([*manager.committed(), *streamed.committed()], [*expected, expected[-1]], strict=True):
        state.apply(reader.load(path, place=state.place()))
        assert all(torch.equal(tensor.cpu(), weights[name]) for name, tensor in model.state_dict().items()), path


def test_a_change_that_no_optimizer_made_is_seen() -> None:
    model, optimizer, state = make()
    step(model, optimizer)
    staging = Staging(1 << 40)
    staged = stage(staging, state, 1, overlap=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    staging.before_update()
    with pytest.raises(CheckpointTorn):
        staged.settle()
    dataclasses.replace(stage(staging, state, 1, overlap=False)).settle()
