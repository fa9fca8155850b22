"""``latentwire status``: all runs at a glance, or one of them in detail. Light: see ``latentwire.cli.main``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from latentwire.cli import DEFAULT_RUNS_DIR
from latentwire.cli.text import NOTHING, ago, coloured, columns, duration, figure, one_line
from latentwire.run.directory import list_runs, open_run
from latentwire.run.status import run_status

if TYPE_CHECKING:
    from latentwire.run.directory import Attempt, Run
    from latentwire.run.status import RunStatus

SUMMARY = "Show how the runs are doing, or one of them in detail."

_HEADER = (
    "run", "state", "attempt", "preempted", "step", "loss", "samples/s", "ETA", "verified checkpoint", "reason",
)  # fmt: skip
_GREEN, _YELLOW, _RED = "\x1b[32m", "\x1b[33m", "\x1b[31m"
_AS_BEFORE = "\x1b[0m"
_COLOURS = {"RUNNING": _GREEN, "STALLED": _YELLOW, "LOST": _YELLOW, "FAILED": _RED}
_ALIVE = ("RUNNING", "STALLED")


def main(arguments: list[str]) -> None:
    """Parse what follows ``status`` on the command line, and print.

    Raises:
        RunNotFound: there is no such run.
        SystemExit: wrong usage, or help was asked for.
    """
    parser = argparse.ArgumentParser(prog="latentwire status", description=SUMMARY)
    parser.add_argument("run", metavar="RUN", nargs="?", help="a run's name or directory")
    parser.add_argument("--json", action="store_true", help="one JSON object for each run")
    parser.add_argument("--live", action="store_true", help="also ask the scheduler: why a job waits, and until when")
    parser.add_argument("--runs-dir", type=Path, default=DEFAULT_RUNS_DIR, help="the folder of the runs")
    options = parser.parse_args(arguments)
    if options.run is None:
        _show_fleet(options.runs_dir, options.json, options.live)
    else:
        _show_run(open_run(options.run, options.runs_dir), options.json, options.live)


def _show_fleet(runs_dir: Path, json: bool, live: bool) -> None:
    runs = list_runs(runs_dir)
    statuses = [run_status(run) for run in runs]
    jobs = _jobs(runs) if live else {}
    if json:
        print("[" + ",\n ".join(_to_json(each, jobs) for each in statuses) + "]")
    elif not statuses:
        print(one_line(f"no runs in {runs_dir.absolute()}"))
    else:
        _print_fleet(statuses, jobs)


def _show_run(run: Run, json: bool, live: bool) -> None:
    state = run_status(run)
    jobs = _jobs([run]) if live else {}
    if json:
        print(_to_json(state, jobs))
    else:
        _print_run(run, state, jobs)


def _jobs(runs: list[Run]) -> dict[str, str]:
    from latentwire.cli.live import jobs_in_words

    return jobs_in_words(runs)


def _to_json(state: RunStatus, jobs: dict[str, str]) -> str:
    return state.to_json({"job": jobs[state.name]} if jobs else {})


def _print_fleet(statuses: list[RunStatus], jobs: dict[str, str]) -> None:
    now = time.time()
    rows = [list(_HEADER), *(list(_row(each, now)) for each in statuses)]
    if jobs:
        for row, cell in zip(rows, ["job", *(jobs[each.name] for each in statuses)], strict=True):
            row.insert(-1, cell)  # reasons are long and stay last
    header, *lines = columns(rows)
    print(header)
    for line, each in zip(lines, statuses, strict=True):
        colour = _COLOURS.get(each.state) if coloured() else None
        print(f"{colour}{line}{_AS_BEFORE}" if colour else line)


def _row(state: RunStatus, now: float) -> tuple[str, ...]:
    return (
        state.name,
        state.state,
        str(state.attempt),
        str(state.num_preemptions),
        f"{state.step}/{figure(state.total_steps)}",
        figure(state.loss),
        figure(state.samples_per_s),
        duration(state.eta_s),
        ago(state.verified_at, now),
        state.reason or state.warning or state.phase or "",
    )


def _print_run(run: Run, state: RunStatus, jobs: dict[str, str]) -> None:
    now = time.time()
    facts = {
        "run": state.name,
        "state": state.state + (f", {state.phase}" if state.phase else ""),
        "reason": state.reason,
        "job": jobs.get(state.name),
        "step": f"{state.step} of {figure(state.total_steps)}",
        "loss": figure(state.loss),
        "samples/s": figure(state.samples_per_s),
        "ETA": duration(state.eta_s),
        "committed": None if state.committed_step is None else f"step {state.committed_step}",
        "verified": ago(state.verified_at, now),
        "notice": _notice(state),
        "advice": state.advice,
        "preempted": "once" if state.num_preemptions == 1 else f"{state.num_preemptions} times",
        "orchestrator": _orchestrator(run),
        "weights": state.weights_sha256 and f"SHA-256 {state.weights_sha256}",
        "directory": state.path,
    }
    print("\n".join(columns([(key, value) for key, value in facts.items() if value and value != NOTHING])))
    attempts = run.attempts()
    if attempts:
        header = ("attempt", "job", "started", "ran", "outcome", "step", "error")
        running = attempts[-1] if state.state in _ALIVE else None
        rows = [_attempt_row(attempt, attempt == running, now) for attempt in attempts]
        print("\n" + "\n".join(columns([header, *rows])))


def _notice(state: RunStatus) -> str | None:
    if state.warning or state.notice_needs_s is None:
        return state.warning
    return f"needs {figure(state.notice_needs_s)} s of {figure(state.grace_s)} s grace"


def _orchestrator(run: Run) -> str:
    from latentwire.run.lease import Lease

    holder = Lease(run.lease_path).holder()
    return "none" if holder is None else f"pid {holder.pid} on {holder.host}"


def _attempt_row(attempt: Attempt, running: bool, now: float) -> tuple[str, ...]:
    from latentwire.run.budget import verdict_of

    record, ended = attempt.record(), attempt.ended()
    claimed = record.get("claimed")
    until = now if running else (ended or {}).get("time")
    ran = until - claimed if isinstance(claimed, float) and isinstance(until, float) else None
    verdict = verdict_of(attempt)
    cause = f" ({verdict.cause})" if verdict.cause else ""
    return (
        str(attempt.number),
        str(record.get("job_id", NOTHING)),
        ago(claimed if isinstance(claimed, float) else None, now),
        duration(ran),
        "running" if running else f"{verdict.outcome}{cause}",
        NOTHING if running else figure(verdict.step),
        "" if running else (verdict.error or ""),
    )
