"""``latentwire metrics``: the one curve of a run as JSON lines. ``latentwire track``: the same into a tracker."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from latentwire.cli import DEFAULT_RUNS_DIR
from latentwire.cli.arguments import FollowOption, RunArgument, RunsDirOption, refuse_no_file
from latentwire.cli.following import follow as follow_run
from latentwire.cli.following import follow_until
from latentwire.cli.text import visible


def metrics(
    run: RunArgument,
    follow: FollowOption = False,
    to: Annotated[Path | None, typer.Option("--to", metavar="FILE", help="Write or replace FILE, once whole.")] = None,
    runs_dir: RunsDirOption = DEFAULT_RUNS_DIR,
) -> None:
    """Print the curve of a run over all its attempts, one JSON object a line.

    Each step stands once, with the attempt that did it last; an evaluation follows its step. With --follow a step that
    is redone later is printed again.
    """
    from latentwire.run.curve import Curve, merged_metrics
    from latentwire.run.directory import open_run

    opened = open_run(run, runs_dir)
    if to is not None:
        if follow:
            raise typer.BadParameter("a file that is replaced once whole cannot be followed", param_hint="--to")
        _write(to, merged_metrics(opened))
        print(f"{visible(str(to))} is written")
        return
    curve = Curve(opened)

    def print_new() -> bool:
        records, _ = curve.read()
        sys.stdout.writelines(json.dumps(record) + "\n" for record in records)
        return bool(records)

    if follow:
        follow_run(opened, print_new)
    else:
        while print_new():
            pass


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    from latentwire.run.atomic import replacing

    refuse_no_file(path)
    with replacing(path, fsync=False) as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def track(
    run: RunArgument,
    tracker: Annotated[str, typer.Option("--with", metavar="TRACKER", help="tensorboard, wandb, mlflow, ...")],
    follow: FollowOption = False,
    until_stdin_closes: Annotated[bool, typer.Option(hidden=True)] = False,
    runs_dir: RunsDirOption = DEFAULT_RUNS_DIR,
) -> None:
    """Send the curve of a run to an experiment tracker, each step once; started again it goes on where it was.

    TensorBoard's files are in trackers/tensorboard in the run's directory. Options of other trackers are taken from
    monitor.tracker_options in the run's config.
    """
    if until_stdin_closes:  # the agent's: what Slurm tells the job is none of its business
        os.nice(5)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
    from latentwire.config import refuse_unknown_trackers
    from latentwire.errors import ConfigError
    from latentwire.run.directory import open_run

    opened = open_run(run, runs_dir)
    try:
        refuse_unknown_trackers([tracker])
    except ValueError as error:
        raise ConfigError(str(error)) from None
    from latentwire.integrations.tracking import tracking

    # That of an attempt whose agent was killed may still send the rest: the next one's waits for it.
    waiting = {"give_up": _stdin_has_closed} if until_stdin_closes else {}
    with tracking(opened, tracker, **waiting) as started:
        if until_stdin_closes:
            follow_until(_stdin_has_closed, started.send_new)
        elif follow:
            follow_run(opened, started.send_new)
        else:
            while started.send_new():
                pass
    print(f"{started.num_sent} points of the curve sent to {tracker}")


def _stdin_has_closed() -> bool:
    readable, _, _ = select.select([0], [], [], 0)
    return bool(readable) and not os.read(0, 65536)
