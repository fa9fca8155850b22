"""What the planner expects the full pair to take, against what an H200 had to hold."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from running import AgentProcess, agent_of, trained_steps, wait_for

from latentwire.config import load_config
from latentwire.monitor.gpu import list_gpus
from latentwire.run.atomic import read_json
from latentwire.run.directory import Run, create_run

TOP = Path(__file__).parents[2]
NUM_GPUS = len(list_gpus())
ON_ONE = [(True, 8), (True, 16), (True, 32), (False, 16)]
"""Compiled layers or not, and the micro-batch."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not NUM_GPUS, reason="there is no GPU here"),
]


def run_of(folder: Path, compiled: bool, gpus_per_replica: int, micro_batch: int | str) -> Run:
    """Every sample as long as may be, which is what is planned for."""
    data = folder / "long.jsonl"
    folder.mkdir(exist_ok=True)
    data.write_text((json.dumps({"source": "source " * 100, "target": "target " * 200}) + "\n") * 256)
    changes = {
        "workload.options.llama.use_chat_template": "false",
        "workload.options.qwen.use_chat_template": "false",
        "workload.options.data.kind": "jsonl",
        "workload.options.data.path": data,
        "workload.options.data.eval_size": 0,
        "workload.options.compile": str(compiled).lower(),
        "workload.options.data.max_target_tokens": 96,
        "train.micro_batch": micro_batch,
        "train.steps": 1000,
        "elastic.num_ranks": 1,
        "elastic.gpus_per_replica": gpus_per_replica,
    }
    overrides = [f"{key}={value}" for key, value in changes.items()]
    return create_run(load_config(TOP / "configs/experiments/pair_full_random.yaml", overrides), folder)


@pytest.mark.parametrize("first", range(0, len(ON_ONE), NUM_GPUS or 1))
def test_on_one_gpu_the_peak_is_as_expected_to_a_tenth(tmp_path: Path, first: int) -> None:
    """As many cases side by side as there are GPUs."""
    cases = ON_ONE[first : first + NUM_GPUS]
    with contextlib.ExitStack() as stack:
        agents = []
        for gpu, (compiled, micro_batch) in enumerate(cases):
            run = run_of(tmp_path / str(gpu), compiled, 1, micro_batch)
            agents.append(stack.enter_context(agent_of(run, {"CUDA_VISIBLE_DEVICES": str(gpu)})))
        errors = [err for agent, case in zip(agents, cases, strict=True) for err in errors_of(agent, *case)]
    assert max(map(abs, errors)) < 0.1


@pytest.mark.skipif(NUM_GPUS < 2, reason="there are no two GPUs here")
def test_on_two_gpus_the_peak_is_as_expected_to_a_tenth(tmp_path: Path) -> None:
    with agent_of(run_of(tmp_path, True, 2, 16)) as agent:
        assert max(map(abs, errors_of(agent, True, 16))) < 0.1


def errors_of(agent: AgentProcess, compiled: bool, micro_batch: int) -> list[float]:
    """Of each GPU of the replica, relative to what was seen; prints the table's lines."""
    seen = wait_for(lambda: read_json(agent.attempt.path / "memory.json"), "two steps")["peak_bytes"]
    expected = read_json(agent.attempt.path / "placement.json")["peak_bytes"]
    first = trained_steps(agent.attempt)[0]
    assert 0 < first["memory_allocated_peak_bytes"] <= first["memory_reserved_peak_bytes"] < sum(seen)
    for place, (peak, hoped) in enumerate(zip(seen, expected, strict=True)):
        print(
            f"| {'compiled' if compiled else 'plain'} | {micro_batch} | {len(seen)}, GPU {place} "
            f"| {hoped / 1e9:.1f} | {peak / 1e9:.1f} | {hoped / peak - 1:+.1%} |"
        )
    return [hoped / peak - 1 for peak, hoped in zip(seen, expected, strict=True)]


def test_auto_fills_no_more_than_it_may(tmp_path: Path) -> None:
    run = run_of(tmp_path, True, 1, "auto")
    with agent_of(run) as agent:
        wait_for(lambda: read_json(agent.attempt.path / "memory.json"), "two steps")
        found = read_json(run.path / "micro_batch.json")
    print(found)
    assert found["micro_batch"] == 64
    assert found["fullness"]["64"] <= 1
