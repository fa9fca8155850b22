"""``latentwire preempt`` and ``cancel``."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from cli_parts import (
    Agents,
    complaint,
    finished_run,
    latentwire,
    make_run,
    printed,
    read_line,
)

from latentwire.run.atomic import read_json, write_json


@pytest.mark.parametrize("name", ["TERM", "USR1", "USR2", "INT"])
def test_preempt_delivers_the_signal(home: Path, agents: Agents, name: str) -> None:
    run = make_run(home)
    agent = agents(run)
    text = printed(home, "preempt", "toy", "--signal", name)
    assert text.startswith(f"sent SIG{name} to the agent of attempt 1 of toy (pid {agent.pid} on ")
    assert read_line(agent) == f"SIG{name}\n"
    assert not run.cancel_path.exists()


def test_preempt_kill_leaves_no_time(home: Path, agents: Agents) -> None:
    agent = agents(make_run(home))
    printed(home, "preempt", "toy", "--signal", "kill")
    assert agent.wait() == -signal.SIGKILL
    assert "is not running" in complaint(home, "preempt", "toy")


def test_preempt_of_a_run_that_is_not_running(home: Path) -> None:
    finished_run(home)
    make_run(home, "waiting")
    assert "toy is not running, so there is nothing to preempt: it is DONE" in complaint(home, "preempt", "toy")
    assert "it is PENDING" in complaint(home, "preempt", "waiting")


def test_preempt_never_hits_a_stranger_with_the_same_pid(home: Path, agents: Agents) -> None:
    run = make_run(home)
    agent = agents(run)
    path = run.attempts()[0].path / "attempt.json"
    record = read_json(path)
    record["agent"]["started"] -= 1000.0
    write_json(path, record)
    assert "is not running" in complaint(home, "preempt", "toy", "--signal", "KILL")
    assert agent.poll() is None


@pytest.mark.parametrize(("signum", "target"), [("USR2", "4711"), ("KILL", "4711.0")])
def test_preempt_through_slurm(home: Path, agents: Agents, scancel: Path, signum: str, target: str) -> None:
    agents(make_run(home), "slurm")
    result = latentwire(home, "preempt", "toy", "--signal", signum, path=scancel)
    assert result.stdout.startswith(f"sent SIG{signum} to Slurm job 4711, attempt 1 of toy")
    assert (scancel / "said").read_text() == f"-s {signum} {target}\n", "SIGKILL to a whole job would cancel it"


def test_cancel_writes_the_mark_and_tells_the_agent(home: Path, agents: Agents) -> None:
    run = make_run(home)
    agent = agents(run)
    text = printed(home, "cancel", "toy")
    assert "it saves and leaves" in text
    assert "python -m latentwire.orchestrate --resume toy" in text
    assert read_line(agent) == "SIGTERM\n"
    mark = read_json(run.cancel_path)
    assert mark["host"]
    assert mark["user"]
    assert mark["time"] > 0


def test_cancel_of_what_has_not_started_or_is_finished(home: Path) -> None:
    waiting = make_run(home, "waiting")
    assert "waiting is not running" in printed(home, "cancel", "waiting")
    assert "CANCELLED" in printed(home, "status", "waiting")
    finished = finished_run(home)
    assert "is finished: there is nothing to cancel" in complaint(home, "cancel", "toy")
    assert waiting.cancel_path.exists()
    assert not finished.cancel_path.exists()


def test_cancel_takes_a_slurm_job_out_of_the_queue(home: Path, scancel: Path) -> None:
    run = make_run(home)
    (run.path / "jobs").mkdir()
    write_json(run.path / "jobs" / "0001.json", {"job_id": "77", "scheduler": "slurm", "submitted": 1.0})
    result = latentwire(home, "cancel", "toy", path=scancel)
    assert result.stdout.startswith("cancelled Slurm job 77 of toy")
    assert (scancel / "said").read_text() == "77\n"
    assert run.cancel_path.exists()


def test_cancel_says_what_scancel_said(home: Path, agents: Agents, scancel: Path) -> None:
    run = make_run(home)
    agents(run, "slurm")
    (scancel / "scancel").write_text("#!/bin/sh\necho 'scancel: error: no controller' >&2\nexit 1\n")
    result = latentwire(home, "cancel", "toy", path=scancel)
    assert result.returncode == 1
    assert result.stderr.startswith("latentwire: scancel 4711: scancel: error: no controller; the cancel itself is on")
    assert run.cancel_path.exists()
    status = latentwire(home, "status").stdout
    assert "RUNNING" in status
    assert "cancelled: ends at its next stop" in status
