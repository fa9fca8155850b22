"""Where jobs go, and what they know of Slurm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_parts import end, make_run

from latentwire.config import SchedulerSection, parse_config
from latentwire.errors import ConfigError
from latentwire.scheduler import slurm
from latentwire.scheduler.job import SlurmAllocation
from latentwire.scheduler.submission import check_times, scheduler_kind
from latentwire.scheduler.watched import Watched

NO_CLUSTER = "echo 'scontrol: fatal: Could not establish a configuration source' >&2; exit 1"
DOWN = "echo 'Slurmctld(primary) at login is DOWN'; exit 1"


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """Programs of these names and shell lines are all that is on PATH."""
    for name, line in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.parametrize(
    ("programs", "kind"),
    [
        ({}, "local"),
        ({"sbatch": "", "scontrol": NO_CLUSTER}, "local"),
        ({"sbatch": "", "scontrol": DOWN}, "slurm"),
        ({"sbatch": "", "scontrol": ""}, "slurm"),
        ({"sbatch": ""}, "slurm"),
    ],
)
def test_auto_goes_to_slurm_where_there_is_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: dict[str, str], kind: str
) -> None:
    install(tmp_path, monkeypatch, **programs)
    assert scheduler_kind(SchedulerSection()) == kind


def test_slurm_without_sbatch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match="no sbatch on PATH"):
        scheduler_kind(SchedulerSection(kind="slurm"))
    assert scheduler_kind(SchedulerSection(kind="local")) == "local"


def test_a_task_knows_its_node_from_its_environment() -> None:
    environ = {"SLURM_JOB_ID": "77", "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2", "SLURM_RESTART_COUNT": "3"}
    assert SlurmAllocation.of_this_task(environ) == SlurmAllocation("77", 3, 1, 2, None)
    assert SlurmAllocation.of_this_task(environ | {"SLURM_GPUS_ON_NODE": "2"}).num_gpus == 2
    assert SlurmAllocation.of_this_task(environ | {"CUDA_VISIBLE_DEVICES": "0,1,5"}).num_gpus == 3
    assert SlurmAllocation.of_this_task({"SLURM_JOB_ID": "77"}) == SlurmAllocation("77", 0, 0, 1, None)


class Controller:
    """Slurm's answers for one running job, and what was asked of it."""

    def __init__(self, restarts: int) -> None:
        self.restarts = restarts
        self.commands: list[Sequence[str]] = []

    def __call__(self, command: Sequence[str]) -> str:
        self.commands.append(command)
        self.restarts += "requeue" in command
        return f"JobId=77 JobState=RUNNING Restarts={self.restarts}"


def test_a_start_of_a_job_requeues_itself() -> None:
    controller = Controller(restarts=1)
    assert slurm.requeue("77", 1, controller) == slurm.Requeue(True, "requeued")
    assert controller.restarts == 2


def test_an_earlier_start_leaves_the_job_alone() -> None:
    controller = Controller(restarts=2)
    assert slurm.requeue("77", 1, controller).done
    assert not [command for command in controller.commands if "requeue" in command]


@pytest.mark.parametrize(("minutes", "grace_s", "fits"), [(3, 120.0, False), (4, 120.0, True), (2, 5.0, True)])
def test_a_time_limit_that_leaves_no_time_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: int, grace_s: float, fits: bool
) -> None:
    install(tmp_path, monkeypatch, sbatch="")
    sections = {"scheduler": {"kind": "slurm", "time_min": minutes}, "preemption": {"grace_s": grace_s}}
    config = parse_config({"name": "a", "workload": {"target": "script"}, **sections}, "here")
    if fits:
        check_times([config])
        return
    with pytest.raises(ConfigError, match=r"scheduler\.time_min.* Ask for 4 min or more"):
        check_times([config])


def test_a_fleet_asks_once_whether_there_is_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tmp_path / "asked"
    install(tmp_path, monkeypatch, sbatch="", scontrol=f"echo ping >> {asked}")
    configs = [parse_config({"name": name, "workload": {"target": "script"}}, "here") for name in "abc"]
    assert check_times(configs) == {"auto": "slurm"}
    assert asked.read_text() == "ping\n"


def test_a_run_that_was_looked_at_before_it_is_given_up_is_known_to_have_failed(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    watched = Watched(run)
    watched.journal.event("resumed", after_attempt=0)  # somebody looks after it
    end(run.claim_attempt("1", "local"), "failed")
    watched.fold(100.0, 0.0)
    assert watched.status.state == "RETRYING"
    watched.give_up("2 times other, 1 allowed")
    watched.fold(101.0, 0.0)
    assert (watched.status.state, watched.status.reason) == ("FAILED", "2 times other, 1 allowed")
    watched.release()
