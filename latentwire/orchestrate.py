"""The orchestrator: ``python -m latentwire.orchestrate``. Configs become runs; runs are submitted until they are done.

It keeps nothing in memory that is not on disk, so it can be killed at any moment and started again with ``--resume``. A
run has one orchestrator (a lease) and one live job: a new one is submitted only when the last is known to be gone.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from latentwire.config import Config, load_config
from latentwire.errors import ConfigError, LatentWireError, RunBusy, SchedulerError
from latentwire.run.atomic import read_json
from latentwire.run.budget import next_move
from latentwire.run.directory import PREFIX, Attempt, Run, create_run, list_runs, open_run
from latentwire.run.journal import Follower, Journal, last_record, time_of
from latentwire.run.lease import Lease
from latentwire.run.status import RunStatus, is_alive, run_status
from latentwire.run.telling import tell
from latentwire.scheduler.queue import live_jobs
from latentwire.scheduler.submission import Job, list_jobs, scheduler_kind, submit

_POLL_S = 0.5
_RENEW_S = 60.0
_SUBMISSION_TAKES_S = 60.0

log = logging.getLogger("latentwire.orchestrate")


class Watched:
    """A run that this orchestrator looks after: its lease, its journal, and what was last seen of it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.lease = Lease(run.lease_path)
        self.lease.acquire()
        self.config = run.config()
        self.journal = Journal(run.orchestrator_events)
        self.done = False
        self._followers: dict[Path, Follower] = {}
        self._skip_what_was_told()

    def submit(self) -> None:
        """Submit the run's next job; the intention is on disk first."""
        self.journal.event("submitting", number=len(list_jobs(self.run)) + 1)
        job = submit(self.run)
        self.journal.event("submitted", job_id=job.job_id, scheduler=job.scheduler, number=job.number)

    def give_up(self, reason: str) -> None:
        """Submit it no more; the reason stays on disk."""
        self.done = True
        self.journal.event("given_up", reason=reason)

    def release(self) -> None:
        """Give the run back."""
        self.journal.close()
        self.lease.release()

    def news(self) -> list[str]:
        """What happened since the last call, in words."""
        self._follow_new_files()
        events = [event for follower in self._followers.values() for event in follower.read()]
        lines = [tell(event) for event in sorted(events, key=time_of)]
        return [line for line in lines if line is not None]

    def _follow_new_files(self) -> None:
        for attempt in self.run.attempts():
            for path in sorted(attempt.path.glob("events.*.jsonl")):
                self._followers.setdefault(path, Follower(path))
        self._followers.setdefault(self.run.orchestrator_events, Follower(self.run.orchestrator_events))

    def _skip_what_was_told(self) -> None:
        self._follow_new_files()
        for follower in self._followers.values():
            follower.read()


