"""``latentwire plan``: what a config would do with these GPUs, or with others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentwire.cli.starting import ConfigArgument, OverridesArgument
from latentwire.cli.text import NOTHING, coloured, columns, figure, visible

if TYPE_CHECKING:
    from latentwire.elastic.candidates import Candidate
    from latentwire.elastic.inventory import Device
    from latentwire.elastic.planner import Weighed

_COLUMNS = (
    "", "GPUs", "layout", "micro-batch", "at once", "checkpointing", "peak per GPU", "samples/s", "why not",
)  # fmt: skip


def plan(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    gpus: Annotated[
        str | None,
        typer.Option(
            "--gpus",
            metavar="4xH100-80GB",
            help="GPUs of a node, instead of this machine's; 2xA100-40GB+2xH100-80GB, H200-MIG-71GB, 0 for none.",
            show_default=False,
        ),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option("--nodes", metavar="N", help="Nodes, instead of scheduler.nodes.", min=1, show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="The plan and all candidates as JSON.")] = False,
) -> None:
    """Show how a config would use GPUs: replicas, micro-batch, memory, expected samples/s, and why.

    Percentages are of all memory; elastic.memory_target says how much may be filled. Where a model lies over several
    GPUs, two micro-batches at once keep more of them busy, for twice the activations.

    Starts nothing and loads no model. Exits with 1 where nothing fits, and says what would.
    """
    from latentwire.config import load_config
    from latentwire.elastic.footprint import footprint_of
    from latentwire.elastic.inventory import Inventory, parse_gpus
    from latentwire.elastic.planner import weigh

    loaded = load_config(config, overrides or [])
    devices = _here() if gpus is None else parse_gpus(gpus)
    num_nodes = nodes or loaded.scheduler.nodes
    weighed = weigh(loaded, Inventory(devices, "", {}), footprint_of(loaded), num_nodes=num_nodes)
    if json:
        _print_json(weighed)
    else:
        _print_table(weighed)
    if weighed.chosen is None:
        weighed.placement()  # raises: why, and the cure
    elif not json:
        print(visible(weighed.why.replace("; ", "\n")))


def _here() -> tuple[Device, ...]:
    from latentwire.monitor.gpu import list_gpus
    from latentwire.train.node import as_devices

    return as_devices(list_gpus())


def _print_json(weighed: Weighed) -> None:
    import dataclasses
    import json

    from latentwire.elastic import words

    tree: dict[str, Any] = {
        "placement": None if weighed.chosen is None else dataclasses.asdict(weighed.placement()),
        "why": weighed.why,
        "candidates": [
            {
                **dataclasses.asdict(each),
                "layout": words.layout(each),
                "fits": each.fits,
                "chosen": each is weighed.chosen,
            }
            for each in weighed.candidates
        ],
    }
    print(json.dumps(tree, indent=1))


def _print_table(weighed: Weighed) -> None:
    lines = columns([_COLUMNS, *(_row(weighed, each) for each in weighed.candidates)])
    for line, each in zip(lines, (None, *weighed.candidates), strict=True):
        is_chosen = each is not None and each is weighed.chosen
        print(f"\x1b[32m{line}\x1b[0m" if is_chosen and coloured() else line)


def _row(weighed: Weighed, each: Candidate) -> list[str]:
    from latentwire.elastic import words

    is_chosen = each is weighed.chosen
    return [
        ">" if is_chosen else "",
        str(each.num_gpus) if weighed.job.gpus else "CPU",
        words.layout(each),
        f"{each.micro_batch} x {each.num_micro_batches}",
        str(each.in_flight),
        "yes" if each.gradient_checkpointing else "no",
        _peaks(weighed, each),
        figure(round(each.samples_per_s, 1) if each.samples_per_s is not None and each.fits else None),
        "" if is_chosen else words.why_not(each, weighed.chosen),
    ]


def _peaks(weighed: Weighed, each: Candidate) -> str:
    """``44.1 GB, 55 %``; of a divided replica each GPU's."""
    if each.peak_bytes is None:
        return NOTHING
    memory = [weighed.job.gpus[gpu].memory_bytes for gpu in each.smallest_gpus]
    shares = [round(100 * peak / all_of_it) for peak, all_of_it in zip(each.peak_bytes, memory, strict=True)]
    peaks = "+".join(f"{peak / 1e9:.1f}" for peak in each.peak_bytes)
    return f"{peaks} GB, {'+'.join(map(str, shares))} %"
