"""``latentwire submit`` and ``run``: a run without an orchestrator."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from latentwire.cli import DEFAULT_RUNS_DIR
from latentwire.cli.arguments import RunsDirOption
from latentwire.cli.text import one_line

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="a.b=c", help="Values instead of the file's.", show_default=False)
]


def submit(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the sbatch script; change nothing. Needs no Slurm.")
    ] = False,
    runs_dir: RunsDirOption = DEFAULT_RUNS_DIR,
) -> None:
    """Submit one job of a run, with nobody to look after it.

    A preempted Slurm job requeues itself; scheduler.successors go on where it cannot.
    """
    from latentwire.config import load_config
    from latentwire.scheduler.alone import submit_one
    from latentwire.scheduler.parameters import script

    loaded = load_config(config, overrides or [])
    if dry_run:
        print(script(loaded, runs_dir), end="")
        return
    jobs = submit_one(loaded, runs_dir)
    where = "on this machine" if jobs[0].scheduler == "local" else "to Slurm"
    print(one_line(f"submitted {loaded.name} {where} as job {', then '.join(job.job_id for job in jobs)}"))
    print(f"next:\n  latentwire status {loaded.name}\n  latentwire events {loaded.name} --follow")


def run(
    config: ConfigArgument, overrides: OverridesArgument = None, runs_dir: RunsDirOption = DEFAULT_RUNS_DIR
) -> None:
    """Train right here, on this machine or in this allocation, with no second job.

    The last line of a Slurm job: srun latentwire run ... Exits with 75 after a preemption: the same command goes on.
    """
    from latentwire.config import load_config
    from latentwire.preemption.handler import EXIT_CODE
    from latentwire.run.status import run_status
    from latentwire.scheduler.alone import run_here
    from latentwire.scheduler.job import TrainingJob
    from latentwire.scheduler.slurm import own_job_id

    found = run_here(partial(load_config, config, overrides or []), runs_dir)
    outcome = "finished"
    if run_status(found).state != "DONE":
        print(one_line(f"{found.name}: trains here, in {found.path}; look on with: latentwire status"), flush=True)
        outcome = TrainingJob(str(found.path), "local" if own_job_id(os.environ) is None else "slurm")()
    reason = run_status(found).reason
    print(one_line(f"{found.name}: {outcome}" + (f", {reason}" if reason else "")))
    raise typer.Exit({"finished": 0, "preempted": EXIT_CODE}.get(outcome, 1))