class Orchestrator:
    """Looks after runs until each is finished, stopped, or beyond its budget.

    Args:
        runs: their directories; each is leased, or ``RunBusy`` is raised.
        show: called with the statuses after each look, and with the news in words.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        show: Callable[[Sequence[RunStatus]], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._show = show
        self._clock = clock
        self._stop = threading.Event()
        self._next_renewal = clock() + _RENEW_S
        self.watched: list[Watched] = []
        try:
            self.watched.extend(Watched(run) for run in runs)
        except LatentWireError:
            self.release()
            raise

    def stop(self) -> None:
        """Make ``main`` return soon; jobs go on. Safe in a signal handler."""
        self._stop.set()

    def main(self) -> list[RunStatus]:
        """Submit and watch until all runs are done or ``stop``; returns what became of them. Blocks."""
        try:
            while True:
                self._look()
                statuses = [run_status(watched.run) for watched in self.watched]
                self._show(statuses)
                if all(watched.done for watched in self.watched) or self._stop.wait(_POLL_S):
                    return statuses
        finally:
            self.release()

    def release(self) -> None:
        """Give all leases back."""
        for watched in self.watched:
            watched.release()

    def _look(self) -> None:
        open_ones = [watched for watched in self.watched if not watched.done]
        newest = [jobs[-1] for watched in open_ones if (jobs := list_jobs(watched.run))]
        try:
            live = live_jobs(newest)
        except SchedulerError as error:
            log.warning("the scheduler does not answer, waiting: %s", error)
            return
        for watched in open_ones:
            try:
                self._advance(watched, live)
            except LatentWireError as error:
                watched.give_up(str(error))
        for watched in self.watched:
            for line in watched.news():
                log.info("%s: %s", watched.run.name, line)
        if self._clock() > self._next_renewal:
            self._next_renewal = self._clock() + _RENEW_S
            for watched in open_ones:
                watched.lease.renew()

    def _advance(self, watched: Watched, live: set[str]) -> None:
        """One run: wait for its job, or submit the next, or be done with it."""
        run, now = watched.run, self._clock()
        jobs, attempts = list_jobs(run), run.attempts()
        job, attempt = (jobs[-1] if jobs else None), (attempts[-1] if attempts else None)
        running = attempt is not None and attempt.ended() is None and is_alive(attempt, now)
        if running or (job is not None and job.job_id in live) or _is_being_submitted(run, job, now):
            return
        if run.cancel_path.exists():
            watched.done = True
        elif job is not None and (attempt is None or float(attempt.record().get("claimed", 0)) < job.submitted):
            self._after_a_death(watched, job)
        else:
            self._after_an_attempt(watched, attempt)

    def _after_an_attempt(self, watched: Watched, attempt: Attempt | None) -> None:
        move = next_move(watched.run, watched.config.retry)
        if move.again:
            ended_at = float((attempt.ended() or {}).get("time", 0)) if attempt is not None else 0.0
            if self._clock() >= ended_at + move.pause_s:
                watched.submit()
        elif move.reason in ("finished", "interrupted", "cancelled"):
            watched.done = True
        else:
            watched.give_up(move.reason)

    def _after_a_death(self, watched: Watched, job: Job) -> None:
        """The newest job is gone and never made an attempt."""
        last_words = _last_words(watched.run, job)
        watched.journal.event("job_died", job_id=job.job_id, reason=last_words)
        started = {attempt.record().get("job_id") for attempt in watched.run.attempts()}
        since = itertools.takewhile(lambda j: j.job_id not in started, reversed(list_jobs(watched.run)))
        deaths = sum(1 for _ in since)
        if deaths > watched.config.retry.other:
            watched.give_up(f"{deaths} jobs in a row died before they started: {last_words}")
        else:
            watched.submit()


def _is_being_submitted(run: Run, job: Job | None, now: float) -> bool:
    """An orchestrator that was killed may have left a submission under way, whose job is not written down yet."""
    record = last_record(run.orchestrator_events)
    if record is None or record.get("event") != "submitting":
        return False
    known = job.number if job is not None else 0
    return int(record.get("number", 0)) > known and now - float(record["time"]) < _SUBMISSION_TAKES_S


def _last_words(run: Run, job: Job) -> str:
    paths = sorted((run.path / "submitit").glob(f"{job.job_id}/*.err"))
    text = paths[-1].read_text(errors="replace").strip() if paths else ""
    return text.splitlines()[-1][:300] if text else "it left no message"


# --- the command ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Request:
    """What the command line asks for."""

    configs: list[Path]
    overrides: list[str]
    names: list[str]
    resume: bool
    runs_dir: Path


def main(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Overrides a.b=c; with --resume also names of runs.", show_default=False)
    ] = None,
    config: Annotated[
        list[Path] | None, typer.Option("--config", help="A config; may be given several times.", show_default=False)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the unfinished runs on disk, or with those named.")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Go on in the background, writing to the log only.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all and say what would be done; change nothing.")
    ] = False,
    runs_dir: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
) -> None:
    """Submit runs and look after them until they are finished: preempted and failed ones are submitted again.

    Can be killed at any moment; --resume goes on.
    """
    given = arguments or []
    request = _Request(
        configs=config or [],
        overrides=[a for a in given if "=" in a],
        names=[a for a in given if "=" not in a],
        resume=resume,
        runs_dir=runs_dir,
    )
    try:
        if dry_run:
            _tell_plan(request)
        elif detach:
            _detach(request)
        else:
            raise SystemExit(_orchestrate(request))
    except LatentWireError as error:
        print(f"latentwire: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _orchestrate(request: _Request) -> int:
    from latentwire.cli.board import Board

    runs = _runs(request)
    if not runs:
        print(f"nothing to resume in {request.runs_dir}: every run is finished, cancelled or given up")
        return 0
    log_path = _start_log(request.runs_dir)
    with Board(log, log_path) as board:
        orchestrator = Orchestrator(runs, board.show)
        signals: list[int] = []

        def on_signal(signum: int, frame: FrameType | None) -> None:
            signals.append(signum)
            orchestrator.stop()

        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, on_signal)
        statuses = orchestrator.main()
    board.epilogue(statuses, stopped=bool(signals))
    if signals:
        return 128 + signals[0]
    return 0 if all(status.state == "DONE" for status in statuses) else 1


def _runs(request: _Request) -> list[Run]:
    """The runs that are asked for, made where they are new."""
    configs = _configs(request)
    for config in configs:
        scheduler_kind(config.scheduler)
    runs = [create_run(config, request.runs_dir) for config in configs]
    if request.resume:
        runs += [run for run in _resumable(request) if run not in runs]
    for run in runs:
        _take_back_stops(run)
    return runs


def _configs(request: _Request) -> list[Config]:
    if not request.configs and not request.resume:
        raise ConfigError("nothing to do: give --config FILE for a new run, or --resume to go on with unfinished ones")
    if request.names and not request.resume:
        raise ConfigError(
            f"{request.names[0]!r} is neither an override a.b=c nor, without --resume, the name of a run to go on with"
        )
    if request.overrides and not request.configs:
        raise ConfigError("overrides need a --config; a run that exists keeps the config it was started with")
    configs = [load_config(path, request.overrides) for path in request.configs]
    names = [config.name for config in configs]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise ConfigError(f"two configs have the name {doubles[0]!r}; give each run a name of its own")
    return configs


def _resumable(request: _Request) -> list[Run]:
    if request.names:
        return [open_run(name, request.runs_dir) for name in request.names]
    runs = []
    for run in list_runs(request.runs_dir):
        state = run_status(run).state
        if state in ("DONE", "CANCELLED", "FAILED", "STOPPED"):
            continue
        if Lease(run.lease_path).holder() is not None:
            print(f"{run.name}: another orchestrator looks after it")
            continue
        runs.append(run)
    return runs


def _take_back_stops(run: Run) -> None:
    """A person asks for the run: what stopped it before does not count any more."""
    holder = Lease(run.lease_path).holder()
    if holder is not None:
        raise RunBusy(
            f"{run.name} is held by the orchestrator with pid {holder.pid} on {holder.host}; "
            f"look on with: latentwire status, or stop that one first (kill -TERM {holder.pid})"
        )
    status = run_status(run)
    if status.state in ("FAILED", "STOPPED", "CANCELLED"):
        run.cancel_path.unlink(missing_ok=True)
        journal = Journal(run.orchestrator_events)
        journal.event("resumed", after_attempt=status.attempt)
        journal.close()


def _tell_plan(request: _Request) -> None:
    for config in _configs(request):
        path = (request.runs_dir / f"{PREFIX}{config.name}").absolute()
        there = "exists, would go on" if (path / "config.yaml").exists() else "would be made"
        print(
            f"{config.name}: {path} {there}; scheduler {scheduler_kind(config.scheduler)}, {config.train.steps} steps"
        )
    for run in _resumable(request) if request.resume else []:
        status = run_status(run)
        print(f"{run.name}: {status.state} at step {status.step}, would go on")


def _detach(request: _Request) -> None:
    """Start the same command in the background and wait until it holds its runs."""
    _configs(request)
    command = [sys.executable, "-m", "latentwire.orchestrate", "--runs-dir", str(request.runs_dir)]
    command += [word for path in request.configs for word in ("--config", str(path))]
    command += ["--resume"] * request.resume + request.overrides + request.names
    request.runs_dir.mkdir(parents=True, exist_ok=True)
    output = request.runs_dir / "orchestrator_detached.log"
    with open(output, "ab") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, cwd=os.getcwd()
        )
    while process.poll() is None and not _holds_a_run(process.pid, request.runs_dir):
        time.sleep(0.1)
    if process.poll() not in (None, 0):
        raise SchedulerError(f"the orchestrator ended at once; {output} says why")
    print(f"orchestrator in the background, pid {process.pid}; look on with: latentwire status")


def _holds_a_run(pid: int, runs_dir: Path) -> bool:
    records = [read_json(run.lease_path) for run in list_runs(runs_dir)]
    return any(isinstance(r, dict) and r.get("holder", {}).get("pid") == pid for r in records)


def _start_log(runs_dir: Path) -> Path:
    """runs/orchestrator_<utc>.log: what was done and seen, line by line."""
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    path = runs_dir / f"orchestrator_{stamp}.log"
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    return path


if __name__ == "__main__":
    typer.run(main)
