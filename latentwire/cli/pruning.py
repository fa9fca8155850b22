"""``latentwire checkpoints prune``: delete what retention lets go, by hand."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from latentwire.cli import DEFAULT_RUNS_DIR
from latentwire.cli.arguments import RunArgument, RunsDirOption
from latentwire.cli.text import size
from latentwire.errors import RunBusy


def prune(
    run: RunArgument,
    keep: Annotated[int | None, typer.Option("--keep", metavar="N", help="In place of checkpoint.keep.", min=1)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    runs_dir: RunsDirOption = DEFAULT_RUNS_DIR,
) -> None:
    """Delete all checkpoints but the newest verified ones, the best, and those that are not verified yet."""
    from latentwire.checkpoint.folder import CheckpointFolder
    from latentwire.checkpoint.reader import read_manifest
    from latentwire.run.directory import open_run
    from latentwire.run.status import is_running

    opened = open_run(run, runs_dir)
    if is_running(opened, time.time()):
        raise RunBusy(f"{opened.name} is running and prunes by itself; to change how much: checkpoint.keep=N")
    attempts, section = opened.attempts(), opened.config().checkpoint
    folder = CheckpointFolder(
        opened.checkpoints,
        token=opened.newest_number(),
        fence=attempts[-1].assert_newest if attempts else lambda: None,
        event=lambda *_, **__: None,
        keep=keep or section.keep,
        best_metric=section.best_metric,
        best_mode=section.best_mode,
    )
    total = 0
    for path in folder.expendable():
        total += (freed := read_manifest(path).num_bytes)
        print(f"{path.name}: {size(freed)} {'would be' if dry_run else 'is'} deleted")
        if not dry_run:
            folder.delete(path)
    print(f"{size(total)} {'would be' if dry_run else 'were'} freed" if total else "nothing to delete")
