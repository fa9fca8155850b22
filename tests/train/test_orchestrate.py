"""The orchestrator as a program: stopped, started twice, given nonsense."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import psutil
import pytest
from orchestrate_parts import ORCHESTRATE, orchestrate, orchestrator, said, toy_run, wait_for_attempt
from running import BIN, INT, PATIENCE_S, events, held, make_run, wait_for, wait_for_event, write_config

from latentwire.checklist.drill import final_digests
from latentwire.run.atomic import read_json, write_json
from latentwire.run.budget import verdict_of
from latentwire.run.directory import Run
from latentwire.run.journal import read_journal
from latentwire.run.status import run_status
from latentwire.scheduler.jobs import list_jobs

# --- stopped, started twice, cancelled --------------------------------------------------------------------------------


def test_detached_refused_stopped_cancelled_and_taken_back(folder: Path, calm: Run) -> None:
    config = write_config(folder, "toy")
    run = toy_run(folder)
    run.path.mkdir(parents=True)
    with held(run, "step"):
        _detached_run_stands_still(folder, config, run)
        pid = _a_second_orchestrator_is_refused(folder, config, run)
        _ctrl_c_leaves_the_job_running(pid, run)
        _cancel(folder)
        attempt = run.attempts()[0]
        wait_for_event(attempt, "notice", "agent")
    wait_for_event(attempt, "attempt_ended", "agent")
    assert verdict_of(attempt).outcome == "cancelled"
    _cancel_stays(folder, run)
    done = orchestrate(folder, "--resume", "toy")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [verdict_of(a).outcome for a in run.attempts()] == ["cancelled", "finished"]
    assert final_digests(run) == final_digests(calm)


def _detached_run_stands_still(folder: Path, config: Path, run: Run) -> None:
    done = orchestrate(folder, "--config", config, "--detach")
    assert done.returncode == 0, done.stderr
    holder = read_json(run.lease_path)["holder"]
    assert f"pid {holder['pid']}" in done.stdout
    wait_for_event(wait_for_attempt(run, 1), "holding")


def _a_second_orchestrator_is_refused(folder: Path, config: Path, run: Run) -> int:
    pid = int(read_json(run.lease_path)["holder"]["pid"])
    before = (run.path / "config.yaml").read_text()
    for words in (("--config", config, "checkpoint.keep=7"), ("--resume", "toy")):
        refused = orchestrate(folder, *words)
        assert refused.returncode == 1
        assert f"toy is held by the orchestrator with pid {pid}" in refused.stderr
        assert "Traceback" not in refused.stderr
    assert (run.path / "config.yaml").read_text() == before, "who is refused changes nothing"
    assert "another orchestrator looks after it" in orchestrate(folder, "--resume").stdout
    return pid


def _ctrl_c_leaves_the_job_running(pid: int, run: Run) -> None:
    process = psutil.Process(pid)
    os.killpg(pid, INT)
    wait_for(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, "the orchestrator's end")
    wait_for(lambda: not run.lease_path.exists(), "the lease to be given back")
    agent = run.attempts()[0].agent()
    assert agent is not None
    assert agent.is_alive()
    assert not events(run.attempts()[0], "notice", "agent")


def _cancel(folder: Path) -> None:
    done = subprocess.run(
        [BIN / "latentwire", "cancel", "toy"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def _cancel_stays(folder: Path, run: Run) -> None:
    assert run_status(run).state == "CANCELLED"
    done = orchestrate(folder, "--resume")
    assert done.returncode == 0
    assert "nothing to resume" in done.stdout
    assert len(run.attempts()) == 1


def test_ctrl_c_says_how_to_take_over(folder: Path) -> None:
    config = write_config(folder, "toy")
    run = toy_run(folder)
    run.path.mkdir(parents=True)
    with held(run, "build"):
        with orchestrator(folder, "--config", config) as process:
            attempt = wait_for_attempt(run, 1)
            wait_for_event(attempt, "holding")
            os.killpg(process.pid, INT)
            assert process.wait(PATIENCE_S) == 128 + INT
        output = said(folder)
        assert "jobs go on" in output
        assert "Traceback" not in output
        assert attempt.ended() is None
    wait_for_event(attempt, "attempt_ended", "agent")
    done = orchestrate(folder, "--resume")
    assert done.returncode == 0
    assert "nothing to resume" in done.stdout


# --- nothing is done --------------------------------------------------------------------------------------------------


def _tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


def test_a_dry_run_changes_nothing_on_disk(folder: Path) -> None:
    config = write_config(folder, "toy")
    before = _tree(folder)
    done = orchestrate(folder, "--config", config, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "would be made" in done.stdout
    assert _tree(folder) == before
    make_run(folder / "runs")
    before = _tree(folder)
    done = orchestrate(folder, "--config", config, "--resume", "--dry-run")
    assert "exists, would go on" in done.stdout
    assert "PENDING" in done.stdout
    done = orchestrate(folder, "--config", config, "--dry-run", "checkpoint.keep=5", "alerts.for_s=9")
    assert "exists, would go on with checkpoint.keep: 3 -> 5, alerts.for_s: 300.0 -> 9.0; scheduler" in done.stdout
    assert _tree(folder) == before


def test_a_dry_run_refuses_what_a_run_would_refuse(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch = folder / "sbatch"
    sbatch.touch(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    config = write_config(folder, "toy", scheduler={"kind": "slurm", "time_min": 3})
    done = orchestrate(folder, "--config", config, "--dry-run")
    assert (done.returncode, "scheduler.time_min" in done.stderr) == (1, True), done.stderr


@pytest.mark.parametrize("how", [(), ("--dry-run",)])
def test_the_directory_of_another_config_is_refused(folder: Path, how: tuple[str, ...]) -> None:
    run = make_run(folder / "runs")
    before = _tree(run.path)
    done = orchestrate(folder, "--config", write_config(folder, "toy"), "seed=4", "train.steps=21", *how)
    assert done.returncode == 1
    assert "seed: 3 -> 4" in done.stderr
    assert "train.steps: 20 -> 21" in done.stderr
    assert "Traceback" not in done.stderr
    assert _tree(run.path) == before


# --- two at once, one of them dead ------------------------------------------------------------------------------------

_DIES_IN_A_JOB = """
import os

