"""The typer app: every command by its name. What a command needs beyond typer is imported inside it."""

from __future__ import annotations

from typing import Annotated

import typer

from latentwire import __version__
from latentwire.cli import status
from latentwire.cli.checkpoints import checkpoints
from latentwire.cli.checks import checklist, drill
from latentwire.cli.config import config
from latentwire.cli.control import cancel, preempt
from latentwire.cli.dashboard import dashboard, report
from latentwire.cli.diagnosis import diagnose
from latentwire.cli.events import events
from latentwire.cli.goodput import goodput
from latentwire.cli.logs import logs
from latentwire.cli.metrics import metrics, track
from latentwire.cli.plan import plan
from latentwire.cli.simulate import simulate
from latentwire.cli.starting import run, submit
from latentwire.cli.timeline import timeline
from latentwire.cli.watch import watch

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"latentwire {__version__}")
        raise typer.Exit


@app.callback()
def latentwire(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Training runs that survive preemption: look at them, steer them, check them.

    Runs are started, and looked after, with: python -m latentwire.orchestrate
    """


@app.command("status", help=status.SUMMARY)
def _listed_here_run_by_main() -> None:
    status.main([])


app.command()(watch)
app.command()(timeline)
app.command()(run)
app.command()(submit)
app.command()(plan)
app.command()(logs)
app.command()(events)
app.command()(metrics)
app.command()(track)
app.command()(goodput)
app.command()(simulate)
app.command()(diagnose)
app.command()(report)
app.command()(dashboard)
app.command()(preempt)
app.command()(cancel)
app.add_typer(config)
app.add_typer(checkpoints)
app.command()(drill)
app.add_typer(checklist)
