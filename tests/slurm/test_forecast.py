"""The grace that a real Slurm gives, in the forecast."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from running import PATIENCE_S, events, make_run

from latentwire.run.directory import Run
from latentwire.scheduler import slurm

pytestmark = pytest.mark.slurm


def _run_in(partition: str, folder: Path) -> Run:
    scheduler = {"kind": "slurm", "partition": partition, "gpus": 1, "cpus": 2, "time_min": 10}
    short = ("train.steps=4", "train.schedule.warmup_steps=1")
    checkpoint = {"interval_s": None, "interval_steps": 1}
    return make_run(folder, partition, short, scheduler=scheduler, checkpoint=checkpoint)


def _only_forecast(run: Run) -> dict[str, Any]:
    (attempt,) = run.attempts()
    (told,) = events(attempt, "forecast")
    return told


def test_the_graces_of_two_partitions(cluster: Cluster, tmp_path: Path) -> None:
    without, with_grace = (_run_in(partition, tmp_path) for partition in ("nograce", "preempt"))
    command = [sys.executable, "-m", "latentwire.orchestrate", "--resume", "--runs-dir", str(tmp_path)]
    done = subprocess.run(command, env=cluster.environ, capture_output=True, text=True, timeout=2 * PATIENCE_S)
    assert done.returncode == 0, done.stderr
    told = _only_forecast(without)
    assert (told["fits"], told["grace_s"]) == ("nothing", 0)
    assert "without grace" in told["warning"]
    assert "ask the site for a GraceTime" in told["advice"]
    told = _only_forecast(with_grace)
    assert (told["fits"], told["grace_s"]) == ("step", 20)
    warnings = [line for line in done.stdout.splitlines() if "WARNING" in line]
    assert len(warnings) == 1
    assert "nograce: WARNING a preemption comes without grace" in warnings[0]


@pytest.mark.parametrize(("partition", "grace_s"), [("cancel", 20), ("high", None)])
def test_only_a_partition_whose_jobs_are_ended_has_a_grace(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, partition: str, grace_s: float | None
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    job = cluster.run("sbatch", "--parsable", "--hold", "-p", partition, "--output=/dev/null", "--wrap", "true").strip()
    try:
        assert slurm.grace_time(job) == grace_s
        assert slurm.grace_time("99999999") is None, "no answer is no grace of 0"
    finally:
        cluster.run("scancel", job)
