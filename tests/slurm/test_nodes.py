"""Several nodes in one attempt, and a node that Slurm gives up while its processes go on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster import NODES, Cluster
from orchestrated import job_ids, orchestrated
from running import events, make_run, run_agent, wait_for_event

from latentwire.checklist.drill import final_digests
from latentwire.run.atomic import read_json
from latentwire.run.budget import committed_step, verdict_of
from latentwire.run.directory import Attempt, Run
from latentwire.scheduler.jobs import list_jobs

pytestmark = pytest.mark.slurm


# --- two nodes, two ranks on each -------------------------------------------------------------------------------------

SHORT: dict[str, Any] = {"steps": 8, "schedule": {"warmup_steps": 2}}
IN_THE_THIRD_STEP = 6
"""Visits of one rank of four: one in warm-up, two in each step."""
IN_THE_SECOND_STEP = 6
"""Samples that one of four ranks has seen: two in warm-up, four in each step."""


def test_two_nodes_of_two_ranks(cluster: Cluster, tmp_path: Path) -> None:
    """A rank of the second node is killed, the next attempt is preempted, the third ends with the bits of one rank."""
    calm = make_run(tmp_path / "calm", train=SHORT, workload={"options": {"counts": False}})
    assert run_agent(calm) == "finished"
    trouble = {"kind": "kill", "after_samples": IN_THE_SECOND_STEP, "rank": 3}
    sections = {
        "train": SHORT,
        "workload": {"options": {"counts": False, "troubles": [trouble]}},
        "scheduler": {"nodes": 2, "gpus": 4},
    }
    with orchestrated(cluster, tmp_path, "preempt", stand=IN_THE_THIRD_STEP, **sections) as program:
        second = program.standing(2)
        wait_for_event(second, "holding", "rank3")
        cluster.run("scancel", "-s", "TERM", program.job_id())
        wait_for_event(second, "notice", "node1")
        program.go_on_after_notice(second)
        assert program.finish() == 0
        killed, preempted, finished = program.run.attempts()
        assert [verdict_of(a).outcome for a in (killed, preempted, finished)] == ["failed", "preempted", "finished"]
        assert verdict_of(killed).cause == "killed"
        assert "rank 3 ended by SIGKILL" in str(verdict_of(killed).error)
        assert len(set(job_ids(program.run))) == len(list_jobs(program.run)) == 1
        assert [a.record()["restart"] for a in program.run.attempts()] == [0, 0, 1]
        for attempt in program.run.attempts():
            assert read_json(attempt.path / "placement.json")["nodes"] == [0, 0, 1, 1]
            assert hosts(attempt) == list(NODES)
            assert (attempt.path / "gpu_stats.node1.jsonl").stat().st_size > 0
        assert final_digests(program.run) == final_digests(calm)


def hosts(attempt: Attempt) -> list[str]:
    """The nodes on which ranks of the attempt ran, by what each node wrote down itself."""
    return [read_json(attempt.path / f"environment{suffix}.json")["host"] for suffix in ("", ".node1")]


# --- a node that is given up ------------------------------------------------------------------------------------------


@pytest.mark.slow  # test_follower.py does it without Slurm in every run of the suite
def test_a_node_that_was_given_up_does_no_harm(cluster: Cluster, tmp_path: Path, calm: Run) -> None:
    """Slurm takes the job to the other node; what still trains on the first one wakes up beside it."""
    with orchestrated(cluster, tmp_path, "preempt") as program:
        zombie = program.standing()
        agent = zombie.agent()
        assert agent is not None
        with cut_off(cluster, agent.host):
            with asleep(agent.pid) as tree:
                second = program.standing(2)
                program.go_on()
            psutil.wait_procs(tree)
            assert program.finish() == 0
        assert [verdict_of(a).outcome for a in program.run.attempts()] == ["fenced", "finished"]
        newer = second.agent()
        assert newer is not None
        assert {agent.host, newer.host} == set(NODES)
        tried = events(zombie, "save_staged")[-1]["step"]
        assert tried > committed_step(zombie) == events(second, "restored")[0]["step"]
        manifests = [read_json(path / "manifest.json") for path in program.run.checkpoints.glob("step-*")]
        assert {manifest["attempt"] for manifest in manifests} == {2}
        assert len(set(job_ids(program.run))) == len(list_jobs(program.run)) == 1
        assert events(zombie, "requeue", "agent") == []
        cluster.wait_until(lambda: program.field(program.job_id(), "JobState") == "COMPLETED")
        assert program.field(program.job_id(), "Restarts") == "1"
        assert final_digests(program.run) == final_digests(calm)


@contextmanager
def cut_off(cluster: Cluster, node: str) -> Iterator[None]:
    """The node's daemon is dead, and what it started lives, until the block is left."""
    cluster.end(f"slurmd-{node}", signal.SIGKILL)
    try:
        yield
    finally:
        cluster.start_node(node)
        cluster.wait_until_idle()


@contextmanager
def asleep(agent_pid: int) -> Iterator[list[psutil.Process]]:
    """The agent and all that it started do nothing until the block is left."""
    agent = psutil.Process(agent_pid)
    tree = [agent, *agent.children(recursive=True)]
    for process in tree:
        process.suspend()
    try:
        yield tree
    finally:
        for process in tree:
            process.resume()
