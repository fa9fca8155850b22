"""Many runs at once, and a Slurm that does not answer or loses its client."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from cluster import Cluster
from orchestrated import SMALL, Orchestrator
from running import HERE, SLOW_ENOUGH, make_run, wait_for, wait_for_steps

from latentwire.checklist.drill import final_digests
from latentwire.run.directory import Run
from latentwire.run.journal import read_journal
from latentwire.scheduler.jobs import list_jobs

pytestmark = pytest.mark.slurm


@pytest.fixture
def runs(cluster: Cluster, tmp_path: Path) -> Iterator[Path]:
    """A folder of runs; their jobs do not outlive the test."""
    folder = tmp_path / "runs"
    folder.mkdir()
    yield folder
    cluster.run("scancel", "--me")


def write_fleet(folder: Path, names: list[str], **more: Any) -> Path:
    """A fleet of equal toy runs."""
    target = {"target": f"{HERE / 'toy.py'}:Toy", **SLOW_ENOUGH["workload"]}
    shared = {"base": str(HERE / "toy.yaml"), "workload": target, "scheduler": {**SMALL, "partition": "preempt"}}
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump({**shared, **more, "runs": [{"name": name} for name in names]}), encoding="utf-8")
    return path


def own_events(run: Run, name: str) -> list[dict[str, Any]]:
    """What the orchestrator wrote of the run."""
    return [r for r in read_journal(run.orchestrator_events) if r.get("event") == name]


def test_a_fleet_is_an_array_under_a_cap_and_outlives_a_controller_that_is_down(
    cluster: Cluster, runs: Path, calm: Run
) -> None:
    names = ["a", "b", "c"]
    fleet = [Run(runs / f"experiment_{name}") for name in names]
    cluster.end("slurmctld", signal.SIGTERM)
    orchestrator = Orchestrator(cluster, runs, "--config", write_fleet(runs, names, max_running=2))
    try:
        wait_for(lambda: own_events(fleet[0], "submission_failed"), "a submission that fails")
        cluster.start_controller()
        for run in fleet[:2]:
            wait_for(run.attempts, f"an attempt of {run.name}: {orchestrator.said()}")
            wait_for_steps(run.attempts()[0], 1)
        assert not list_jobs(fleet[2]), "the cap"
        cluster.end("slurmctld", signal.SIGTERM)
        wait_for(lambda: "the scheduler does not answer, waiting" in orchestrator.said(), "the silence to be noticed")
        cluster.start_controller()
        assert orchestrator.finish() == 0, orchestrator.said()
    finally:
        orchestrator.kill()
        cluster.start_controller()
    jobs = {run.name: list_jobs(run) for run in fleet}
    assert {name: len(each) for name, each in jobs.items()} == {"a": 1, "b": 1, "c": 1}
    array, _, task = jobs["a"][0].job_id.partition("_")
    assert (task, jobs["b"][0].job_id) == ("0", f"{array}_1")
    assert [len(run.attempts()) for run in fleet] == [1, 1, 1]
    assert [final_digests(run) for run in fleet] == [final_digests(calm)] * 3


def test_a_preempted_task_of_an_array_requeues_itself_alone(cluster: Cluster, runs: Path, calm: Run) -> None:
    fleet = [Run(runs / f"experiment_{name}") for name in ("a", "b")]
    orchestrator = Orchestrator(cluster, runs, "--config", write_fleet(runs, ["a", "b"]))
    try:
        for run in fleet:
            wait_for(run.attempts, f"an attempt of {run.name}: {orchestrator.said()}")
            wait_for_steps(run.attempts()[0], 2)
        cluster.run("scancel", "-s", "TERM", str(fleet[0].attempts()[0].record()["job_id"]))
        assert orchestrator.finish() == 0, orchestrator.said()
    finally:
        orchestrator.kill()
    assert [len(run.attempts()) for run in fleet] == [2, 1]
    assert [len(list_jobs(run)) for run in fleet] == [1, 1]
    assert [final_digests(run) for run in fleet] == [final_digests(calm)] * 2


def test_a_job_whose_submission_was_cut_short_is_found(cluster: Cluster, runs: Path) -> None:
    run = make_run(runs, scheduler={**SMALL, "partition": "preempt"}, **SLOW_ENOUGH)
    programs = runs.parent / "programs"
    programs.mkdir()
    slow = programs / "sbatch"  # the real one, whose answer comes too late
    slow.write_text(f'#!/bin/sh\n{shutil.which("sbatch")} "$@" && exec sleep 600\n', encoding="utf-8")
    slow.chmod(0o755)
    environ = {"PATH": os.pathsep.join([str(programs), cluster.environ["PATH"]])}
    first = Orchestrator(cluster, runs, "--resume", environ=environ)
    wait_for(lambda: cluster.run("squeue", "-h", "--me", "-o", "%i").strip(), "the job")
    first.kill()
    for process in psutil.process_iter(["cmdline"]):
        if str(run.path) in (process.info["cmdline"] or []) or (process.info["cmdline"] or []) == ["sleep", "600"]:
            process.kill()
    assert not list_jobs(run)
    second = Orchestrator(cluster, runs, "--resume")
    try:
        assert second.finish() == 0, second.said()
    finally:
        second.kill()
    assert "its submission was cut short" in second.said()
    first_job, *others = [e["job_id"] for e in own_events(run, "submitted")]
    assert len(run.attempts()) == 1, "and no two jobs at a time:"
    assert not others or first_job in [e["job_id"] for e in own_events(run, "job_died")]
