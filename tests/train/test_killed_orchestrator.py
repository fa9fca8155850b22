"""The orchestrator, killed at any moment."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from orchestrate_parts import orchestrator, preempt, said, toy_run, wait_for_attempt
from running import HERE, NEVER, PATIENCE_S, hold, wait_for, wait_for_event, write_config

from latentwire.checklist.drill import final_digests
from latentwire.run.atomic import read_json
from latentwire.run.budget import verdict_of
from latentwire.run.directory import Attempt, Run
from latentwire.scheduler.jobs import list_jobs


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
            live = {pid for pid, parent in found.items() if parent not in found}  # a fork of it looks like it
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
        assert process.poll() is None, said(folder)


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


def _wait_until_it_has_looked_around(run: Run, pid: int, before: str) -> None:
    """It has told how the run is; ``before`` is what was told by then."""
    wait_for(lambda: _holder(run) == pid, "its lease")
    folder = run.path.parents[1]
    wait_for(lambda: f" {run.name}: " in said(folder).removeprefix(before), "its first look")


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
    with killed_orchestrator(folder, "--resume") as pid:
        wait_for(lambda: _holder(run) == pid, "its lease")
        _preempt_and_wait(run.attempts()[0])
    _kill_while_it_submits_and_while_the_job_trains(folder, run, 2)
    before = said(folder)
    with orchestrator(folder, "--resume") as process:
        _wait_until_it_has_looked_around(run, process.pid, before)
        hold(run, "step", NEVER)
        assert process.wait(PATIENCE_S) == 0, said(folder)
    watch.end()
    assert f"{run.name}: DONE" in said(folder)
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
    before = said(folder)
    with killed_orchestrator(folder, "--resume") as pid:
        _wait_until_it_has_looked_around(run, pid, before)
        _let_it_submit(run, number)
        wait_for_event(wait_for_attempt(run, number), "holding")


def _preempt_and_wait(attempt: Attempt) -> None:
    """The attempt leaves the step in which it stands; the next one will stand there again."""
    preempt(attempt)
    wait_for_event(attempt, "notice", "agent")
    hold(attempt.run, "step", NEVER)
    wait_for_event(attempt, "attempt_ended", "agent")
    hold(attempt.run, "step", AFTER_TWO_STEPS)
