"""A loop that is left before its last step, by ``break``: what it has done is saved like any other end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from running import run_agent

from latentwire import Session
from latentwire.checklist.drill import final_digests
from latentwire.config import parse_config
from latentwire.errors import RunError
from latentwire.run.directory import Run, create_run

ROWS = [torch.full((2,), float(i)) for i in range(12)]
STOPS = """
import torch
import latentwire

def train(session):
    inputs = torch.arange(64.0).reshape(-1, 1) / 64
    model = torch.nn.Linear(1, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    session.track(model=model, optimizer=optimizer)
    share = session.share(model.parameters(), torch.utils.data.TensorDataset(inputs), global_batch=8, micro_batch=2)
    for step in session.steps(LAST):
        for (x,) in share:
            share.backward(model(x).square().mean())
        share.reduce()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == 4:
            break
"""


def train(
    path: Path,
    steps: int,
    leave_in: int | None = None,
    updated: bool = True,
    spoiled: bool = False,
    more_steps: int | None = None,
) -> Session:
    """Train to a step; leave the loop in one, after or before its update; perhaps change the weights, or loop again."""
    settings: dict[str, Any] = {"interval_s": None, "best_metric": None}
    with Session(path / "experiment_own", checkpoint=settings) as session:
        model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1))
        optimizer = torch.optim.AdamW(model.parameters())
        session.track(model=model, optimizer=optimizer)
        for last in filter(None, (steps, more_steps)):
            for batch in session.batches(ROWS, batch_size=4, steps=last):
                model(batch).sum().backward()
                if session.step + 1 == leave_in and not updated:
                    break
                optimizer.step()
                optimizer.zero_grad()
                if session.step + 1 == leave_in:
                    break
        if spoiled:
            with torch.no_grad():
                next(model.parameters()).zero_()
    return session


@pytest.mark.parametrize(("updated", "step"), [(True, 3), (False, 2)])
def test_the_last_whole_step_is_saved_and_gone_on_from(tmp_path: Path, updated: bool, step: int) -> None:
    assert train(tmp_path / "left", 8, leave_in=3, updated=updated).step == step
    assert (tmp_path / f"left/experiment_own/checkpoints/step-{step:08d}/verified.json").is_file()
    assert train(tmp_path / "left", 8).step == 8
    train(tmp_path / "calm", 8)
    left, calm = (Run(tmp_path / name / "experiment_own") for name in ("left", "calm"))
    assert final_digests(left) == final_digests(calm)


def test_another_loop_goes_on_behind_the_step_that_was_left(tmp_path: Path) -> None:
    assert train(tmp_path / "two", 8, leave_in=3, more_steps=6).step == 6
    assert train(tmp_path / "one", 6).step == 6
    two, one = (Run(tmp_path / name / "experiment_own") for name in ("two", "one"))
    assert final_digests(two) == final_digests(one)


def test_weights_that_were_changed_behind_the_loop_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"left after step 3, and what is tracked has been changed since.*deepcopy"):
        train(tmp_path, 8, leave_in=3, spoiled=True)
    train(tmp_path / "whole", 3, spoiled=True)  # a loop that ended by itself is saved before


def test_ranks_that_leave_together_save_together(tmp_path: Path) -> None:
    runs = {}
    for name, num_ranks, last in (("left", 2, 10), ("calm", 1, 4)):
        script = tmp_path / f"{name}.py"
        script.write_text(STOPS.replace("LAST", str(last)), encoding="utf-8")
        settings = {"name": name, "workload": {"target": f"{script}:train"}, "elastic": {"num_ranks": num_ranks}}
        runs[name] = create_run(parse_config(settings, "test"), tmp_path)
        assert run_agent(runs[name]) == "finished"
    left, calm = (final_digests(run) for run in runs.values())
    assert left == calm


@pytest.mark.parametrize(
    ("figures", "complaint"),
    [
        ({"step": 3}, r"log\(step=\.\.\.\).*measured by the session"),
        ({"time": 3}, r"log\(time=\.\.\.\)"),
        ({"loss": None}, r"log\(loss=\.\.\.\): None is no number"),
        ({"loss": torch.ones(2)}, r"a tensor of shape \(2,\)"),
        ({"loss": 10**400}, "fits a float"),
    ],
)
def test_a_figure_that_cannot_be_logged_is_named(tmp_path: Path, figures: dict[str, Any], complaint: str) -> None:
    with Session(tmp_path / "experiment_own") as session, pytest.raises(RunError, match=complaint):
        session.log(**figures)
