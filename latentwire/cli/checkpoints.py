"""``latentwire checkpoints``: list, verify and inspect what is committed, and the commands that do more with it."""

from __future__ import annotations

import collections
import os
import sys
import time
from typing import TYPE_CHECKING

import typer

from latentwire.cli import DEFAULT_RUNS_DIR
from latentwire.cli.arguments import RunArgument, RunsDirOption, StepArgument
from latentwire.cli.chosen import chosen, committed, map_tensors
from latentwire.cli.comparing import diff
from latentwire.cli.exporting import export
from latentwire.cli.pruning import prune
from latentwire.cli.text import NOTHING, ago, columns, figure, one_line, size, visible
from latentwire.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from latentwire.checkpoint.layout import Manifest

checkpoints = typer.Typer(
    name="checkpoints", help="List, verify, compare, export and prune the checkpoints of a run.", no_args_is_help=True
)
checkpoints.command()(diff)
checkpoints.command()(export)
checkpoints.command()(prune)


@checkpoints.command("ls")
def list_all(run: RunArgument, runs_dir: RunsDirOption = DEFAULT_RUNS_DIR) -> None:
    """List the checkpoints, oldest first; no tensor is read."""
    from latentwire.checkpoint.layout import QUARANTINE
    from latentwire.run.directory import open_run

    opened = open_run(run, runs_dir)
    now = time.time()
    rows = [_row(path, now) for path in committed(opened).values()]
    header = ("checkpoint", "state", "made", "attempt", "size", "metrics")
    print("\n".join(columns([header, *rows])) if rows else f"{one_line(opened.name)} has no checkpoint yet")
    quarantine = opened.checkpoints / QUARANTINE
    for name in sorted(os.listdir(quarantine)) if quarantine.is_dir() else []:
        print(one_line(f"quarantined, never used again: {quarantine / name}"))


@checkpoints.command()
def verify(run: RunArgument, step: StepArgument = None, runs_dir: RunsDirOption = DEFAULT_RUNS_DIR) -> None:
    """Compare every byte with the SHA-256s; exit 1 on a difference.

    All checkpoints, or that of STEP; no file is changed.
    """
    from latentwire.checkpoint.reader import verify as verify_files
    from latentwire.run.directory import open_run

    failed = False
    for path in chosen(open_run(run, runs_dir), step):
        started = time.monotonic()
        try:
            manifest = verify_files(path)
        except (CheckpointError, OSError) as error:
            failed = True
            print(f"latentwire: {visible(str(error))}", file=sys.stderr)
        else:
            what = f"{len(manifest.files)} files, {size(manifest.num_bytes)}"
            print(f"{path.name}: {what}, every byte as committed ({time.monotonic() - started:.2f} s)")
    if failed:
        raise typer.Exit(1)


@checkpoints.command()
def inspect(run: RunArgument, step: StepArgument = None, runs_dir: RunsDirOption = DEFAULT_RUNS_DIR) -> None:
    """Show what the newest checkpoint holds, or that of STEP."""
    from latentwire.checkpoint.layout import STATE
    from latentwire.checkpoint.reader import is_verified, read_manifest
    from latentwire.run.directory import open_run

    path = chosen(open_run(run, runs_dir), step)[-1]
    manifest = read_manifest(path)
    facts = [
        ("step", str(manifest.step)),
        ("attempt", str(manifest.attempt)),
        ("made", f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(manifest.created))} by {manifest.version}"),
        ("state", "verified" if is_verified(path) else "committed, not verified yet"),
        ("metrics", _metrics(manifest)),
        *((f"identity.{key}", str(value)) for key, value in manifest.identity.items()),
        ("directory", str(path)),
    ]
    print("\n".join(columns(facts)))
    rows = [_group_row(path, manifest, group) for group in manifest.groups]
    rows.append((STATE, "", "", size(manifest.files[STATE].num_bytes), manifest.files[STATE].sha256))
    print("\n" + "\n".join(columns([("group", "tensors", "dtypes", "size", "sha256"), *rows])))


def _row(path: Path, now: float) -> tuple[str, ...]:
    from latentwire.checkpoint.reader import is_verified, read_manifest

    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return (path.name, "BAD", NOTHING, NOTHING, NOTHING, str(error))
    state = "verified" if is_verified(path) else "committed"
    size_ = size(manifest.num_bytes)
    return (path.name, state, ago(manifest.created, now), str(manifest.attempt), size_, _metrics(manifest))


def _group_row(path: Path, manifest: Manifest, group: str) -> tuple[str, ...]:
    tensors = [
        t for name in manifest.groups[group] for t in map_tensors(path / name, manifest.files[name].num_bytes).values()
    ]
    dtypes = collections.Counter(tensor.dtype for tensor in tensors)
    total = sum(manifest.files[name].num_bytes for name in manifest.groups[group])
    counted = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    return (group, str(len(tensors)), counted, size(total), manifest.group_sha256(group) or NOTHING)


def _metrics(manifest: Manifest) -> str:
    return " ".join(f"{name}={figure(value)}" for name, value in manifest.metrics.items()) or NOTHING
