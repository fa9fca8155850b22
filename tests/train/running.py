"""Starting runs and waiting for what they write. Nothing here imports torch."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil
import yaml

from latentwire.config import load_config
from latentwire.run.atomic import write_text
from latentwire.run.directory import Attempt, Run, create_run, is_step
from latentwire.run.goodput import KINDS
from latentwire.run.journal import read_journal
from latentwire.run.status import account_of, run_status

PATIENCE_S = 240.0
HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
OFTEN_SAVED: dict[str, Any] = {"interval_s": None, "interval_steps": 3, "best_metric": None}
SLOW_ENOUGH: dict[str, Any] = {"workload": {"options": {"pause_s": 0.05}}}
"""So that a program has time to disturb the run: 0.4 s a step."""
NEVER = 10**9
"""A visit that never comes."""
TERM, KILL, INT = signal.SIGTERM, signal.SIGKILL, signal.SIGINT
_AGENT = """
import sys
sys.modules["plotly"] = None  # as if it were not installed: no report, which takes a second of each of hundreds of runs
from latentwire.scheduler.job import TrainingJob
print(TrainingJob(sys.argv[1])())
"""

Found = TypeVar("Found")


def wait_for(look: Callable[[], Found | None], what: str) -> Found:
    """The first true value that ``look`` returns."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.005)
    raise AssertionError(f"waited {PATIENCE_S:g} s for {what}")


def write_config(folder: Path, name: str, **sections: Any) -> Path:
    """A config file of a toy run; ``sections`` lie over toy.yaml."""
    workload = {"target": f"{HERE / 'toy.py'}:Toy", **sections.pop("workload", {})}
    path = folder / f"{name}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    tree = {"base": str(HERE / "toy.yaml"), "name": name, "workload": workload, **sections}
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def make_run(folder: Path, name: str = "toy", overrides: tuple[str, ...] = (), **sections: Any) -> Run:
    """The directory of a toy run; called again with other operational settings it takes those over."""
    return create_run(load_config(write_config(folder, name, **sections), overrides), folder)


class AgentProcess:
    """A training job in a process of its own, as submitit would run it."""

    def __init__(self, run: Run, environ: Mapping[str, str] | None = None) -> None:
        self.run = run
        before = run.newest_number()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _AGENT, str(run.path)],
            env={**os.environ, **(environ or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.attempt: Attempt = wait_for(lambda: (run.attempts()[before:] or [None])[0], "the attempt")

    @property
    def pid(self) -> int:
        """The agent's."""
        return self._process.pid

    def tree(self) -> list[psutil.Process]:
        """The agent and all below it."""
        agent = psutil.Process(self.pid)
        return [agent, *agent.children(recursive=True)]

    def send(self, signum: signal.Signals) -> None:
        """Signal the agent only."""
        self._process.send_signal(signum)

    def outcome(self) -> str:
        """Wait for the end; what the job returned, or nothing if it was killed."""
        printed, _ = self._process.communicate(timeout=PATIENCE_S)
        return str(printed).strip()

    def end(self) -> None:
        """Leave nothing behind."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()


@contextmanager
def agent_of(run: Run, environ: Mapping[str, str] | None = None) -> Iterator[AgentProcess]:
    """A job that does not outlive the block."""
    agent = AgentProcess(run, environ)
    try:
        yield agent
    finally:
        agent.end()


def run_agent(run: Run, environ: Mapping[str, str] | None = None) -> str:
    """Run a job to its end."""
    with agent_of(run, environ) as agent:
        return agent.outcome()


@contextmanager
def held(run: Run, where: str, after: int = 0) -> Iterator[None]:
    """The toy stands still at ``where`` from a rank's visit number ``after`` on, until the block is left.

    Decide it before the attempt starts where you can: a toy that is not slowed down is quicker than any test.
    """
    hold(run, where, after)
    try:
        yield
    finally:
        (run.path / f"hold-{where}").unlink()


def hold(run: Run, where: str, after: int) -> None:
    """Let the toy go on, if it stands at ``where``, up to that visit."""
    write_text(run.path / f"hold-{where}", str(after))


def check_ledgers(folder: Path) -> None:
    """Of every run below that an agent ran: each moment is in one class, and the sum is the wall clock.

    Spans touch by construction: that none is missing at either end is told by what the run's writers wrote.
    """
    for path in {path.parents[2] for path in folder.rglob("experiment_*/attempts/*/environment.json")}:
        run, now = Run(path), time.time()
        ledger = account_of(run, now)
        spans = ledger.spans
        assert all(a.end_ms == b.begin_ms for a, b in itertools.pairwise(spans)), f"a hole in {run.path}"
        assert all(span.kind in KINDS and span.begin_ms < span.end_ms for span in spans), run.path
        begin_ms, end_ms = round(_began(run) * 1000), round(_ended(run, now) * 1000)
        assert (spans[0].begin_ms, spans[-1].end_ms) == (begin_ms, end_ms), run.path
        assert round(ledger.wall_s * 1000) == end_ms - begin_ms, run.path


def _began(run: Run) -> float:
    """When it was wanted first, or else was there first."""
    wanted = [e["time"] for e in run.own_events() if e["event"] in ("submitting", "submitted")]
    return float(min([*wanted, run.attempts()[0].record()["claimed"]]))


def _ended(run: Run, now: float) -> float:
    """When the last word on it was said; now, where somebody still wants it to go on."""
    if run_status(run, now).state not in ("DONE", "FAILED", "STOPPED", "CANCELLED"):
        return now
    last_words = [e for attempt in run.attempts() for e in events(attempt, "attempt_ended", "agent")]
    last_words += [e for e in run.own_events() if e["event"] == "given_up"]
    return float(max(e["time"] for e in last_words))


def events(attempt: Attempt, name: str, writer: str = "rank0") -> list[dict[str, Any]]:
    """The attempt's events of that name."""
    return [e for e in read_journal(attempt.path / f"events.{writer}.jsonl") if e.get("event") == name]


def wait_for_event(attempt: Attempt, name: str, writer: str = "rank0", number: int = 1) -> dict[str, Any]:
    """The attempt's event of that name, the ``number``-th."""
    found = wait_for(lambda: events(attempt, name, writer)[number - 1 :], f"{name} in {attempt.path}")
    return found[0]


def trained_steps(attempt: Attempt) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that belong to training steps."""
    return list(filter(is_step, read_journal(attempt.metrics_path)))


def wait_for_steps(attempt: Attempt, number: int) -> None:
    """Wait until the attempt has trained so many steps."""
    wait_for(lambda: len(trained_steps(attempt)) >= number, f"{number} steps of {attempt.path}")
