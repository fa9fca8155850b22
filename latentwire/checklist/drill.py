"""The drill: a run under preemptions must end with the bits of the same run undisturbed.

It does what a user and a scheduler do: starts the orchestrator as a program, watches the run's files, and sends signals
to the job. Whether a signal fell where it was meant to is judged by the run's own journal, and tried again if not.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from latentwire.config import load_config
from latentwire.errors import LatentWireError
from latentwire.run.directory import PREFIX, Attempt, Run
from latentwire.run.journal import read_journal
from latentwire.run.status import run_status

_POLL_S = 0.002
_PATIENCE_S = 600.0
_TRIES = 4


@dataclasses.dataclass(frozen=True)
class Disturbance:
    """One thing that is done to the run.

    Attributes:
        name: for the table.
        signum: what is sent to the attempt.
        begins: the event that opens the window, or None: after ``steps`` steps of the attempt.
        ends: events that close the window.
        steps: training steps to wait for in the attempt first.
        corrupt: flip a byte of the newest checkpoint afterwards.
        may_lose: intervals of saving that may be lost.
    """

    name: str
    signum: signal.Signals
    begins: str | None = None
    ends: tuple[str, ...] = ()
    steps: int = 0
    corrupt: bool = False
    may_lose: int = 0


TERM, KILL = signal.SIGTERM, signal.SIGKILL
DISTURBANCES = (
    Disturbance("TERM in warm-up", TERM, begins="warmup_started", ends=("warmup_finished",)),
    Disturbance("TERM in training", TERM, steps=2),
    Disturbance("TERM in evaluation", TERM, begins="evaluation_started", ends=("evaluation_finished",)),
    Disturbance("TERM during a save", TERM, begins="save_started", ends=("save_verified", "save_failed")),
    Disturbance("SIGKILL", KILL, steps=3, may_lose=1),
    Disturbance("newest checkpoint corrupted", KILL, begins="save_verified", corrupt=True, may_lose=2),
    Disturbance("TERM, first of two in an epoch", TERM, steps=1),
    Disturbance("TERM, second of two in an epoch", TERM, steps=1),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """What came of a disturbance. ``epoch``: where it fell. ``resume_s``: from the signal to the next trained step."""

    name: str
    hit: bool
    recovered: bool
    steps_lost: int
    may_lose: int
    resume_s: float
    epoch: int
    passed: bool


@dataclasses.dataclass(frozen=True)
class Result:
    """The drill's outcome. Digests by group of the last checkpoint."""

    rows: tuple[Row, ...]
    undisturbed: dict[str, str]
    disturbed: dict[str, str]
    attempts: int
    seconds: float

    @property
    def identical(self) -> bool:
        """Whether every group of tensors has the same SHA-256 in both runs."""
        return bool(self.undisturbed) and self.undisturbed == self.disturbed

    @property
    def passed(self) -> bool:
        """All of it."""
        return self.identical and all(row.passed for row in self.rows)


def main(config: Path, runs_dir: Path, as_json: bool, keep: bool) -> int:
    """Run the drill and print its table; 0 if all rows pass and the bits are the same. Blocks for minutes.

    Args:
        config: of a short run that saves by steps and evaluates.
        runs_dir: a folder ``drill-<time>`` is made in it.
        as_json: print one JSON object instead of the table.
        keep: keep the folder also when all went well.
    """
    folder = runs_dir / f"drill-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
    tell = (lambda line: None) if as_json else (lambda line: print(line, flush=True))
    result = drill(config, folder, DISTURBANCES, tell)
    print(json.dumps(dataclasses.asdict(result) | {"passed": result.passed}) if as_json else table(result))
    if result.passed and not keep:
        shutil.rmtree(folder)
    else:
        print(f"the runs are in {folder}", file=sys.stderr)
    return 0 if result.passed else 1


