"""``latentwire drill`` and ``latentwire checklist``: every claim by a command that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentwire.cli import DEFAULT_RUNS_DIR
from latentwire.cli.arguments import RunsDirOption

_DRILL_CONFIG = Path("configs/drill.yaml")

checklist = typer.Typer(name="checklist", help="The claims of CHECKLIST.md.", no_args_is_help=True)


def drill(
    json: Annotated[bool, typer.Option("--json", help="The table as JSON.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the runs also when all went well.")] = False,
    config: Annotated[Path, typer.Option("--config", help="Of a short run that saves and evaluates.")] = _DRILL_CONFIG,
    runs_dir: RunsDirOption = DEFAULT_RUNS_DIR,
) -> None:
    """Preempt a short run in every way and compare the weights.

    Exits with 1 if they are not those of an undisturbed run, bit for bit.
    """
    from latentwire.checklist.drill import main

    raise typer.Exit(main(config=config, runs_dir=runs_dir, as_json=json, keep=keep))


@checklist.callback()
def _family() -> None:
    """Keep `checklist run` two words while it is the only command."""


@checklist.command()
def run(
    only: Annotated[list[str] | None, typer.Option("--only", metavar="ITEM", help="This item; repeatable.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Tick CHECKLIST.md.")] = False,
) -> None:
    """Run the items, all or some, and show which hold."""
    from latentwire.checklist.run import main

    raise typer.Exit(main(only=only or [], write=write))