if "SUBMITIT_LOCAL_JOB_ID" in os.environ or "SUBMITIT_EXECUTOR" in os.environ:
    raise RuntimeError("no life in a job")


def train(session):
    raise AssertionError
"""


def test_a_job_that_dies_before_it_starts_is_given_up_and_others_go_on(folder: Path, calm: Run) -> None:
    (folder / "dead.py").write_text(_DIES_IN_A_JOB)
    dead = write_config(folder, "dead", workload={"target": f"{folder / 'dead.py'}:train"})
    done = orchestrate(folder, "--config", dead, "--config", write_config(folder, "toy"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert run_status(toy_run(folder)).state == "DONE"
    planned = orchestrate(folder, "--config", "toy.yaml", "--dry-run")
    assert "is DONE, nothing would be started" in planned.stdout, planned.stderr
    assert final_digests(toy_run(folder)) == final_digests(calm)
    run = toy_run(folder, "dead")
    status = run_status(run)
    assert status.state == "FAILED"
    assert "2 jobs in a row died before they started" in str(status.reason)
    assert "no life in a job" in str(status.reason)
    assert len(list_jobs(run)) == 1 + run.config().retry.other
    assert not run.attempts()
    deaths = [r for r in read_journal(run.orchestrator_events) if r.get("event") == "job_died"]
    assert [r["job_id"] for r in deaths] == [job.job_id for job in list_jobs(run)]


# --- a Slurm job that was requeued ------------------------------------------------------------------------------------


def test_an_orchestrator_that_slurm_started_again_takes_no_cancel_back(folder: Path) -> None:
    """It goes on with the runs that it had, not with what its command line says by now."""
    run = make_run(folder / "runs")
    write_json(folder / "runs" / "orchestrator_7.json", {"runs": ["toy"], "max_running": 1})
    write_json(run.cancel_path, {"user": "ada"})
    environ = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    command = [*ORCHESTRATE, "--config", "gone.yaml"]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert "toy: CANCELLED" in done.stdout, done.stdout + done.stderr
    assert (done.returncode, run.cancel_path.exists(), list_jobs(run)) == (1, True, [])
