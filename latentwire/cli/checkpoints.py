"""``latentwire checkpoints``: list, verify and inspect what is committed. Nothing here changes a file."""

from __future__ import annotations

import collections
import mmap
import os
import sys
import time
from typing import TYPE_CHECKING

import typer

from latentwire.cli import DEFAULT_RUNS_DIR
from latentwire.cli.arguments import RunArgument, RunsDirOption, StepArgument
from latentwire.cli.text import NOTHING, ago, columns, figure, one_line, size, visible
from latentwire.errors import CheckpointCorrupt, CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from latentwire.checkpoint.layout import HostTensor, Manifest
    from latentwire.run.directory import Run

checkpoints = typer.Typer(
    name="checkpoints", help="List, verify and inspect the checkpoints of a run.", no_args_is_help=True
)


@checkpoints.command("ls")
def list_all(run: RunArgument, runs_dir: RunsDirOption = DEFAULT_RUNS_DIR) -> None:
    """List the checkpoints, oldest first; no tensor is read."""
    from latentwire.checkpoint.layout import QUARANTINE
    from latentwire.run.directory import open_run

    opened = open_run(run, runs_dir)
    now = time.time()
    rows = [_row(path, now) for path in _committed(opened).values()]
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
    for path in _chosen(open_run(run, runs_dir), step):
        started = time.monotonic()
        try:
            manifest = verify_files(path)
        except (CheckpointError, OSError) as error:
            failed = True
            print(f"latentwire: {visible(str(error))}", file=sys.stderr)
        else:
            what = f"{len(manifest.files)} files, {size(_num_bytes(manifest))}"
            print(f"{path.name}: {what}, every byte as committed ({time.monotonic() - started:.2f} s)")
    if failed:
        raise typer.Exit(1)


@checkpoints.command()
def inspect(run: RunArgument, step: StepArgument = None, runs_dir: RunsDirOption = DEFAULT_RUNS_DIR) -> None:
    """Show what the newest checkpoint holds, or that of STEP."""
    from latentwire.checkpoint.layout import STATE
    from latentwire.checkpoint.reader import is_verified, read_manifest
    from latentwire.run.directory import open_run

    path = _chosen(open_run(run, runs_dir), step)[-1]
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


def _committed(run: Run) -> dict[int, Path]:
    """Step -> checkpoint, oldest first."""
    from latentwire.checkpoint.layout import parse_step_name

    names = os.listdir(run.checkpoints) if run.checkpoints.is_dir() else []
    steps = {step: run.checkpoints / name for name in names if (step := parse_step_name(name)) is not None}
    return dict(sorted(steps.items()))


def _chosen(run: Run, step: int | None) -> list[Path]:
    """The checkpoint of a step, or all; never none."""
    committed = _committed(run)
    if not committed:
        raise CheckpointError(f"{run.name} has no checkpoint yet in {run.checkpoints}")
    if step is None:
        return list(committed.values())
    if step not in committed:
        raise CheckpointError(f"{run.name} has no checkpoint of step {step}; it has: {', '.join(map(str, committed))}")
    return [committed[step]]


def _row(path: Path, now: float) -> tuple[str, ...]:
    from latentwire.checkpoint.reader import is_verified, read_manifest

    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return (path.name, "BAD", NOTHING, NOTHING, NOTHING, str(error))
    state = "verified" if is_verified(path) else "committed"
    size_ = size(_num_bytes(manifest))
    return (path.name, state, ago(manifest.created, now), str(manifest.attempt), size_, _metrics(manifest))


def _group_row(path: Path, manifest: Manifest, group: str) -> tuple[str, ...]:
    tensors = [t for name in manifest.groups[group] for t in _tensors(path / name, manifest.files[name].num_bytes)]
    dtypes = collections.Counter(tensor.dtype for tensor in tensors)
    num_bytes = sum(manifest.files[name].num_bytes for name in manifest.groups[group])
    counted = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    return (group, str(len(tensors)), counted, size(num_bytes), manifest.group_sha256(group) or NOTHING)


def _tensors(path: Path, num_bytes: int) -> list[HostTensor]:
    """The tensors of a file, mapped: of gigabytes only the header is read."""
    from latentwire.checkpoint.layout import decode_tensors

    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != num_bytes:
                raise CheckpointCorrupt(f"{path} has {found} bytes, was committed with {num_bytes}")
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (FileNotFoundError, ValueError):  # an empty file cannot be mapped
        raise CheckpointCorrupt(f"{path} is missing or empty") from None
    return list(decode_tensors(data, str(path)).values())


def _metrics(manifest: Manifest) -> str:
    return " ".join(f"{name}={figure(value)}" for name, value in manifest.metrics.items()) or NOTHING


def _num_bytes(manifest: Manifest) -> int:
    return sum(record.num_bytes for record in manifest.files.values())
