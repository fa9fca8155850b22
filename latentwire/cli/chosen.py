"""Which checkpoints a command is about, and a look into them."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

from latentwire.errors import CheckpointCorrupt, CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from latentwire.checkpoint.tensor_file import HostTensor
    from latentwire.run.directory import Run


def committed(run: Run) -> dict[int, Path]:
    """Step -> checkpoint, oldest first."""
    from latentwire.checkpoint.layout import parse_step_name

    names = os.listdir(run.checkpoints) if run.checkpoints.is_dir() else []
    steps = {step: run.checkpoints / name for name in names if (step := parse_step_name(name)) is not None}
    return dict(sorted(steps.items()))


def chosen(run: Run, step: int | None) -> list[Path]:
    """The checkpoint of a step, or all; never none."""
    steps = committed(run)
    if not steps:
        raise CheckpointError(f"{run.name} has no checkpoint yet in {run.checkpoints}")
    if step is None:
        return list(steps.values())
    if step not in steps:
        raise CheckpointError(f"{run.name} has no checkpoint of step {step}; it has: {', '.join(map(str, steps))}")
    return [steps[step]]


def map_tensors(path: Path, num_bytes: int) -> dict[str, HostTensor]:
    """The tensors of a file, mapped: of gigabytes only the header is read."""
    from latentwire.checkpoint.tensor_file import decode_tensors

    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != num_bytes:
                raise CheckpointCorrupt(f"{path} has {found} bytes, was committed with {num_bytes}")
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (FileNotFoundError, ValueError):  # an empty file cannot be mapped
        raise CheckpointCorrupt(f"{path} is missing or empty") from None
    return decode_tensors(data, str(path))
