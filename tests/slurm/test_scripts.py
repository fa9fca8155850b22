"""The scripts of slurm/, used as a user does: site.env is edited, sbatch is typed, the cluster takes the nodes away."""

from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster
from orchestrated import Orchestrator, assert_lost_nothing
from running import BIN, HERE, NEVER, OFTEN_SAVED, hold, wait_for, wait_for_event, write_config
from site_folder import Site

from latentwire.checklist.drill import final_digests
from latentwire.run.atomic import read_json
from latentwire.run.budget import verdict_of
from latentwire.run.directory import Run
from latentwire.run.journal import time_of
from latentwire.run.lease import Lease
from latentwire.scheduler.jobs import list_jobs

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

SCRIPTS = ("preemptible_orchestrator", "elastic_gpu_experiment", "validation")
ONE_CPU = {"kind": "slurm", "gpus": 1, "cpus": 1}


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path) -> Iterator[Site]:
    """Its jobs do not outlive the test."""
    yield Site(cluster, tmp_path)
    cluster.run("scancel", "--me")


@contextmanager
def node_taken(site: Site, node: str) -> Iterator[None]:
    """A job of the partition ``high`` wants that node for itself."""
    options = ["-p", "high", "-w", node, "--exclusive", "--time=5", "--output=/dev/null"]
    job = site.cluster.run("sbatch", "--parsable", *options, "--wrap", "srun sleep 300").strip()
    try:
        yield
    finally:
        site.cluster.run("scancel", job)


def write_fleet(site: Site, names: list[str]) -> Path:
    """A fleet of toys."""
    toy: dict[str, Any] = {"base": str(HERE / "toy.yaml"), "workload": {"target": f"{HERE / 'toy.py'}:Toy"}}
    path = site.folder / "fleet.yaml"
    fleet = {**toy, "scheduler": ONE_CPU, "max_running": len(names), "runs": [{"name": name} for name in names]}
    path.write_text(yaml.safe_dump(fleet), encoding="utf-8")
    return path


def has_finished(run: Run) -> bool:
    """Whether nothing is left to train."""
    return verdict_of(run.attempts()[-1]).outcome == "finished"


def assert_never_two_at_once(run: Run) -> None:
    """An attempt began only when the one before had said its last word; all of them were one job's."""
    attempts = run.attempts()
    assert len({attempt.record()["job_id"] for attempt in attempts}) == len(list_jobs(run)) == 1
    for before, after in itertools.pairwise(attempts):
        assert max(map(time_of, before.events())) <= after.record()["claimed"]


def test_an_orchestrator_that_is_preempted_in_the_middle_of_a_fleet(site: Site, calm: Run) -> None:
    fleet = [site.standing_run(name) for name in ("a", "b", "c", "d")]
    config = write_fleet(site, ["a", "b", "c", "d"])
    job = site.sbatch(f"slurm/preemptible_orchestrator.slurm {config.name}")
    for run in fleet:
        wait_for(run.attempts, f"an attempt of {run.name}: {site.said(job)}")
        wait_for_event(run.attempts()[0], "holding")
    shown = site.show(job)
    assert (shown["Partition"], shown["TimeLimit"], shown["Requeue"]) == ("preempt", "00:30:00", "1")
    assert Lease(fleet[0].lease_path).how_to_stop() == f"scancel {job}"
    config.unlink()  # it goes on with its runs, whatever a user has made of their config
    with node_taken(site, shown["NodeList"]):
        wait_for(lambda: f"requeued as job {job}" in site.said(job), "the orchestrator's requeue")
        for run in fleet:
            hold(run, "step", NEVER)
        for run in fleet:
            wait_for(lambda run=run: has_finished(run), f"the end of {run.name}")  # type: ignore[misc]
    wait_for(lambda: site.show(job)["JobState"] == "COMPLETED", f"the orchestrator's end: {site.said(job)}")
    assert site.show(job)["Restarts"] == "1"
    assert [run.config().scheduler.partition for run in fleet] == ["preempt"] * 4
    assert [final_digests(run) for run in fleet] == [final_digests(calm)] * 4
    for run in fleet:
        assert_never_two_at_once(run)
        assert f"{run.name}: DONE" in site.said(job)


