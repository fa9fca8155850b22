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
from orchestrated import SMALL, Orchestrator, everything_taken, stand_after
from running import HERE, NEVER, hold, make_run, wait_for, wait_for_event

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


def standing_fleet(folder: Path, names: list[str], **more: Any) -> tuple[Path, list[Run]]:
    """The config of a fleet of equal toy runs, and its runs, each of which stands still after two steps."""
    fleet = [Run(folder / f"experiment_{name}") for name in names]
    for run in fleet:
        run.path.mkdir()
        hold(run, "step", stand_after(2))
    target = {"target": f"{HERE / 'toy.py'}:Toy"}
    shared = {"base": str(HERE / "toy.yaml"), "workload": target, "scheduler": {**SMALL, "partition": "preempt"}}
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump({**shared, **more, "runs": [{"name": name} for name in names]}), encoding="utf-8")
    return path, fleet


def go_on(fleet: list[Run]) -> None:
    """Stand still no more."""
    for run in fleet:
        hold(run, "step", NEVER)


def wait_until_they_stand(fleet: list[Run], orchestrator: Orchestrator) -> None:
    """Each in its first attempt."""
    for run in fleet:
        wait_for(run.attempts, f"an attempt of {run.name}: {orchestrator.said()}")
        wait_for_event(run.attempts()[0], "holding")


def own_events(run: Run, name: str) -> list[dict[str, Any]]:
    """What the orchestrator wrote of the run."""
    return [r for r in read_journal(run.orchestrator_events) if r.get("event") == name]


def test_a_fleet_is_an_array_under_a_cap_and_outlives_a_controller_that_is_down(
    cluster: Cluster, runs: Path, calm: Run
) -> None:
    config, fleet = standing_fleet(runs, ["a", "b", "c"], max_running=2)
    cluster.end("slurmctld", signal.SIGTERM)
    orchestrator = Orchestrator(cluster, runs, "--config", config)
    try:
        wait_for(lambda: own_events(fleet[0], "submission_failed"), "a submission that fails")
        cluster.start_controller()
        wait_until_they_stand(fleet[:2], orchestrator)
        assert not list_jobs(fleet[2]), "the cap"
        cluster.end("slurmctld", signal.SIGTERM)
        wait_for(lambda: "the scheduler does not answer, waiting" in orchestrator.said(), "the silence to be noticed")
        cluster.start_controller()
        go_on(fleet)
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
    config, fleet = standing_fleet(runs, ["a", "b"])
    orchestrator = Orchestrator(cluster, runs, "--config", config)
    try:
        wait_until_they_stand(fleet, orchestrator)
        preempted = fleet[0].attempts()[0]
        cluster.run("scancel", "-s", "TERM", str(preempted.record()["job_id"]))
        wait_for_event(preempted, "notice", "agent")
        go_on(fleet)
        assert orchestrator.finish() == 0, orchestrator.said()
    finally:
        orchestrator.kill()
    assert [len(run.attempts()) for run in fleet] == [2, 1]
    assert [len(list_jobs(run)) for run in fleet] == [1, 1]
    assert [final_digests(run) for run in fleet] == [final_digests(calm)] * 2


def test_a_job_whose_submission_was_cut_short_is_found(cluster: Cluster, runs: Path) -> None:
    """It waits in the queue until then: without what submitit had still to write, it dies as soon as it starts."""
    run = make_run(runs, scheduler={**SMALL, "partition": "preempt"})
    programs, answering = runs.parent / "programs", runs.parent / "answering.pid"
    programs.mkdir()
    slow = programs / "sbatch"  # the real one, whose answer comes too late
    script = f'#!/bin/sh\n{shutil.which("sbatch")} "$@" && echo $$ > {answering} && exec sleep 600\n'
    slow.write_text(script, encoding="utf-8")
    slow.chmod(0o755)
    environ = {"PATH": os.pathsep.join([str(programs), cluster.environ["PATH"]])}
    with everything_taken(cluster) as job:
        cluster.wait_until(lambda: cluster.run("squeue", "-h", "-j", job, "-o", "%T").strip() == "RUNNING")
        first = Orchestrator(cluster, runs, "--resume", environ=environ)
        wait_for(lambda: answering.exists() and answering.read_text().endswith("\n"), "the late answer")
        first.kill()
        for process in psutil.process_iter(["cmdline"]):
            if {"latentwire.scheduler.submission", str(run.path)} <= set(process.info["cmdline"] or []):
                process.kill()
        os.kill(int(answering.read_text()), signal.SIGKILL)
        assert not list_jobs(run)
        second = Orchestrator(cluster, runs, "--resume")
        try:
            wait_for(lambda: "its submission was cut short" in second.said(), "the job to be found")
            cluster.run("scancel", job)
            assert second.finish() == 0, second.said()
        finally:
            second.kill()
    first_job, *others = [e["job_id"] for e in own_events(run, "submitted")]
    assert len(run.attempts()) == 1, "and no two jobs at a time:"
    assert not others or first_job in [e["job_id"] for e in own_events(run, "job_died")]
