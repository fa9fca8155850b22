"""``latentwire checkpoints export``: a checkpoint's weights as a folder that other programs read."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentwire.cli import DEFAULT_RUNS_DIR
from latentwire.cli.arguments import RunArgument, RunsDirOption, StepArgument
from latentwire.cli.chosen import chosen
from latentwire.cli.text import one_line, size, visible
from latentwire.errors import CheckpointError

if TYPE_CHECKING:
    from latentwire.checkpoint.reader import Loaded
    from latentwire.checkpoint.tensor_file import HostTensor

_EMA_PREFIX = "module."
"""torch's AveragedModel puts it before the names of the model that it averages."""


def export(
    run: RunArgument,
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="Where to; must not exist.", show_default=False)],
    step: StepArgument = None,
    ema: Annotated[bool, typer.Option("--ema", help="The moving average of the weights, not the last ones.")] = False,
    runs_dir: RunsDirOption = DEFAULT_RUNS_DIR,
) -> None:
    """Write the weights of the newest checkpoint, or that of STEP, as model.safetensors; every byte is verified.

    A workload that describes its models adds config.json, as the Hugging Face hub has it, where it can be imported.
    """
    from latentwire.checkpoint import reader, tensor_file
    from latentwire.run.directory import open_run

    opened = open_run(run, runs_dir)
    loaded = reader.load(chosen(opened, step)[-1])
    weights = _weights(loaded, ema)
    config = opened.config()
    describe = _describer(config.workload.target)
    if to.exists():
        raise CheckpointError(f"{to} exists: name a folder that does not")
    aside = to.with_name(f".{to.name}.export-{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        with open(aside / "model.safetensors", "xb") as file:
            file.writelines(tensor_file.encode_tensors(weights))
        if describe is not None:
            described = describe(config.workload.options, {name: tensor.shape for name, tensor in weights.items()})
            origin = {"run": opened.name, "step": loaded.manifest.step, "ema": ema, **loaded.manifest.identity}
            text = json.dumps({**described, "latentwire": origin}, indent=2) + "\n"
            (aside / "config.json").write_text(text, encoding="utf-8")
        os.rename(aside, to)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    total = sum(tensor.data.nbytes for tensor in weights.values())
    print(one_line(f"{loaded.path.name}: {len(weights)} tensors, {size(total)}, verified and written to {to}"))


def _describer(target: str) -> Callable[..., Any] | None:
    """The workload's ``export_config``, if it has one and can be imported from here."""
    from latentwire.target import export_config

    try:
        return export_config(target)
    except Exception as error:  # somebody else's module: whatever it raises, the weights can be written
        print(f"latentwire: config.json is left out, which the workload writes: {visible(str(error))}", file=sys.stderr)
        return None


def _weights(loaded: Loaded, ema: bool) -> dict[str, HostTensor]:
    group = "ema" if ema else "model"
    if group not in loaded.tensors:
        raise CheckpointError(f"{loaded.path} has no {group!r}; it has: {', '.join(sorted(loaded.tensors))}")
    tensors = loaded.tensors[group]
    if not ema:
        return dict(tensors)
    prefix = _EMA_PREFIX
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
