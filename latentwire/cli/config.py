"""``latentwire config``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentwire.cli import DEFAULT_RUNS_DIR
from latentwire.cli.arguments import RunsDirOption
from latentwire.cli.text import visible

if TYPE_CHECKING:
    from latentwire.config import Config

config = typer.Typer(name="config", help="Look at configs.", no_args_is_help=True)


@config.callback()
def _family() -> None:
    """Keep `config show` two words while it is the only command."""


@config.command()
def show(
    source: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or a run's name.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="a.b=c", help="Values instead of the file's.", show_default=False)
    ] = None,
    runs_dir: RunsDirOption = DEFAULT_RUNS_DIR,
) -> None:
    """Print a config with its bases, overrides and every default, as YAML."""
    print(visible(_resolve(source, overrides or [], runs_dir).to_yaml()), end="")


def _resolve(source: str, overrides: list[str], runs_dir: Path) -> Config:
    from latentwire.config import load_config
    from latentwire.errors import ConfigError, RunNotFound
    from latentwire.run.directory import open_run

    if Path(source).is_file() or source.endswith((".yaml", ".yml")):
        return load_config(source, overrides)
    try:
        run = open_run(source, runs_dir)
    except RunNotFound as error:
        raise RunNotFound(f"{error}; nor is there a file {source!r}") from None
    if overrides:
        raise ConfigError(f"{run.name} is a run: its config is fixed; overrides go with a YAML file")
    return run.config()