def drill(
    config: Path, folder: Path, disturbances: Sequence[Disturbance], tell: Callable[[str], None] = lambda line: None
) -> Result:
    """Run undisturbed, run disturbed, compare. Both runs stay in ``folder``.

    Raises:
        LatentWireError: the config does not run at all, or a wait took too long.
    """
    load_config(config)  # before anything is made
    started = time.monotonic()
    tell("undisturbed run ...")
    calm = _Program(config, folder, "undisturbed")
    calm.wait_until_done()
    tell("disturbed run ...")
    program = _Program(config, folder, "disturbed")
    try:
        rows = []
        for disturbance in disturbances:
            rows.append(program.disturb(disturbance))
            tell(f"  {rows[-1].name}: {'ok' if rows[-1].passed else 'FAILED'}")
        program.wait_until_done()
    finally:
        program.end()
    return Result(
        rows=tuple(rows),
        undisturbed=final_digests(calm.run),
        disturbed=final_digests(program.run),
        attempts=len(program.run.attempts()),
        seconds=round(time.monotonic() - started, 1),
    )


def final_digests(run: Run) -> dict[str, str]:
    """SHA-256 of each group of tensors in the newest checkpoint, read back from the disk."""
    from latentwire.checkpoint import layout, reader

    paths = [p for p in run.checkpoints.iterdir() if layout.parse_step_name(p.name) is not None]
    manifest = reader.verify(max(paths, key=lambda p: p.name))
    return {group: str(manifest.group_sha256(group)) for group in manifest.groups}


def table(result: Result) -> str:
    """The result for people."""
    lines = [f"{'disturbance':32} {'recovered':9} {'steps lost':>10} {'allowed':>7} {'resumed in':>10}"]
    for row in result.rows:
        recovered = ("yes" if row.recovered else "NO") + ("" if row.hit else " (missed)")
        figures = f"{row.steps_lost:>10} {row.may_lose:>7} {row.resume_s:>8.1f} s"
        lines.append(f"{row.name:32} {recovered:9} {figures}  {'' if row.passed else 'FAILED'}".rstrip())
    lines.append(f"\n{'final SHA-256':16} {'undisturbed':20} {'disturbed':20}")
    for group in sorted(result.undisturbed | result.disturbed):
        ours, theirs = result.undisturbed.get(group, "-"), result.disturbed.get(group, "-")
        lines.append(f"{group:16} {ours[:18]:20} {theirs[:18]:20} {'equal' if ours == theirs else 'DIFFERENT'}")
    verdict = "passed" if result.passed else "FAILED"
    lines.append(f"\ndrill {verdict}: {len(result.rows)} disturbances, {result.attempts} attempts, {result.seconds} s")
    return "\n".join(lines)


