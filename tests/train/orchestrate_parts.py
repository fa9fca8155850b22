"""The orchestrator as a program."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from running import PATIENCE_S, TERM, wait_for

from latentwire.run.directory import Attempt, Run

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


def said(folder: Path) -> str:
    """What the orchestrators in that folder printed."""
    return (folder / "orchestrator.out").read_text()
