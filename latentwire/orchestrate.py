"""``python -m latentwire.orchestrate``: configs become runs; runs are submitted until they are done."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from latentwire.config import Config
from latentwire.errors import ConfigError, LatentWireError, SchedulerError
from latentwire.fleet import load_fleet
from latentwire.run.atomic import read_json, write_json
from latentwire.run.directory import Run, create_run, list_runs, open_run, refuse_another_identity, run_of
from latentwire.run.disk import told
from latentwire.run.lease import Lease
from latentwire.run.process import ProcessIdentity
from latentwire.run.resuming import take_back_stops
from latentwire.run.status import run_status
from latentwire.scheduler import slurm
from latentwire.scheduler.orchestrator import Orchestrator, log
from latentwire.scheduler.submission import check_times
from latentwire.target import SCRIPT
from latentwire.tree import differences


@dataclasses.dataclass(frozen=True)
class _Request:
    """What the command line asks for."""

    configs: list[Path]
    overrides: list[str]
    names: list[str]
    resume: bool
    max_running: int | None
    runs_dir: Path


def main(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Overrides a.b=c; with --resume also names of runs.", show_default=False)
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option("--config", help="A config of one run or of a fleet; may be given several times."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the unfinished runs on disk, or with those named.")
    ] = False,
    max_running: Annotated[
        int | None,
        typer.Option(min=1, help="So many of the runs have a job at a time. [default: the config's, or all]"),
    ] = None,
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
        max_running=max_running,
        runs_dir=runs_dir,
    )
    try:
        if dry_run:
            _tell_plan(request)
        elif detach:
            _detach(request)
        else:
            raise SystemExit(_orchestrate(request))
    except (LatentWireError, OSError) as error:
        print(f"latentwire: {told(error)}", file=sys.stderr)
        raise SystemExit(1) from None


def _orchestrate(request: _Request) -> int:
    from latentwire.cli.board import Board

    runs, max_running = _charge(request)
    if not runs:
        print(f"nothing to resume in {request.runs_dir}: no run is unfinished and without an orchestrator")
        return 0
    log_path = _start_log(request.runs_dir)
    with Board(log, log_path) as board:
        orchestrator = Orchestrator(runs, board.show, max_running)
        signals: list[int] = []

        def on_signal(signum: int, frame: FrameType | None) -> None:
            signals.append(signum)
            orchestrator.stop()

        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, on_signal)
        statuses = orchestrator.main()
    if signals:
        _requeue_own_job(signals[0])
    board.epilogue(statuses, max_running, stopped=bool(signals))
    if signals:
        return 128 + signals[0]
    return 0 if all(status.state == "DONE" for status in statuses) else 1


def _requeue_own_job(signum: int) -> None:
    """An orchestrator that is a Slurm job itself, and is preempted, comes back; a plain scancel ends it."""
    job_id = slurm.own_job_id(os.environ)
    if job_id is None or signum != signal.SIGTERM:
        return
    result = slurm.requeue(job_id, slurm.restart_count(os.environ))
    log.info("job %s of the orchestrator: %s", job_id, result.reason)
    if result.done:
        print(f"requeued as job {job_id}", flush=True)
        os._exit(0)  # to return would end the job for good


def _charge(request: _Request) -> tuple[list[Run], int | None]:
    """The runs to look after, and how many of them may have a job at a time.

    A Slurm job that was started again goes on with what it had: its configs may have been edited since, and what a
    person has stopped or given to another orchestrator stays so.
    """
    job_id = slurm.own_job_id(os.environ)
    path = request.runs_dir / f"orchestrator_{job_id}.json"
    before = read_json(path) if job_id is not None and slurm.restart_count(os.environ) else None
    if isinstance(before, dict):
        runs = [run for run in list_runs(request.runs_dir) if run.name in before["runs"]]
        return [run for run in runs if Lease(run.lease_path).holder() is None], before["max_running"]
    configs, max_running = _configs(request)
    runs = _runs(request, configs)
    if job_id is not None and runs:
        write_json(path, {"runs": [run.name for run in runs], "max_running": max_running})
    return runs, max_running


def _runs(request: _Request, configs: list[Config]) -> list[Run]:
    """The runs that are asked for, made where they are new."""
    check_times(configs)
    for config in configs:
        Lease(run_of(config, request.runs_dir).lease_path).refuse_if_held()  # before its config.yaml is written anew
    runs = [create_run(config, request.runs_dir) for config in configs]
    if request.resume:
        runs += [run for run in _resumable(request) if run not in runs]
    for run in runs:
        Lease(run.lease_path).refuse_if_held()
        take_back_stops(run)
    return runs


def _configs(request: _Request) -> tuple[list[Config], int | None]:
    """The configs of the new runs, and how many runs may have a job at a time."""
    if not request.configs and not request.resume:
        raise ConfigError("nothing to do: give --config FILE for a new run, or --resume to go on with unfinished ones")
    if request.names and not request.resume:
        raise ConfigError(
            f"{request.names[0]!r} is neither an override a.b=c nor, without --resume, the name of a run to go on with"
        )
    if request.overrides and not request.configs:
        raise ConfigError("overrides need a --config: --resume alone starts runs with the config that they have")
    fleets = [load_fleet(path, request.overrides) for path in request.configs]
    configs = [config for fleet in fleets for config in fleet.configs]
    names = [config.name for config in configs]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise ConfigError(f"two configs have the name {doubles[0]!r}; give each run a name of its own")
    caps = [fleet.max_running for fleet in fleets if fleet.max_running is not None]
    return configs, request.max_running or min(caps, default=None)


def _resumable(request: _Request) -> list[Run]:
    if request.names:
        runs = [open_run(name, request.runs_dir) for name in request.names]
        for run in runs:
            if run.checked_config().workload.target == SCRIPT:
                raise ConfigError(f"{run.name} is driven by a script of its own: start that script again")
        return runs
    runs = []
    for run in list_runs(request.runs_dir):
        try:
            why_not = _why_not_resumed(run)
        except (LatentWireError, OSError) as error:  # one that is damaged does not keep the others from going on
            why_not = told(error)
        if why_not is None:
            runs.append(run)
        elif why_not:
            print(f"{run.name}: {why_not}")
    return runs


def _why_not_resumed(run: Run) -> str | None:
    """None where it is to go on; an empty word where nobody would expect that."""
    if run_status(run).state in ("DONE", "CANCELLED", "FAILED", "STOPPED"):
        return ""
    if run.checked_config().workload.target == SCRIPT:
        return "driven by a script of its own; start that script again"
    if Lease(run.lease_path).holder() is not None:
        return "another orchestrator looks after it"
    return None


def _tell_plan(request: _Request) -> None:
    configs, _ = _configs(request)
    kinds = check_times(configs)
    for config in configs:
        run = run_of(config, request.runs_dir)
        Lease(run.lease_path).refuse_if_held()
        kind = kinds[config.scheduler.kind]
        print(f"{config.name}: {run.path} {_outlook(run, config)}; scheduler {kind}, {config.train.steps} steps")
    for run in _resumable(request) if request.resume else []:
        status = run_status(run)
        print(f"{run.name}: {status.state} at step {status.step}, would go on")


def _outlook(run: Run, config: Config) -> str:
    if not refuse_another_identity(run, config):
        return "would be made"
    if run_status(run).state == "DONE":
        return "is DONE, nothing would be started"
    changes = differences(run.checked_config().model_dump(mode="json"), config.model_dump(mode="json"))
    return f"exists, would go on with {', '.join(changes)}" if changes else "exists, would go on"


def _detach(request: _Request) -> None:
    """Start the same command in the background and wait until it holds its runs."""
    _configs(request)
    command = [sys.executable, "-m", "latentwire.orchestrate", "--runs-dir", str(request.runs_dir)]
    command += [word for path in request.configs for word in ("--config", str(path))]
    command += [] if request.max_running is None else ["--max-running", str(request.max_running)]
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
    holders = [_holder(run) for run in list_runs(runs_dir)]
    return any(holder is not None and holder.pid == pid for holder in holders)


def _holder(run: Run) -> ProcessIdentity | None:
    try:
        return Lease(run.lease_path).holder()
    except OSError:  # another user's run
        return None


def _start_log(runs_dir: Path) -> Path:
    """runs/orchestrator_<utc>.log: what was done and seen, line by line."""
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    path = runs_dir / f"orchestrator_{stamp}.log"
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.getLogger("stamina").addHandler(handler)
    return path


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