class _Program:
    """The orchestrator as a program, and the run that it looks after."""

    def __init__(self, config: Path, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.run = Run((folder / f"{PREFIX}{name}").absolute())
        self._output = folder / f"{name}.log"
        command = [sys.executable, "-m", "latentwire.orchestrate", "--config", str(config), "--runs-dir", str(folder)]
        with open(self._output, "ab") as output:
            self._process = subprocess.Popen(
                [*command, f"name={name}", "scheduler.kind=local"], stdout=output, stderr=output, start_new_session=True
            )

    def end(self) -> None:
        """Leave nothing running, whatever happened."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for attempt in self.run.attempts()[-1:]:
            agent = attempt.agent()
            if agent is not None and attempt.ended() is None:
                agent.send(KILL)

    def wait_until_done(self) -> None:
        """Wait for the orchestrator to end well."""
        try:
            code = self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.end()
            raise LatentWireError(f"{self.run.name} did not finish in {_PATIENCE_S:g} s ({self._output})") from None
        if code != 0:
            raise LatentWireError(f"the {self.run.name} run ended with {code}:\n{self._last_lines()}")

    def disturb(self, disturbance: Disturbance) -> Row:
        """Do it until it hits, wait until the run has trained on, and see what it cost."""
        for _ in range(_TRIES):
            row = self._disturb_once(disturbance)
            if row.hit:
                return row
        return row

    def _disturb_once(self, disturbance: Disturbance) -> Row:
        attempt = self._wait(self._running_attempt, "a running attempt")
        first = len(_events(attempt))
        self._wait(lambda: len(_steps(attempt)) >= disturbance.steps, "training steps")
        if disturbance.begins is not None:
            self._wait(lambda: disturbance.begins in _names(attempt)[first:], disturbance.begins)
        sent = time.time()
        agent = attempt.agent()
        assert agent is not None
        agent.send(disturbance.signum)
        self._wait(lambda: not agent.is_alive(), "the attempt's end")
        if disturbance.corrupt:
            self._flip_a_byte()
        reached = max([_restored(attempt), *(int(r["step"]) for r in _steps(attempt))])
        after = self._wait(self._attempt_that_trains(attempt.number), "the next attempt's first step")
        lost = reached - _restored(after)
        allowed = disturbance.may_lose * int(self._config()["checkpoint"]["interval_steps"])
        hit = _fell_into_window(attempt, disturbance)
        return Row(
            name=disturbance.name,
            hit=hit,
            recovered=True,
            steps_lost=lost,
            may_lose=allowed,
            resume_s=round(float(_steps(after)[0]["time"]) - sent, 2),
            epoch=self._epoch(attempt, reached),
            passed=hit and lost <= allowed and (not disturbance.corrupt or self._has_quarantine()),
        )

    def _running_attempt(self) -> Attempt | None:
        attempts = self.run.attempts()
        return attempts[-1] if attempts and attempts[-1].ended() is None else None

    def _attempt_that_trains(self, after: int) -> Callable[[], Attempt | None]:
        def look() -> Attempt | None:
            return next((a for a in self.run.attempts() if a.number > after and _steps(a)), None)

        return look

    def _wait(self, look: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            found = look()
            if found:
                return found
            if self._process.poll() is not None:
                raise LatentWireError(f"the disturbed run ended while waiting for {what}:\n{self._last_lines()}")
            time.sleep(_POLL_S)
        raise LatentWireError(f"waited {_PATIENCE_S:g} s for {what}:\n{self._last_lines()}")

    def _flip_a_byte(self) -> None:
        newest = max(self.run.checkpoints.glob("step-*"), key=lambda p: p.name)
        with open(newest / "model.safetensors", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([byte ^ 1]))

    def _has_quarantine(self) -> bool:
        return any((self.run.checkpoints / "quarantine").glob("step-*"))

    def _config(self) -> dict[str, Any]:
        return self.run.config().model_dump()

    def _epoch(self, attempt: Attempt, step: int) -> int:
        train = self._config()["train"]
        built = [e for a in self.run.attempts() for e in a.events() if e.get("event") == "workload_built"]
        return int(step * train["micro_batch"] * train["num_micro_batches"] // built[0]["num_samples"])

    def _last_lines(self) -> str:
        status = run_status(self.run)
        lines = self._output.read_text(errors="replace").splitlines()[-15:]
        return "\n".join([*lines, f"state {status.state}, {status.reason or 'no reason'}"])


def _events(attempt: Attempt) -> list[dict[str, Any]]:
    return list(read_journal(attempt.path / "events.rank0.jsonl"))


def _names(attempt: Attempt) -> list[str]:
    return [str(event.get("event")) for event in _events(attempt)]


def _steps(attempt: Attempt) -> list[dict[str, Any]]:
    return [r for r in read_journal(attempt.path / "metrics.jsonl") if "loss" in r]


def _restored(attempt: Attempt) -> int:
    return next((int(e["step"]) for e in _events(attempt) if e.get("event") == "restored"), 0)


def _fell_into_window(attempt: Attempt, disturbance: Disturbance) -> bool:
    """By the run's own clock: the notice came after the window opened and before it closed."""
    if disturbance.begins is None or not disturbance.ends:
        return True
    notices = [e for e in _events(attempt) if e.get("event") == "draining"]
    if not notices:
        return False
    came = float(notices[0]["received"])
    opened, is_open = 0.0, False
    for event in _events(attempt):
        if float(event["time"]) > came:
            break
        if event.get("event") == disturbance.begins:
            opened, is_open = float(event["time"]), True
        elif event.get("event") in disturbance.ends:
            is_open = False
    return is_open and came >= opened
