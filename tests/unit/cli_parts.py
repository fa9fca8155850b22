"""The command line as a program, and run directories for it, made through the public API of the run room."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentwire.checkpoint.layout import Snapshot
from latentwire.checkpoint.manager import CheckpointManager
from latentwire.checkpoint.tensor_file import HostTensor
from latentwire.config import Config, WorkloadSection
from latentwire.run.directory import Attempt, Run, create_run
from latentwire.run.journal import Journal

Agents = Callable[..., "subprocess.Popen[str]"]
_WRITER = """
import os, sys
os.write(os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND), sys.argv[2].encode())
print("in mid-line", flush=True)
input()
"""


def program(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "latentwire", *arguments]


def latentwire(home: Path, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environ = os.environ | ({"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"} if path else {})
    return subprocess.run(program(*arguments), cwd=home, env=environ, capture_output=True, text=True, check=False)


def printed(home: Path, *arguments: str) -> str:
    """What a command that must go well prints."""
    result = latentwire(home, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def complaint(home: Path, *arguments: str, code: int = 1) -> str:
    """What a command that must fail says on stderr."""
    result = latentwire(home, *arguments)
    assert result.returncode == code
    assert "Traceback" not in result.stderr
    return result.stderr


def make_run(home: Path, name: str = "toy") -> Run:
    return create_run(Config(name=name, workload=WorkloadSection(target="json:JSONDecoder")), home / "runs")


def write_events(attempt: Attempt, writer: str, *events: tuple[float, str, dict[str, Any]]) -> None:
    clock = iter([time for time, _, _ in events])
    journal = Journal(attempt.path / f"events.{writer}.jsonl", clock=lambda: next(clock))
    for _, name, fields in events:
        journal.event(name, **fields)
    journal.close()


def end(attempt: Attempt, outcome: str, time: float = 1e9) -> None:
    write_events(attempt, "agent", (time, "attempt_ended", {"outcome": outcome, "step": 20}))


def finished_run(home: Path) -> Run:
    """Two attempts: the first preempted at step 10, the second finished at step 20; an orchestrator saw both."""
    run = make_run(home)
    journal = Journal(run.orchestrator_events, clock=lambda: 99.0)
    journal.event("submitted", job_id="4711")
    journal.close()
    for number, outcome in ((1, "preempted"), (2, "finished")):
        attempt = run.claim_attempt("4711", "local")
        start = 100.0 * number
        write_events(attempt, "agent", (start, "attempt_started", {"total_steps": 20}))
        write_events(attempt, "rank0", (start + 1, "save_committed", {"step": 10 * number, "why": "two words"}))
        metrics = Journal(attempt.metrics_path, clock=lambda: 1.0)
        metrics.record(step=10 * number, loss=4.5 - number, samples_per_s=100.0, step_s=0.1)
        metrics.close()
        end(attempt, outcome, start + 2)
    return run


def save(run: Run, *steps: int) -> None:
    manager = CheckpointManager(
        run.checkpoints, token=1, version="0", identity={"config": "ab"}, fence=lambda: None, event=lambda *a, **k: None
    )
    tensor = HostTensor("F32", (2, 3), memoryview(bytes(range(24))))
    counter = HostTensor("I64", (1,), memoryview(bytes(8)))
    for step in steps:
        tensors = {"model": {"w": tensor, "v": tensor}, "optimizer": {"count": counter}}
        manager.save(Snapshot(step, tensors, {"cursor": step}, {"eval/loss": 1.25}))
    manager.close()


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def killed_in_mid_line(path: Path, text: str) -> None:
    """A process appends the text, which ends with half a line, and is killed before it writes the rest."""
    command = [sys.executable, "-c", _WRITER, str(path), text]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert read_line(writer) == "in mid-line\n"
    writer.kill()
    writer.communicate()
    assert writer.returncode == -signal.SIGKILL
    assert not path.read_bytes().endswith(b"\n")


def of_a_terminal() -> dict[str, str]:
    """The environment without the size that readline puts into pytest's own, and pytest's workers inherit."""
    return {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}


def on_terminal(home: Path, *arguments: str, columns: int = 80) -> str:
    """What a command writes onto a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    try:
        subprocess.run(program(*arguments), cwd=home, env=of_a_terminal(), stdout=theirs, check=True)
        return os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
        os.close(theirs)
