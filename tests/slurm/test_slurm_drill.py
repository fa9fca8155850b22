"""The drill through sbatch and scancel."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cluster import Cluster
from running import BIN, OFTEN_SAVED, PATIENCE_S, TERM, wait_for, write_config

from latentwire.run.directory import Run
from latentwire.run.status import run_status

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@contextmanager
def drill_of_the_toy(cluster: Cluster, folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """``latentwire drill --cluster slurm``, until the block is left."""
    scheduler = {"partition": "nograce", "gpus": 1, "cpus": 2, "time_min": 10}
    train = {"steps": 60, "global_batch": 8, "eval_every": 20}
    workload = {"options": {"pause_s": 0.1}}  # steps enough for the drill, however late a signal comes
    config = write_config(
        folder, "toy-drill", workload=workload, train=train, checkpoint=OFTEN_SAVED, scheduler=scheduler
    )
    command = [BIN / "latentwire", "drill", "--cluster", "slurm", "--partition", "preempt", "--config", config]
    process = subprocess.Popen(
        [*command, "--runs-dir", folder / "runs", *options],
        env=cluster.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(TERM)  # it ends what it started
        process.communicate()


def jobs(cluster: Cluster, partition: str, states: str) -> list[str]:
    """The numbers of jobs."""
    return cluster.run("squeue", "-h", "-p", partition, "-t", states, "-o", "%i").split()


def wait_for_run(runs_dir: Path, name: str) -> Run:
    """One of the drill's runs, once its job is submitted."""
    (path,) = wait_for(lambda: list(runs_dir.glob(f"drill-*/experiment_{name}/jobs/0001.json")), f"the {name} run")
    return Run(path.parents[1])


def test_the_bits_survive_whatever_slurm_does(cluster: Cluster, tmp_path: Path) -> None:
    with drill_of_the_toy(cluster, tmp_path, "--preempting-partition", "high", "--json") as process:
        output, errors = process.communicate()
    print(output)  # the figures of the checklist
    assert process.returncode == 0, output + errors
    result = json.loads(output)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [
        "TERM in training",
        "preempted by high",
        "SIGKILL",
        "newest checkpoint corrupted",
        "scontrol requeue",
    ]
    assert {name for name, row in rows.items() if row["jobs"].endswith("requeued")} == {
        "TERM in training",
        "preempted by high",
        "scontrol requeue",
    }
    assert result["passed"]
    assert result["undisturbed"] == result["disturbed"]
    assert not result["other_hardware"]
    assert list((tmp_path / "runs").iterdir()) == [], "what went well is cleaned up"


@pytest.mark.slow
def test_an_interrupt_leaves_no_job_behind(cluster: Cluster, tmp_path: Path) -> None:
    with drill_of_the_toy(cluster, tmp_path, "--preempting-partition", "high", "train.steps=30") as process:
        undisturbed, disturbed = (wait_for_run(tmp_path / "runs", name) for name in ("undisturbed", "disturbed"))
        assert run_status(undisturbed).state == "DONE", "it is not to be preempted too"
        wait_for(lambda: len(disturbed.attempts()) == 2, "what follows the TERM in training")
        wait_for(lambda: jobs(cluster, "high", "running"), "the job that preempts")
        process.send_signal(TERM)
        process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + TERM
    wait_for(lambda: not jobs(cluster, "high,preempt", "pending,running,completing"), "an empty cluster")


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        ("cancel", "jobs of partition cancel (PriorityTier 1) do not preempt those of preempt (PriorityTier 1"),
        ("nonsense", "there is no partition 'nonsense'; there are: cancel, high, nograce, preempt"),
    ],
    ids=["no higher tier", "no such partition"],
)
def test_a_partition_that_does_not_preempt_is_refused_at_once(
    cluster: Cluster, tmp_path: Path, other: str, complaint: str
) -> None:
    with drill_of_the_toy(cluster, tmp_path, "--preempting-partition", other) as process:
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert errors.startswith(f"latentwire: {complaint}")
    assert not (tmp_path / "runs").exists()
