"""The drill: a run under preemptions must end with the bits of the same run undisturbed.

It does what a user and a scheduler do: starts the orchestrator as a program, watches the run's files, and disturbs the
job. Whether a disturbance fell where it was meant to is judged by the run's own journal, and tried again if not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from latentwire.checklist.disturb import DISTURBANCES, Disturbance, Local, Place
from latentwire.checklist.result import Result, Row, final_digests, other_hardware, table
from latentwire.config import load_config
from latentwire.errors import LatentWireError
from latentwire.run.directory import PREFIX, Attempt, Run, is_step
from latentwire.run.journal import read_journal
from latentwire.run.status import run_status

_ENDS_WITHIN_S = 600.0
_SUBMISSION_TAKES_S = 60.0
_TRIES = 4
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(
    config: Path,
    runs_dir: Path,
    as_json: bool,
    keep: bool,
    overrides: Sequence[str] = (),
    place: Place | None = None,
    disturbances: Sequence[Disturbance] = DISTURBANCES,
) -> int:
    """Run the drill and print its table; 0 if all rows pass and the bits are the same. Blocks for minutes. Main thread.

    Args:
        config: of a short run that saves by steps and evaluates.
        runs_dir: a folder ``drill-<time>`` is made in it.
        as_json: print one JSON object instead of the table.
        keep: keep the folder also when all went well.
        overrides: ``a.b=c`` over the config.
        place: where the runs are; None: on this machine.
        disturbances: what is done, in this order.
    """
    folder = runs_dir / f"drill-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
    tell = (lambda line: None) if as_json else (lambda line: print(line, flush=True))
    passed = False
    try:
        with _interrupts_end_it():
            result = drill(config, folder, disturbances, tell, overrides, place or Local())
        print(json.dumps(dataclasses.asdict(result) | {"passed": result.passed}) if as_json else table(result))
        passed = result.passed
    finally:
        if passed and not keep:
            shutil.rmtree(folder)
        elif folder.exists():
            print(f"the runs are in {folder}", file=sys.stderr)
    return 0 if passed else 1


def drill(
    config: Path,
    folder: Path,
    disturbances: Sequence[Disturbance],
    tell: Callable[[str], None] = lambda line: None,
    overrides: Sequence[str] = (),
    place: Place | None = None,
) -> Result:
    """Run undisturbed, run disturbed, compare. Both runs stay in ``folder``; no job of theirs does.

    Raises:
        LatentWireError: the config does not run at all, or a wait took too long.
    """
    place = place or Local()
    overrides = (*place.overrides, *overrides)
    load_config(config, overrides)  # before anything is made
    started = time.monotonic()
    tell(place.outlook(disturbances))
    with contextlib.ExitStack() as stack:
        calm = stack.enter_context(contextlib.closing(_Program(config, folder, "undisturbed", overrides, place)))
        tell(f"undisturbed run ... (look on with: latentwire status --runs-dir {folder})")
        if not place.side_by_side:
            calm.wait_until_done()
        program = stack.enter_context(contextlib.closing(_Program(config, folder, "disturbed", overrides, place)))
        tell("disturbed run ...")
        rows = []
        for disturbance in disturbances:
            rows.append(program.disturb(disturbance))
            tell(f"  {rows[-1].name}: {'ok' if rows[-1].passed else 'FAILED'}")
        program.wait_until_done()
        calm.wait_until_done()
    return Result(
        rows=tuple(rows),
        undisturbed=final_digests(calm.run),
        disturbed=final_digests(program.run),
        undisturbed_attempts=len(calm.run.attempts()),
        attempts=len(program.run.attempts()),
        other_hardware=other_hardware(calm.run, program.run),
        seconds=round(time.monotonic() - started, 1),
    )


@contextlib.contextmanager
def _interrupts_end_it() -> Iterator[None]:
    """An interrupt leaves through every clean-up on the way, and no second one cuts those short."""

    def leave(signum: int, frame: FrameType | None) -> None:
        for each in _INTERRUPTS:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + signum)

    before = {each: signal.getsignal(each) for each in _INTERRUPTS}
    for each, handler in before.items():
        if handler is not signal.SIG_IGN:  # as under nohup
            signal.signal(each, leave)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class _Program:
    """The orchestrator as a program, and the run that it looks after."""

    def __init__(self, config: Path, folder: Path, name: str, overrides: Sequence[str], place: Place) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.run = Run((folder / f"{PREFIX}{name}").absolute())
        self._place = place
        self._output = folder / f"{name}.log"
        command = [sys.executable, "-m", "latentwire.orchestrate", "--config", str(config), "--runs-dir", str(folder)]
        with open(self._output, "ab") as output:
            self._process = subprocess.Popen(
                [*command, *overrides, f"name={name}"], stdout=output, stderr=output, start_new_session=True
            )

    def close(self) -> None:
        """Leave nothing running, whatever happened."""
        if self._process.poll() is None:
            if self.run.path.exists():  # a job that has not begun yet is not to begin any more
                self.run.mark_cancelled(by="the drill, which was interrupted")
            self._process.terminate()
            self._process.send_signal(signal.SIGCONT)
            try:
                self._process.wait(_SUBMISSION_TAKES_S)  # it writes the job down that it is submitting
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._place.end(self.run)

    def wait_until_done(self) -> None:
        """Wait for the orchestrator to end well."""
        try:
            code = self._process.wait(self._place.patience_s)
        except subprocess.TimeoutExpired:
            raise LatentWireError(
                f"the {self.run.name} run did not finish in {self._place.patience_s:g} s:\n{self._last_lines()}"
            ) from None
        if code != 0:
            raise LatentWireError(f"the {self.run.name} run ended with {code}:\n{self._last_lines()}")

    def disturb(self, disturbance: Disturbance) -> Row:
        """Do it until it hits, wait until the run has trained on, and see what it cost."""
        number, hit = 0, False
        for _ in range(_TRIES):
            attempt, sent = self._disturb_an_attempt(disturbance, after=number)
            number, hit = attempt.number, _fell_into_window(attempt, disturbance)
            if hit:
                break
        after = self._wait(self._attempt_that_trains(number), "the next attempt's first step")
        # only now: Slurm calls a job over while its last step is still being saved
        reached = max([_restored(attempt), *(int(r["step"]) for r in _steps(attempt))])
        lost = reached - _restored(after)
        allowed = disturbance.may_lose * int(self._config()["checkpoint"]["interval_steps"])
        return Row(
            name=disturbance.name,
            hit=hit,
            recovered=True,
            steps_lost=lost,
            may_lose=allowed,
            resume_s=round(float(_steps(after)[0]["time"]) - sent, 2),
            epoch=self._epoch(attempt, reached),
            jobs=_jobs(attempt, after),
            passed=hit and lost <= allowed and (not disturbance.corrupt or self._has_quarantine()),
        )

    def _disturb_an_attempt(self, disturbance: Disturbance, after: int) -> tuple[Attempt, float]:
        """Wait for its moment in an attempt later than ``after``, do it, wait for the end; which attempt, and when."""
        attempt = self._wait(lambda: self._running_attempt(after), "a running attempt")
        first = len(_events(attempt))
        self._wait(lambda: len(_steps(attempt)) >= disturbance.steps, "training steps")
        if disturbance.begins is not None:
            self._wait(lambda: disturbance.begins in _names(attempt)[first:], disturbance.begins)
        sent = time.time()
        with self._held_back() if disturbance.corrupt else contextlib.nullcontext():
            with self._place.disturbing(disturbance.deed, attempt):
                self._wait(lambda: self._place.is_over(attempt), "the attempt's end", _ENDS_WITHIN_S)
            if disturbance.corrupt:
                self._flip_a_byte()
        return attempt, sent

    def _running_attempt(self, after: int) -> Attempt | None:
        attempts = self.run.attempts()
        runs = bool(attempts) and attempts[-1].number > after and attempts[-1].ended() is None
        return attempts[-1] if runs else None

    def _attempt_that_trains(self, after: int) -> Callable[[], Attempt | None]:
        def look() -> Attempt | None:
            return next((a for a in self.run.attempts() if a.number > after and _steps(a)), None)

        return look

    def _wait(self, look: Callable[[], Any], what: str, patience_s: float | None = None) -> Any:
        patience_s = self._place.patience_s if patience_s is None else patience_s
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            found = look()
            if found:
                return found
            if self._process.poll() is not None:
                raise LatentWireError(self._why_it_ended(what))
            time.sleep(self._place.poll_s)
        raise LatentWireError(f"waited {patience_s:g} s for {what}:\n{self._last_lines()}")

    @contextlib.contextmanager
    def _held_back(self) -> Iterator[None]:
        """The orchestrator stands still: it submits nothing that would load the newest checkpoint too early."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

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
        num_samples = built[0]["num_samples"]
        return int(step * train["global_batch"] // num_samples) if num_samples else 0  # a stream: one long epoch

    def _why_it_ended(self, waiting_for: str) -> str:
        if run_status(self.run).state == "DONE":
            steps = self._config()["train"]["steps"]
            return (
                f"the run was done before all disturbances were, while waiting for {waiting_for}: "
                f"give it more steps, such as train.steps={2 * steps}"
            )
        return f"the disturbed run ended while waiting for {waiting_for}:\n{self._last_lines()}"

    def _last_lines(self) -> str:
        status = run_status(self.run)
        lines = self._output.read_text(errors="replace").splitlines()[-15:]
        return "\n".join([*lines, f"state {status.state}, {status.reason or 'no reason'} ({self._output})"])


def _events(attempt: Attempt) -> list[dict[str, Any]]:
    return list(read_journal(attempt.path / "events.rank0.jsonl"))


def _names(attempt: Attempt) -> list[str]:
    return [str(event.get("event")) for event in _events(attempt)]


def _steps(attempt: Attempt) -> list[dict[str, Any]]:
    return list(filter(is_step, read_journal(attempt.metrics_path)))


def _restored(attempt: Attempt) -> int:
    return next((int(e["step"]) for e in _events(attempt) if e.get("event") == "restored"), 0)


def _jobs(attempt: Attempt, after: Attempt) -> str:
    """Whether Slurm's job came back, or another was submitted; a local job has no name that says anything."""
    before, now = attempt.record(), after.record()
    if before.get("scheduler") != "slurm":
        return ""
    same = before.get("job_id") == now.get("job_id")
    return f"{before.get('job_id')} requeued" if same else f"{before.get('job_id')}, then {now.get('job_id')}"


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
