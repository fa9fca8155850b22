"""The orchestrator as a program: killed, stopped, started twice, given nonsense."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from running import (
    BIN,
    HERE,
    INT,
    KILL,
    NEVER,
    PATIENCE_S,
    TERM,
    events,
    held,
    hold,
    make_run,
    wait_for,
    wait_for_event,
    write_config,
)

from latentwire.checklist.drill import final_digests
from latentwire.run.atomic import read_json, write_json
from latentwire.run.budget import verdict_of
from latentwire.run.directory import Attempt, Run
from latentwire.run.journal import read_journal
from latentwire.run.status import run_status
from latentwire.scheduler.jobs import list_jobs

ORCHESTRATE = [sys.executable, "-m", "latentwire.orchestrate"]


def orchestrate(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the orchestrator to its end in that folder."""
    command = [*ORCHESTRATE, *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=PATIENCE_S)


@contextmanager
def orchestrator(folder: Path, *words: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """An orchestrator that does not outlive the block."""
    with open(folder / "orchestrator.out", "ab") as output:
        process = subprocess.Popen(
            [*ORCHESTRATE, *words], cwd=folder, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def toy_run(folder: Path, name: str = "toy") -> Run:
    """Where the orchestrator puts the run."""
    return Run(folder / "runs" / f"experiment_{name}")


def wait_for_attempt(run: Run, number: int) -> Attempt:
    """The run's attempt of that number."""
    return wait_for(lambda: (run.attempts()[number - 1 :] or [None])[0], f"attempt {number}")


def preempt(attempt: Attempt) -> None:
    """Send TERM to the attempt's agent."""
    agent = attempt.agent()
    assert agent is not None
    assert agent.send(TERM)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A working folder; jobs that a failed test leaves in it are ended."""
    yield tmp_path
    for path in (tmp_path / "runs").glob("experiment_*"):
        for holding in path.glob("hold-submission-*"):
            with suppress(FileNotFoundError, ProcessLookupError):
                os.kill(int((path / f"{holding.name.removeprefix('hold-')}.pid").read_text()), KILL)
        for attempt in Run(path).attempts():
            agent = attempt.agent()
            if agent is not None:
                agent.send(KILL)


# --- killed at any moment ---------------------------------------------------------------------------------------------


class AgentWatch(threading.Thread):
    """Looks all the time how many agents of a run are alive at once."""

    def __init__(self, run: Run) -> None:
        super().__init__(daemon=True)
        self._run = run
        self._ended = threading.Event()
        self.most = 0
        self.seen: set[int] = set()

    def run(self) -> None:
        while not self._ended.wait(0.1):
            found = {p.pid: p.info["ppid"] for p in psutil.process_iter(["ppid"]) if self._is_agent(p)}
            live = {
                pid for pid, parent in found.items() if parent not in found
            }  # what it has just forked looks like it
            self.seen |= live
            self.most = max(self.most, len(live))

    def _is_agent(self, process: psutil.Process) -> bool:
        try:
            words = process.cmdline()
            alive = process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False
        return alive and "submitit.core._submit" in words and any(str(self._run.path) in word for word in words)

    def end(self) -> None:
        self._ended.set()
        self.join()


@contextmanager
def killed_orchestrator(folder: Path, *words: str | Path) -> Iterator[int]:
    """An orchestrator that is killed where the block ends; its pid."""
    with orchestrator(folder, *words) as process:
        yield process.pid
        assert process.poll() is None, _said(folder)


def _hold_submissions(run: Run) -> None:
    for number in (1, 2):
        (run.path / f"hold-submission-{number}").touch()


def _let_it_submit(run: Run, number: int) -> None:
    (run.path / f"hold-submission-{number}").unlink()


def _wait_until_it_submits(run: Run, number: int, pid: int) -> None:
    """The orchestrator looks after the run, and the submission is under way, begun by it or by the one before."""
    wait_for(lambda: _holder(run) == pid, "its lease")
    wait_for((run.path / f"submission-{number}.pid").exists, f"submission {number}")
    assert len(list_jobs(run)) == number - 1


def _wait_until_it_has_looked_around(run: Run, pid: int, said: str) -> None:
    """It has told how the run is; ``said`` is what was told before."""
    wait_for(lambda: _holder(run) == pid, "its lease")
    folder = run.path.parents[1]
    wait_for(lambda: f" {run.name}: " in _said(folder).removeprefix(said), "its first look")


def _said(folder: Path) -> str:
    return (folder / "orchestrator.out").read_text()


def _holder(run: Run) -> int | None:
    record = read_json(run.lease_path)
    return None if record is None else int(record["holder"]["pid"])


AFTER_TWO_STEPS = 1 + 2 * 8
"""Visits of a lone rank: one in warm-up, eight in each step."""


def test_an_orchestrator_killed_at_any_moment_is_resumed_and_no_job_runs_twice(
    folder: Path, calm: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE / "held_submission"), prepend=os.pathsep)
    config, run = write_config(folder, "toy"), toy_run(folder)
    run.path.mkdir(parents=True)
    _hold_submissions(run)
    hold(run, "step", AFTER_TWO_STEPS)
    watch = AgentWatch(run)
    watch.start()
    with killed_orchestrator(folder, "--config", config):
        wait_for(run.lease_path.exists, "its start")
    _kill_while_it_submits_and_while_the_job_trains(folder, run, 1)
    with killed_orchestrator(folder, "--resume"):
        _preempt_and_wait(run.attempts()[0])
    _kill_while_it_submits_and_while_the_job_trains(folder, run, 2)
    said = _said(folder)
    with orchestrator(folder, "--resume") as process:
        _wait_until_it_has_looked_around(run, process.pid, said)
        hold(run, "step", NEVER)
        assert process.wait(PATIENCE_S) == 0, _said(folder)
    watch.end()
    assert f"{run.name}: DONE" in _said(folder)
    assert final_digests(run) == final_digests(calm)
    assert watch.most == 1
    assert [verdict_of(attempt).outcome for attempt in run.attempts()] == ["preempted", "finished"]
    assert len(watch.seen) == len(list_jobs(run)) == 2
    ends = [max(e["time"] for e in attempt.events()) for attempt in run.attempts()]
    assert ends[0] <= run.attempts()[1].record()["claimed"]


def _kill_while_it_submits_and_while_the_job_trains(folder: Path, run: Run, number: int) -> None:
    """The submission goes on when the next orchestrator has found it under way."""
    with killed_orchestrator(folder, "--resume") as pid:
        _wait_until_it_submits(run, number, pid)
    said = _said(folder)
    with killed_orchestrator(folder, "--resume") as pid:
        _wait_until_it_has_looked_around(run, pid, said)
        _let_it_submit(run, number)
        wait_for_event(wait_for_attempt(run, number), "holding")


def _preempt_and_wait(attempt: Attempt) -> None:
    """The attempt leaves the step in which it stands; the next one will stand there again."""
    preempt(attempt)
    wait_for_event(attempt, "notice", "agent")
    hold(attempt.run, "step", NEVER)
    wait_for_event(attempt, "attempt_ended", "agent")
    hold(attempt.run, "step", AFTER_TWO_STEPS)


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
        output = _said(folder)
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
