"""``latentwire dashboard`` and ``report``: runs in a browser, live or on one page that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentwire.cli import DEFAULT_RUNS_DIR
from latentwire.cli.arguments import RunArgument, RunsDirOption, refuse_no_file
from latentwire.cli.text import one_line


def dashboard(
    host: Annotated[str, typer.Option("--host", help="Where to listen; beyond this machine a token is needed.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", help="0: any that is free.", min=0, max=65535)] = 8050,
    runs_dir: RunsDirOption = DEFAULT_RUNS_DIR,
    allow_actions: Annotated[
        bool, typer.Option("--allow-actions", help="Offer to save, preempt and cancel, to who has the token.")
    ] = False,
) -> None:
    """Show the runs live in a browser, read-only.

    With LATENTWIRE_DASHBOARD_TOKEN set, whoever looks needs that token.
    """
    from latentwire.dashboard import serve

    serve(runs_dir, host, port, allow_actions)


def report(
    run: RunArgument,
    to: Annotated[Path | None, typer.Option("--to", metavar="FILE", help="[default: report.html in the run]")] = None,
    runs_dir: RunsDirOption = DEFAULT_RUNS_DIR,
) -> None:
    """Write what the dashboard shows of a run as one HTML file that needs no network."""
    from latentwire.run.directory import open_run
    from latentwire.views.report import REPORT, write_report

    opened = open_run(run, runs_dir)
    path = opened.path / REPORT if to is None else to
    refuse_no_file(path)
    write_report(opened, path)
    print(one_line(str(path)))
