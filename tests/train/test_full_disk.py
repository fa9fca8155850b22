"""The saves that nobody could make later, on a disk that others have filled: older checkpoints make room."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from orchestrate_parts import orchestrate
from running import TERM, agent_of, events, make_run, wait_for_event

from latentwire.checkpoint.reader import is_verified
from latentwire.run.directory import Run
from latentwire.run.status import RunStatus, run_status
from latentwire.scheduler.orchestrator import Orchestrator

SCRIPT = """
import contextlib, os, signal, sys
import torch
from latentwire import Session

path, full_at, is_noticed = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "noticed"
rows = [torch.full((500,), i / 64) for i in range(64)]

def fill(path):
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))

with Session(path, checkpoint={"interval_s": None, "interval_steps": 5, "best_metric": None}) as session:
    model = torch.nn.Linear(500, 200)
    optimizer = torch.optim.AdamW(model.parameters())
    session.track(model=model, optimizer=optimizer)
    for batch in session.batches(rows, batch_size=4, steps=20):
        model(batch).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if session.step == full_at:
            fill(os.path.join(os.path.dirname(path), "filler"))
            if is_noticed:
                os.kill(os.getpid(), signal.SIGTERM)
"""
PREEMPTED = 75


def train(run: Run, full_at: int, *, noticed: bool) -> int:
    """20 steps, saved every 5; the disk is full in the midst of the step after ``full_at``. Returns the exit code."""
    words = [sys.executable, "-c", SCRIPT, run.path, str(full_at), "noticed" if noticed else "left alone"]
    return subprocess.run(words, check=False).returncode


@pytest.fixture
def run(mount_disk: Callable[[str], Path]) -> Run:
    """On a disk with room for about five checkpoints of 1.2 MB."""
    return Run(mount_disk("6m") / "experiment_own")


def test_a_notice_on_a_full_disk_loses_no_step(run: Run) -> None:
    assert train(run, 16, noticed=True) == PREEMPTED
    assert_newest(run, 17)
    (run.path.parent / "filler").unlink()
    assert train(run, -1, noticed=False) == 0
    assert [event["step"] for attempt in run.attempts() for event in events(attempt, "restored")] == [0, 17]


def test_a_finished_run_is_saved_on_a_full_disk(run: Run) -> None:
    assert train(run, 19, noticed=False) == 0
    assert_newest(run, 20)


def test_a_notice_to_a_job_on_a_full_disk_is_a_preemption(mount_disk: Callable[[str], Path]) -> None:
    run, outcome = preempted_on_a_full_disk(mount_disk("6m"), keep=3)
    assert outcome == "preempted"
    assert_newest(run, at_least=13)


def test_it_is_one_too_where_nothing_can_be_saved_and_nobody_told(mount_disk: Callable[[str], Path]) -> None:
    run, outcome = preempted_on_a_full_disk(mount_disk("3m"), keep=1)
    assert outcome == "preempted"
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step-00000010"]
    (attempt,) = run.attempts()
    assert "without saving" not in (attempt.path / "stderr.log").read_text(), "there was room for it"


def preempted_on_a_full_disk(disk: Path, keep: int) -> tuple[Run, str]:
    """A job that gets its notice in its 13th step: no save is under way, and not a byte is free, of its log either."""
    checkpoint = {"interval_s": None, "interval_steps": 5, "keep": keep, "best_metric": None}
    run = make_run(disk, train={"steps": 10_000}, checkpoint=checkpoint)
    held = disk.with_name("hold")
    held.write_text(str(1 + 12 * 8))
    (run.path / "hold-step").symlink_to(held)  # to let go leaves no byte free on the disk
    with agent_of(run) as agent:
        wait_for_event(agent.attempt, "holding")
        wait_for_event(agent.attempt, "save_verified", number=2)
        log = agent.attempt.path / "stderr.log"
        with open(log, "ab") as file:
            file.write(b"x" * (-log.stat().st_size % 4096))
        fill(disk / "filler")
        agent.send(TERM)
        held.unlink()
        return run, agent.outcome()


def test_the_orchestrator_waits_for_room(mount_disk: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    disk = mount_disk("4m")
    run = make_run(disk)
    minutes = itertools.count()
    looks: list[Sequence[RunStatus]] = []

    def show(statuses: Sequence[RunStatus]) -> None:
        looks.append(statuses)
        if len(looks) == 3:
            orchestrator.stop()

    orchestrator = Orchestrator([run], show, clock=lambda: time.time() + 61 * next(minutes))
    fill(disk / "filler")
    with caplog.at_level("WARNING", "latentwire.orchestrate"):
        orchestrator.main()
    assert "toy: the lease was not renewed: " in caplog.text
    assert "No space left on device; free some space there" in caplog.text
    assert "given up" not in caplog.text
    assert run_status(run).state != "FAILED"
    (disk / "filler").unlink()
    assert orchestrate(disk, "--resume", "toy", "--runs-dir", disk).returncode == 0
    assert run_status(run).state == "DONE"


def fill(path: Path) -> None:
    """Take all that is free."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def assert_newest(run: Run, at_least: int) -> None:
    """It is verified, and so is an older one that was left."""
    verified = [path.name for path in sorted((run.path / "checkpoints").glob("step-*")) if is_verified(path)]
    assert int(verified[-1].removeprefix("step-")) >= at_least
    assert 2 <= len(verified) <= 3
