"""A loop of one's own that would lose something without a word is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from latentwire import Session
from latentwire.errors import CheckpointMismatch, ConfigError, RunBusy, RunError
from latentwire.run.process import node_name

ROWS = [torch.full((2,), float(i)) for i in range(12)]


class Wrapped:
    """Somebody's engine around an optimizer."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    def state_dict(self) -> Mapping[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


def train(path: Path, kind: str = "AdamW", rows: int = 12, batch_size: int = 4, tracks: str = "optimizer") -> int:
    """Two steps more than there are; returns how many there are then."""
    with Session(path / "experiment_own", checkpoint={"interval_s": None, "interval_steps": 1}) as session:
        model = torch.nn.Linear(2, 1)
        momentum = {"momentum": 0.9} if kind == "momentum" else {}
        optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(model.parameters())
            if kind == "AdamW"
            else torch.optim.SGD(model.parameters(), **momentum)
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        more: dict[str, Any] = {
            "optimizer": {"optimizer": optimizer},
            "scheduler": {"scheduler": scheduler},
            "wrapped": {"engine": Wrapped(optimizer)},
        }.get(tracks, {})
        if tracks != "nothing":
            session.track(model=model, **more)
        total = session.restore() + 2
        for batch in session.batches(ROWS[:rows], batch_size=batch_size, steps=total):
            model(batch).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return session.step


def test_a_loop_that_tracks_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"nothing is tracked.*session\.track\(model=model, optimizer=optimizer\)"):
        train(tmp_path, tracks="nothing")


@pytest.mark.parametrize("tracks", ["model alone", "scheduler"])
def test_an_optimizer_whose_state_no_checkpoint_would_hold_is_refused(tmp_path: Path, tracks: str) -> None:
    for kind in ("AdamW", "momentum"):
        with pytest.raises(
            RunError, match=r"trains what is tracked and is not tracked itself.*session\.track\(optimizer"
        ):
            train(tmp_path / kind, kind, tracks=tracks)
    assert train(tmp_path, "SGD", tracks=tracks) == 2, "it has no state"
    other = torch.nn.Linear(2, 1)
    other(ROWS[0]).sum().backward()
    torch.optim.AdamW(other.parameters()).step()  # no session looks any more


def test_an_optimizer_in_what_is_tracked_is_tracked(tmp_path: Path) -> None:
    assert [train(tmp_path, tracks="wrapped") for _ in range(2)] == [2, 4]


@pytest.mark.parametrize("batch_size", [0, -4, 2.0, "4"])
def test_a_batch_of_no_size_is_refused(tmp_path: Path, batch_size: Any) -> None:
    with pytest.raises(ConfigError, match=rf"a batch of {batch_size!r} samples: give a whole number"):
        train(tmp_path, batch_size=batch_size)


@pytest.mark.parametrize("steps", [-1, "5", 2.5])
def test_a_number_of_steps_that_is_none_is_refused(tmp_path: Path, steps: Any) -> None:
    with Session(tmp_path / "experiment_own") as session, pytest.raises(RunError, match=rf"steps is {steps!r}: give"):
        next(iter(session.steps(steps)))


@pytest.mark.parametrize(
    ("change", "now"),
    [({"batch_size": 2}, "12 samples in batches of 2"), ({"rows": 11}, "11 samples in batches of 4")],
)
def test_other_samples_than_before_are_refused(tmp_path: Path, change: dict[str, int], now: str) -> None:
    assert train(tmp_path) == 2
    with pytest.raises(
        CheckpointMismatch, match=rf"was trained on 12 samples in batches of 4, and now gets {now}: give"
    ):
        train(tmp_path, **change)
    assert train(tmp_path) == 4


def test_a_second_start_is_told_who_runs(tmp_path: Path) -> None:
    path = tmp_path / "experiment_own"
    with Session(path), pytest.raises(RunBusy) as caught:
        Session(path)
    words = f"{path} is in use by attempt 1, process {os.getpid()} on {node_name()}: wait for it, or end it"
    assert str(caught.value) == words
