"""Runs without an orchestrator: ``latentwire run`` and ``latentwire submit`` as programs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from running import BIN, PATIENCE_S, events, held, make_run, trained_steps, wait_for, wait_for_event, write_config

from latentwire.checklist.drill import final_digests
from latentwire.run.atomic import read_json, write_json
from latentwire.run.budget import verdict_of
from latentwire.run.directory import Run
from latentwire.run.lease import Lease
from latentwire.run.status import run_status
from latentwire.scheduler.jobs import list_jobs, write_job

IN_A_STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
"""What srun tells the first task of job 7."""
_ASK = """
import sys
from pathlib import Path
from latentwire.config import load_config
from latentwire.scheduler.alone import run_here
run = run_here(lambda: load_config(sys.argv[1]), Path("runs"))
print(run.name, run.config().seed)
"""


def latentwire(folder: Path, *words: str | Path, environ: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run a command to its end in that folder; its exit code and all that it printed."""
    command, env = [BIN / "latentwire", *words], {**os.environ, **(environ or {})}
    done = subprocess.run(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout


@contextmanager
def latentwire_run(folder: Path, config: Path) -> Iterator[subprocess.Popen[str]]:
    """``latentwire run`` of a config; it does not outlive the block."""
    command = [BIN / "latentwire", "run", config]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def new_run(folder: Path) -> Run:
    """Where the toy will be; its directory is there already, so that it can be told to stand still."""
    run = Run(folder / "runs" / "experiment_toy")
    run.path.mkdir(parents=True)
    return run


# --- training right here ----------------------------------------------------------------------------------------------


def test_a_run_right_here_is_preempted_and_a_submitted_job_finishes_it(tmp_path: Path, calm: Run) -> None:
    config, run = write_config(tmp_path, "toy"), new_run(tmp_path)
    with latentwire_run(tmp_path, config) as process:
        with held(run, "step", after=33):
            wait_for(run.attempts, "an attempt")
            first = run.attempts()[0]
            wait_for_event(first, "holding")
            for command in ("run", "submit"):
                code, said = latentwire(tmp_path, command, config, "checkpoint.keep=7")
                assert (code, f"toy has job {list_jobs(run)[0].job_id} already" in said) == (1, True), said
            assert run.config().checkpoint.keep == 3, "who is refused changes nothing"
            assert latentwire(tmp_path, "preempt", "toy")[0] == 0
            wait_for_event(first, "notice", "agent")
        said, _ = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, said.splitlines()[-1]) == (75, "toy: preempted")
        assert not (run.path / "report.html").exists(), "after a notice nothing may keep the machine"
    code, said = latentwire(tmp_path, "submit", config, "checkpoint.keep=4", "alerts.webhook=http://a-secret.example")
    assert code == 0, said
    assert f"submitted toy on this machine as job {list_jobs(run)[1].job_id}" in said
    wait_for(lambda: run_status(run).state == "DONE", "the job's end")
    first, second = run.attempts()
    assert [verdict_of(a).outcome for a in (first, second)] == ["preempted", "finished"]
    assert events(second, "config_changed", "agent")[0]["changes"] == ["checkpoint.keep: 3 -> 4", "alerts.webhook"]
    assert events(first, "config_changed", "agent") == []
    assert events(second, "restored")[0]["step"] == trained_steps(first)[-1]["step"]
    assert final_digests(run) == final_digests(calm)
    assert latentwire(tmp_path, "run", config) == (0, "toy: finished\n")
    code, said = latentwire(tmp_path, "submit", config)
    assert (code, "toy is finished" in said) == (1, True), said
    assert len(run.attempts()) == len(list_jobs(run)) == 2


def test_a_run_that_an_orchestrator_holds_is_left_to_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    lease = Lease(run.lease_path)
    lease.acquire()
    for command in ("run", "submit"):
        code, said = latentwire(tmp_path, command, tmp_path / "runs" / "toy.yaml")
        assert code == 1
        assert f"toy is held by the orchestrator with pid {os.getpid()}" in said
        assert "Traceback" not in said
    assert read_json(run.lease_path)["holder"]["pid"] == os.getpid()
    assert not list_jobs(run)


# --- in an allocation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "cure"),
    [({"SLURM_JOB_ID": "7"}, "srun latentwire run"), ({**IN_A_STEP, "SLURM_LOCALID": "1"}, "--ntasks-per-node=1")],
)
def test_where_it_would_hear_of_no_preemption_or_start_twice_it_does_not_train(
    tmp_path: Path, environ: Mapping[str, str], cure: str
) -> None:
    code, said = latentwire(tmp_path, "run", write_config(tmp_path, "toy"), environ=environ)
    assert (code, cure in said) == (1, True), said
    assert not (tmp_path / "runs").exists()


def ask(folder: Path, config: Path, environ: Mapping[str, str]) -> subprocess.Popen[str]:
    """A node of an allocation asks what it is to train."""
    command, env = [sys.executable, "-c", _ASK, str(config)], {**os.environ, **IN_A_STEP, **environ}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True)


def test_the_first_node_makes_the_run_and_the_others_wait_for_it(tmp_path: Path) -> None:
    config, run = write_config(tmp_path, "toy"), new_run(tmp_path)
    other = ask(tmp_path, config, {"SLURM_NODEID": "1"})
    first = ask(tmp_path, config, {})
    assert [node.communicate(timeout=PATIENCE_S)[0] for node in (first, other)] == ["toy 3\n"] * 2
    assert [(job.job_id, job.scheduler) for job in list_jobs(run)] == [("7", "slurm")]


def test_a_person_who_starts_a_job_takes_a_cancel_back(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    write_json(run.cancel_path, {"user": "ada"})
    assert ask(tmp_path, tmp_path / "runs" / "toy.yaml", {}).communicate(timeout=PATIENCE_S)[0] == "toy 3\n"
    assert not run.cancel_path.exists()


def test_a_job_that_starts_again_has_its_run_whatever_the_config_says_and_a_cancel_stays(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    write_job(run, 1, "7", "slurm")
    write_json(run.cancel_path, {"user": "ada"})
    edited = write_config(tmp_path, "another", seed=4)
    again = IN_A_STEP | {"SLURM_RESTART_COUNT": "1"}
    assert ask(tmp_path, edited, again).communicate(timeout=PATIENCE_S)[0] == "toy 3\n"
    code, said = latentwire(tmp_path, "run", edited, environ=again)
    assert (code, said.splitlines()[-1]) == (1, "toy: cancelled, cancelled by hand")
    assert run.cancel_path.exists()
    assert not run.attempts()


# --- submitting -------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_script_where_there_is_no_slurm_and_changes_nothing(tmp_path: Path) -> None:
    config = write_config(tmp_path, "toy")
    overrides = ["scheduler.kind=slurm", "scheduler.partition=gpu", "scheduler.gpus=[4,2]", "scheduler.nodes=2"]
    words = ["submit", config, *overrides, "scheduler.extra={mail_type: FAIL}", "preemption.grace_s=90", "--dry-run"]
    code, said = latentwire(tmp_path, *words, environ={"PATH": ""})
    assert code == 0, said
    options = {line.removeprefix("#SBATCH --") for line in said.splitlines() if line.startswith("#SBATCH")}
    wanted = {
        "partition=gpu",
        "gres=gpu:2",
        "nodes=2",
        "mail-type=FAIL",
        "signal=TERM@90",
        "requeue",
        "open-mode=append",
    }
    assert wanted <= options
    assert said.splitlines()[-1].startswith("srun ")
    assert [path.name for path in tmp_path.iterdir()] == ["toy.yaml"]
