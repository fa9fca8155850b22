"""``latentwire drill`` and ``latentwire checklist``: every claim by a command that runs."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from latentwire.cli import DEFAULT_RUNS_DIR
from latentwire.errors import ConfigError


class Cluster(str, enum.Enum):
    """Where the drill's runs are."""

    LOCAL = "local"
    SLURM = "slurm"


_CONFIGS = {Cluster.LOCAL: Path("configs/drill.yaml"), Cluster.SLURM: Path("configs/drill_slurm.yaml")}

checklist = typer.Typer(name="checklist", help="The claims of CHECKLIST.md.", no_args_is_help=True)


def drill(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="A.B=C", help="Overrides of the config: scheduler.account=...", show_default=False),
    ] = None,
    cluster: Annotated[
        Cluster, typer.Option("--cluster", help="slurm: the runs are jobs, disturbed through scancel and sbatch.")
    ] = Cluster.LOCAL,
    partition: Annotated[
        str | None, typer.Option("--partition", metavar="P", help="Of the jobs: scheduler.partition.")
    ] = None,
    preempting_partition: Annotated[
        str | None,
        typer.Option(
            "--preempting-partition",
            metavar="Q",
            help="Make a real preemption too: a short job of partition Q, which preempts P, takes the run's node. The "
            "run keeps other users' jobs off that node; other jobs of yours there are preempted as well.",
        ),
    ] = None,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Under Slurm: also what takes longer, and windows that a signal may miss."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="The table as JSON.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the runs also when all went well.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help=f"Of a short run that saves and evaluates. By default {_CONFIGS[Cluster.LOCAL]}, under Slurm "
            f"{_CONFIGS[Cluster.SLURM]}, which want a GPU there: scheduler.gpus=0 for none.",
            show_default=False,
        ),
    ] = None,
    runs_dir: Annotated[
        Path, typer.Option("--runs-dir", help="The folder of the runs; under Slurm on a file system that nodes share.")
    ] = DEFAULT_RUNS_DIR,
) -> None:
    """Preempt a short run in every way and compare the weights.

    Exits with 1 if they are not those of an undisturbed run, bit for bit. An interrupt leaves no job behind.
    """
    from latentwire.checklist import disturb
    from latentwire.checklist.drill import main
    from latentwire.config import load_config

    config = config or _CONFIGS[cluster]
    changes = list(overrides or [])
    place: disturb.Place = disturb.Local()
    disturbances = disturb.DISTURBANCES
    if cluster is Cluster.SLURM:
        named = [f"scheduler.partition={partition}"] if partition is not None else []
        changes = ["scheduler.kind=slurm", *named, *changes]
        place = slurm = disturb.Slurm(load_config(config, changes).scheduler, preempting_partition)
        disturbances = slurm.disturbances(everything)
    elif partition is not None or preempting_partition is not None:
        raise ConfigError("a partition is one of Slurm's: add --cluster slurm")
    raise typer.Exit(main(config, runs_dir, json, keep, changes, place, disturbances))


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
