"""A job asks for fewer GPUs while many are not to be had, and for more again at its next start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from orchestrated import Orchestrated, everything_taken, orchestrated, taken
from running import NEVER, make_run, run_agent, wait_for, wait_for_event

from latentwire.checklist.drill import final_digests
from latentwire.run.directory import Run
from latentwire.run.journal import read_journal
from latentwire.scheduler.jobs import list_jobs

pytestmark = pytest.mark.slurm

RANKS: dict[str, Any] = {"workload": {"options": {"counts": False}}}
ONE_OF_FOUR_AFTER_TWO_STEPS, ONE_AFTER_TWO_STEPS = 1 + 2 * 2, 1 + 2 * 8
"""Visits of a rank: one in warm-up, and its share of the eight in each step."""


@pytest.fixture(scope="module")
def calm_ranks(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run with one rank, undisturbed."""
    run = make_run(tmp_path_factory.mktemp("calm"), **RANKS)
    assert run_agent(run) == "finished"
    return run


def rungs(program: Orchestrated) -> list[int]:
    """The GPUs that the pending job was made to ask for."""
    records = [r for r in read_journal(program.run.orchestrator_events) if r.get("event") == "rung"]
    return [int(r["gpus"]) for r in records if r["gpus"] != r["before"]]


def num_ranks(run: Run) -> list[int]:
    """Of each attempt."""
    return [len(json.loads((a.path / "placement.json").read_text())["devices"]) for a in run.attempts()]


def test_down_while_it_waits_and_up_again_at_the_next_start(cluster: Cluster, tmp_path: Path, calm_ranks: Run) -> None:
    sections = {"scheduler": {"gpus": [4, 2, 1]}, "elastic": {"patience_s": 10.0}, **RANKS}
    with orchestrated(cluster, tmp_path, "preempt", ONE_OF_FOUR_AFTER_TWO_STEPS, **sections) as program:
        first = program.standing()
        with everything_taken(cluster) as everything:
            program.go_on_after_notice(first)
            wait_for_event(first, "requeue", "agent")
            program.stand(ONE_AFTER_TWO_STEPS)
            wait_for(lambda: rungs(program) == [2, 1], f"two steps down: {program.said()}")
            with taken(cluster, "--gres=gpu:3"):  # leaves one on each node
                cluster.run("scancel", everything)
                second = program.standing(2)
        cluster.run("scancel", "-s", "TERM", program.job_id())
        program.go_on_after_notice(second)
        assert program.finish() == 0, program.said()
        assert rungs(program) == [2, 1, 4]
        assert num_ranks(program.run) == [4, 1, 4]
        assert len(list_jobs(program.run)) == 1, "one job, changed in place"
        assert final_digests(program.run) == final_digests(calm_ranks)


def test_the_first_request_is_the_most_that_can_start_soon(cluster: Cluster, tmp_path: Path, calm_ranks: Run) -> None:
    with taken(cluster, "--gres=gpu:2") as job:
        wait_for(lambda: cluster.run("squeue", "-h", "-j", job, "-o", "%T").strip() == "RUNNING", "two GPUs taken")
        sections = {"scheduler": {"gpus": [4, 2, 1]}, "elastic": {"patience_s": 60.0}, **RANKS}
        with orchestrated(cluster, tmp_path, "preempt", NEVER, **sections) as program:
            assert program.finish() == 0, program.said()
            assert num_ranks(program.run) == [2]
            assert rungs(program) == []
            assert final_digests(program.run) == final_digests(calm_ranks)
