"""A run on disk, as tests make it, and processes that talk to them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

from latentwire.config import Config, parse_config
from latentwire.run.directory import Attempt, Run
from latentwire.run.journal import Journal
from latentwire.run.process import ProcessIdentity

NOW = 1_000_000.0


def config(name: str = "test", **sections: Any) -> Config:
    return parse_config({"name": name, "workload": {"target": "json:JSONDecoder"}, **sections}, "here")


Start = Callable[..., "subprocess.Popen[str]"]


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


ELSEWHERE = ProcessIdentity("another-host", 1, 1.0)


def end_attempt(run: Run, outcome: str | None, cause: str | None = None, committed: int | None = None) -> Attempt:
    """An attempt that ended so, and perhaps committed a step; ``None``: lost without a word."""
    attempt = run.claim_attempt("1", "local")
    if committed is not None:
        tell(attempt, "rank0", "save_committed", step=committed)
    if outcome is not None:
        words = {"cause": cause, "error": f"why {attempt.number}"} if outcome == "failed" else {}
        tell(attempt, "agent", "attempt_ended", outcome=outcome, **words)
    return attempt


def tell(attempt: Attempt, writer: str, event: str, time: float = NOW, **fields: Any) -> None:
    journal = Journal(attempt.path / f"events.{writer}.jsonl", clock=lambda: time)
    journal.event(event, **fields)
    journal.close()