def test_an_experiment_that_trains_in_its_own_allocation(site: Site, calm: Run) -> None:
    run = site.standing_run("toy")
    config = write_config(site.folder, "toy", checkpoint=OFTEN_SAVED)
    job = site.sbatch(f"--cpus-per-task=2 slurm/elastic_gpu_experiment.slurm {config.name} data.prefetch=3")
    wait_for(run.attempts, f"an attempt: {site.said(job)}")
    first = run.attempts()[0]
    wait_for_event(first, "holding")
    second_job = site.sbatch(f"slurm/elastic_gpu_experiment.slurm {config.name}")
    wait_for(lambda: f"toy has job {job} already" in site.said(second_job), "the refusal of a second job")
    write_config(site.folder, "toy", seed=4)  # a user's next experiment
    orchestrator = Orchestrator(site.cluster, site.runs, "--resume")
    with node_taken(site, site.show(job)["NodeList"]):
        wait_for_event(first, "notice", "agent")
        hold(run, "step", NEVER)
        assert wait_for_event(first, "requeue", "agent")["done"]
    wait_for(lambda: site.show(job)["JobState"] == "COMPLETED", f"the end: {site.said(job)}")
    assert orchestrator.finish() == 0, orchestrator.said()
    assert_lost_nothing(run, calm)
    assert_never_two_at_once(run)
    assert run.config().data.prefetch == 3
    assert site.said(job).splitlines()[-1] == "toy: finished"


def test_an_experiment_on_two_nodes(site: Site) -> None:
    config = write_config(site.folder, "toy", workload={"options": {"counts": False}})
    job = site.sbatch(f"--nodes=2 slurm/elastic_gpu_experiment.slurm {config.name}")
    wait_for(lambda: site.show(job)["JobState"] == "COMPLETED", f"the end: {site.said(job)}")
    (attempt,) = Run(site.runs / "experiment_toy").attempts()
    assert verdict_of(attempt).outcome == "finished"
    assert read_json(attempt.path / "placement.json")["nodes"] == [0, 1]
    assert site.said(job).splitlines()[-2:] == ["toy: finished"] * 2
    assert (attempt.run.path / "report.html").exists(), "no orchestrator writes it"


def test_a_dry_run_is_the_script_that_is_submitted(site: Site) -> None:
    config = write_config(site.folder, "toy", scheduler=ONE_CPU)
    line = f'{BIN}/latentwire submit {config.name} "${{LATENTWIRE_OVERRIDES[@]}}" scheduler.extra.hold=true'
    dry = site.shell(f"{line} --dry-run")
    assert dry.returncode == 0, dry.stderr
    assert not list(site.runs.iterdir())
    done = site.shell(line)
    assert done.returncode == 0, done.stderr
    run = Run(site.runs / "experiment_toy")
    (job,) = list_jobs(run)
    assert f"submitted toy to Slurm as job {job.job_id}" in done.stdout
    (script,) = (run.path / "submitit").rglob("*submission.sh")
    token = site.show(job.job_id)["Comment"]
    assert script.read_text().replace(token, "TOKEN") == dry.stdout
    assert "--time=10\n" in dry.stdout
    again = site.shell(line)
    assert (again.returncode, f"toy has job {job.job_id} already" in again.stderr) == (1, True), again.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_sbatch_takes_a_script_with_flags_alone(site: Site, name: str) -> None:
    done = subprocess.run(
        ["sbatch", "--test-only", "-p", "cancel", "-t", "10", f"slurm/{name}.slurm", "toy.yaml"],
        cwd=site.folder,
        env=site.cluster.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "in partition cancel" in done.stderr


@pytest.mark.slow
def test_the_validation_passes(site: Site) -> None:
    workload = {"options": {"width": 1000, "pause_s": 0.01}}
    train = {"steps": 90, "global_batch": 8, "eval_every": 8, "warmup_batches": 40}
    write_config(site.folder, "short", workload=workload, train=train, checkpoint=OFTEN_SAVED)
    job = site.sbatch("--gres=gpu:0 slurm/validation.slurm short.yaml")
    while site.show(job)["JobState"] in ("PENDING", "RUNNING", "COMPLETING"):
        time.sleep(1)
    assert site.show(job)["JobState"] == "COMPLETED", site.said(job)
    assert "=== all of it works on" in site.said(job)
    assert "GraceTime=20" in site.said(job)
    assert "every byte as committed" in site.said(job)
    assert not list(site.runs.glob("validation-*"))
