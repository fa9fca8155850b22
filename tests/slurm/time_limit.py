"""Runs that reach their time limit. Slurm counts in minutes and looks twice a minute: they begin before all else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster import Cluster
from orchestrated import Orchestrated, orchestrated
from running import wait_for, wait_for_event

from latentwire.run.directory import Run

SOON: dict[str, Any] = {"scheduler": {"time_min": 2}, "preemption": {"grace_s": 5}}


def warned(cluster: Cluster, folder: Path) -> Orchestrated:
    """It leaves when Slurm warns it, up to a minute early."""
    with orchestrated(cluster, folder, "preempt", **SOON) as program:
        program.go_on_after_notice(program.standing())
        program.finish()
        return program


def ended(cluster: Cluster, folder: Path) -> Orchestrated:
    """Its step is longer than all that it is given: the limit comes over it."""
    with orchestrated(cluster, folder, "preempt", **SOON) as program:
        wait_for_event(program.standing(), "notice", "agent")
        wait_for(lambda: "DUE TO TIME LIMIT" in stderr_of_jobs(program.run), "the time limit")
        program.go_on()
        program.finish()
        return program


def stderr_of_jobs(run: Run) -> str:
    """submitit's logs of the run's jobs; Slurm tells there what it does to them."""
    return "".join(path.read_text() for path in (run.path / "submitit").glob("*/*_log.err"))
