"""The forecast of a real run: measured while it runs, and folded before the next attempt."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from running import BIN, NEVER, TERM, agent_of, events, held, hold, make_run, wait_for_event

from latentwire.run.directory import Run
from latentwire.run.status import run_status
from latentwire.run.telling import tell

STEP_S = 8 * 0.1
"""At least: eight micro-batches with their pause."""
IN_THE_FOURTH_STEP = 1 + 3 * 8
"""Visits of the toy: by then two saves were waited for, so that one of them is in the forecast."""


def _run(folder: Path, **preemption: Any) -> Run:
    steps = ("train.steps=5", "train.schedule.warmup_steps=1", "train.eval_every=null")
    workload = {"options": {"pause_s": 0.1}}
    checkpoint = {"interval_s": None, "interval_steps": 1, "best_metric": None}
    return make_run(folder, "toy", steps, workload=workload, checkpoint=checkpoint, preemption=preemption)


def _status(run: Run, *name: str) -> str:
    command = [BIN / "latentwire", "status", *name, "--runs-dir", run.path.parent]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_run_whose_notice_does_not_fit_warns_until_it_fits(tmp_path: Path) -> None:
    run = _run(tmp_path, grace_s=2.5)
    with held(run, "step", IN_THE_FOURTH_STEP), agent_of(run) as agent:
        wait_for_event(agent.attempt, "holding")
        assert not events(agent.attempt, "forecast", "agent"), "nothing was measured before"
        told = events(agent.attempt, "forecast")[0]
        assert told["fits"] != "step"
        assert told["needs_s"] > STEP_S + 2 > told["grace_s"] == 2.5
        assert 0.1 < told["deaf_s"] <= told["step_s"]
        assert str(tell(told)).startswith("WARNING a notice ")
        status = run_status(run)
        assert (status.state, status.reason, status.grace_s) == ("RUNNING", None, 2.5)
        assert status.warning
        assert status.advice
        assert status.warning in _status(run), "in the column of reasons"
        assert {status.warning, status.advice} <= {
            row.partition("  ")[2].strip() for row in _status(run, "toy").splitlines()
        }
        agent.send(TERM)
        wait_for_event(agent.attempt, "notice", "agent")
        hold(run, "step", NEVER)
        assert agent.outcome() == "preempted"
    assert run_status(run).warning is None, "of a run that is not running"

    run = _run(tmp_path, grace_s=120)
    with held(run, "step", 0), agent_of(run) as agent:
        before = wait_for_event(agent.attempt, "forecast", "agent")
        assert (before["fits"], before["grace_s"]) == ("step", 120)
        assert before["step_s"] > STEP_S
        wait_for_event(agent.attempt, "holding")
        assert run_status(run).warning is None
        assert f"needs {before['needs_s']:.4g} s of 120 s grace" in _status(run, "toy")
        hold(run, "step", NEVER)
        assert agent.outcome() == "finished"


def test_a_run_that_fits_says_so_once(calm: Run) -> None:
    (attempt,) = calm.attempts()
    (told,) = events(attempt, "forecast")
    assert (told["fits"], told["grace_s"]) == ("step", 120)
    assert "warning" not in told
    assert str(tell(told)).startswith("a notice fits: ")
