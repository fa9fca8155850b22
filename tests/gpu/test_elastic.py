"""The 8B + 7B pair at full size, on other GPUs at every start: split, data-parallel, on one; always the same bits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from running import TERM, agent_of, run_agent, trained_steps, wait_for

from latentwire.checklist.drill import final_digests
from latentwire.config import load_config
from latentwire.monitor.gpu import list_gpus
from latentwire.run.atomic import read_json
from latentwire.run.directory import Attempt, Run, create_run

TOP = Path(__file__).parents[2]
NUM_GPUS = len(list_gpus())
STEPS_AT_A_START = 2
LAYOUTS = [layout for layout in [(1, 1), (1, 2), (2, 1), (3, 1), (2, 2), (4, 1)] if layout[0] * layout[1] <= NUM_GPUS]
"""Ranks, and GPUs of each."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(NUM_GPUS < 2, reason="there are no two GPUs here"),
]


def run_of(folder: Path, layout: tuple[int, int], **settings: Any) -> Run:
    num_ranks, gpus_per_replica = layout
    changes = {
        "train.steps": STEPS_AT_A_START * (len(LAYOUTS) + 1),
        "train.micro_batch": 16,
        "train.eval_every": "null",
        "elastic.num_ranks": num_ranks,
        "elastic.gpus_per_replica": gpus_per_replica,
        **settings,
    }
    overrides = [f"{key}={value}" for key, value in changes.items()]
    return create_run(load_config(TOP / "configs/experiments/pair_full_random.yaml", overrides), folder)


def visible(layout: tuple[int, int]) -> dict[str, str]:
    """As a job that was given so many GPUs."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(layout[0] * layout[1])))}


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "plain"])
def test_other_gpus_at_every_start_change_no_bit(tmp_path: Path, compiled: bool) -> None:
    options = {"workload.options.compile": str(compiled).lower()}
    alone = run_of(tmp_path / "alone", (1, 1), **options)
    with agent_of(alone, {"CUDA_VISIBLE_DEVICES": str(NUM_GPUS - 1)}) as undisturbed:
        for number, layout in enumerate(LAYOUTS, start=1):
            run = run_of(tmp_path / "moved", layout, **options)
            with agent_of(run, visible(layout)) as agent:
                wait_for_step(agent.attempt, STEPS_AT_A_START * number)
                agent.send(TERM)
                assert agent.outcome() == "preempted"
            if number == 1:  # another one has that GPU from here on
                assert undisturbed.outcome() == "finished"
    run = run_of(tmp_path / "moved", LAYOUTS[1], **options)
    assert run_agent(run, visible(LAYOUTS[1])) == "finished"
    placements = [read_json(attempt.path / "placement.json") for attempt in run.attempts()]
    for placement, attempt in zip(placements, run.attempts(), strict=True):
        print(placement["devices"], placement["modules"], "steps", steps_of(attempt), os.linesep)
    assert [(len(p["devices"]), len(p["devices"][0])) for p in placements] == [*LAYOUTS, LAYOUTS[1]]
    assert final_digests(run) == final_digests(alone)


def wait_for_step(attempt: Attempt, step: int) -> None:
    wait_for(lambda: steps_of(attempt)[-1:] >= [step], f"step {step}")


def steps_of(attempt: Attempt) -> list[int]:
    return [record["step"] for record in trained_steps(attempt)]
