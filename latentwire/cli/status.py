"""``latentwire status``: all runs at a glance, or one of them in detail. Light: see ``latentwire.cli.main``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from latentwire.cli import DEFAULT_RUNS_DIR
from latentwire.cli.fleet import ALIVE, COLOURS, STATE_COLUMN, Fleet, Row, percent, table
from latentwire.cli.gpu_use import gpu_use
from latentwire.cli.text import (
    GAP,
    NOTHING,
    ago,
    columns,
    duration,
    figure,
    nothing_in,
    one_line,
    painted,
    sparkline,
    terminal_width,
)
from latentwire.run.directory import open_run
from latentwire.run.seen import SeenRun
from latentwire.run.status import status_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from latentwire.run.directory import Attempt, Run
    from latentwire.run.status import RunStatus

SUMMARY = "Show how the runs are doing, or one of them in detail."


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
    now, fleet = time.time(), Fleet(runs_dir)
    rows = fleet.look(now)
    jobs = _jobs(fleet.runs) if live else {}
    if json:
        print("[" + ",\n ".join(_to_json(row.status, jobs) for row in rows) + "]")
    elif rows:
        _print_fleet([dataclasses.replace(row, job=jobs.get(row.status.name, "")) for row in rows], now)
    elif not fleet.unreadable:
        print(one_line(nothing_in(runs_dir)))
    for trouble in fleet.unreadable:
        print(f"latentwire: {one_line(trouble)}", file=sys.stderr)


def _show_run(run: Run, json: bool, live: bool) -> None:
    seen, now = SeenRun(run), time.time()
    status = status_of(seen, now)
    jobs = _jobs([seen]) if live else {}
    if json:
        print(_to_json(status, jobs))
    else:
        _print_run(seen, status, jobs, now)


def _jobs(runs: Sequence[Run]) -> dict[str, str]:
    from latentwire.cli.live import jobs_in_words

    return jobs_in_words(runs)


def _to_json(state: RunStatus, jobs: dict[str, str]) -> str:
    return state.to_json({"job": jobs[state.name]} if jobs else {})


def _print_fleet(rows: list[Row], now: float) -> None:
    (header, *lines), notes = table(rows, now, terminal_width())
    print(GAP.join(header).rstrip())
    for cells, row in zip(lines, rows, strict=True):
        cells[STATE_COLUMN] = painted(cells[STATE_COLUMN], COLOURS.get(row.status.state, ""))
        print(GAP.join(cells).rstrip())
    if notes:
        print("\n" + "\n".join(notes))


def _print_run(run: SeenRun, state: RunStatus, jobs: Mapping[str, str], now: float) -> None:
    rows = facts(run, state, now)
    if jobs:
        rows.insert(STATE_COLUMN, ("job", jobs[state.name]))
    print("\n".join(columns(rows)))
    attempts = run.attempts()
    if attempts:
        header = ("attempt", "job", "started", "ran", "outcome", "step", "error")
        running = attempts[-1] if state.state in ALIVE else None
        lines = [_attempt_row(attempt, attempt is running, now) for attempt in attempts]
        print("\n" + "\n".join(columns([header, *lines])))


def facts(run: SeenRun, state: RunStatus, now: float) -> list[tuple[str, str]]:
    """A run in detail: what is known of it, each with its name."""
    known = {
        "run": state.name,
        "state": state.state + (f", {state.phase}" if state.phase else ""),
        "reason": state.reason,
        "step": f"{state.step} of {figure(state.total_steps)}",
        "loss": figure(state.loss),
        "samples/s": figure(state.samples_per_s),
        "ETA": duration(state.eta_s),
        "committed": None if state.committed_step is None else f"step {state.committed_step}",
        "verified": ago(state.verified_at, now),
        "notice": _notice(state),
        "advice": state.advice,
        "goodput": percent(state.goodput),
        "GPUs": _gpus(run) if state.state in ALIVE else None,
        "preempted": _times(state.num_preemptions),
        "lost": _times(state.num_lost) if state.num_lost else None,
        "orchestrator": _orchestrator(run, state.state),
        "weights": state.weights_sha256 and f"SHA-256 {state.weights_sha256}",
        "directory": state.path,
    }
    return [(key, value) for key, value in known.items() if value and value != NOTHING]


def _notice(state: RunStatus) -> str | None:
    if state.warning or state.notice_needs_s is None:
        return state.warning
    return f"needs {figure(state.notice_needs_s)} s of {figure(state.grace_s)} s grace"


def _gpus(run: SeenRun) -> str | None:
    use = gpu_use(run.attempts()[-1])
    known = [each for each in use if each is not None]
    return f"{sparkline(use, 0, 100)} {known[-1]:.0f} % busy" if known else None


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _orchestrator(run: Run, state: str) -> str:
    from latentwire.run.goodput import was_submitted
    from latentwire.run.lease import Lease

    holder = Lease(run.lease_path).holder()
    if holder is not None:
        return f"pid {holder.pid} on {holder.host}"
    waits = state in ("PREEMPTED", "LOST", "RETRYING") and was_submitted(run.own_events())
    return "none" + (f": python -m latentwire.orchestrate --resume {run.name}" if waits else "")


def _attempt_row(attempt: Attempt, running: bool, now: float) -> tuple[str, ...]:
    from latentwire.run.budget import verdict_of
    from latentwire.run.journal import time_of
    from latentwire.run.telling import tell_end

    record, ended = attempt.record(), attempt.ended()
    claimed = attempt.claimed()
    last = attempt.last_step()
    until = now if running else time_of(ended or last)  # of one that was lost, its last step's
    ran = until - claimed if claimed and until else None
    verdict = verdict_of(attempt)
    return (
        str(attempt.number),
        str(record.get("job_id", NOTHING)),
        ago(claimed or None, now),
        duration(ran),
        "running" if running else tell_end(verdict.outcome, verdict.cause),
        NOTHING if running else figure(last.get("step") if verdict.step is None else verdict.step),
        "" if running else (verdict.error or ""),
    )
