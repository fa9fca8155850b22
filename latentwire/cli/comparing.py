"""``latentwire checkpoints diff``: what two checkpoints of a run do not have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentwire.cli import DEFAULT_RUNS_DIR
from latentwire.cli.arguments import RunArgument, RunsDirOption
from latentwire.cli.chosen import chosen, map_tensors
from latentwire.cli.text import columns, figure, one_line

if TYPE_CHECKING:
    from pathlib import Path

    from latentwire.checkpoint.tensor_file import HostTensor

_CHUNK_BYTES = 16 << 20
_LONGEST_LINE = 160
_MOST_VALUES = 40
_StepA = Annotated[int, typer.Argument(metavar="STEP_A", help="Step of the one checkpoint.", min=0, show_default=False)]
_StepB = Annotated[int, typer.Argument(metavar="STEP_B", help="Step of the other.", min=0, show_default=False)]


def diff(run: RunArgument, step_a: _StepA, step_b: _StepB, runs_dir: RunsDirOption = DEFAULT_RUNS_DIR) -> None:
    """Compare two checkpoints: each tensor's bytes, and the values beside them; exit 1 if they differ."""
    from latentwire.run.directory import open_run
    from latentwire.tree import differences

    opened = open_run(run, runs_dir)
    (a,), (b,) = chosen(opened, step_a), chosen(opened, step_b)
    ours, theirs = _tensors(a), _tensors(b)
    summary, lines = [], []
    for group in sorted({*ours, *theirs}):
        row, details = _compare(group, ours.get(group, {}), theirs.get(group, {}))
        summary.append(row)
        lines += details
    values = [("values", *line.split(": ", 1)) for line in differences(_values(a), _values(b))]
    lines += values[:_MOST_VALUES]
    if len(values) > _MOST_VALUES:  # a generator's state alone has hundreds
        lines.append(("values", "...", f"and {len(values) - _MOST_VALUES} more"))
    print("\n".join(columns([("group", "equal", "different", f"only in {step_a}", f"only in {step_b}"), *summary])))
    if lines:
        print("\n" + "\n".join(_cut(line) for line in columns(lines)))
        raise typer.Exit(1)


def _tensors(path: Path) -> dict[str, dict[str, HostTensor]]:
    """Group -> name -> tensor, mapped."""
    from latentwire.checkpoint.reader import read_manifest

    manifest = read_manifest(path)
    return {
        group: {k: t for name in names for k, t in map_tensors(path / name, manifest.files[name].num_bytes).items()}
        for group, names in manifest.groups.items()
    }


def _values(path: Path) -> dict[str, Any]:
    """What stands in state.json, but for names of tensors; lists as mappings, so that their items are compared."""
    from latentwire.checkpoint.reader import read_manifest, read_values

    values = _as_mappings(read_values(path, read_manifest(path)))
    assert isinstance(values, dict)
    return values


def _as_mappings(value: Any) -> Any:
    if isinstance(value, list):
        return {str(index): _as_mappings(item) for index, item in enumerate(value)}
    return {key: _as_mappings(item) for key, item in value.items()} if isinstance(value, dict) else value


def _compare(
    group: str, ours: Mapping[str, HostTensor], theirs: Mapping[str, HostTensor]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    both = sorted(ours.keys() & theirs.keys())
    different = {name: what for name in both if (what := _difference(ours[name], theirs[name])) is not None}
    only_ours, only_theirs = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    counts = (len(both) - len(different), len(different), len(only_ours), len(only_theirs))
    lines: list[tuple[str, ...]] = [(group, name, what) for name, what in different.items()]
    lines += [(group, name, "only in the first") for name in only_ours]
    lines += [(group, name, "only in the second") for name in only_theirs]
    return (group, *map(str, counts)), lines


def _difference(a: HostTensor, b: HostTensor) -> str | None:
    """In words, with the largest absolute difference where both are numbers of one type; None if equal."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{a.dtype} {list(a.shape)} -> {b.dtype} {list(b.shape)}"
    largest, differ = None, False
    for one, other in _chunks(a, b):
        if one == other:
            continue
        differ = True
        distance = _distance(a.dtype, one, other)
        largest = distance if largest is None or distance is None else max(largest, distance)
    return f"{a.dtype} {list(a.shape)}, largest difference {figure(largest)}" if differ else None


def _chunks(a: HostTensor, b: HostTensor) -> Iterator[tuple[memoryview, memoryview]]:
    for start in range(0, a.data.nbytes, _CHUNK_BYTES):
        yield a.data[start : start + _CHUNK_BYTES], b.data[start : start + _CHUNK_BYTES]


def _distance(dtype: str, one: memoryview, other: memoryview) -> float | None:
    """The largest absolute difference, not a number if one holds such; None for a type that numpy lacks."""
    import numpy

    def numbers(data: memoryview) -> Any:
        if dtype == "BF16":  # the upper half of a float32
            return (numpy.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        return numpy.frombuffer(data, f"<{dtype[0].lower()}{int(dtype[1:]) // 8}")

    if dtype == "BOOL" or dtype.startswith("F8"):
        return None
    wide = "complex128" if dtype == "C64" else "float64"
    with numpy.errstate(invalid="ignore"):
        return float(numpy.abs(numbers(one).astype(wide) - numbers(other).astype(wide)).max())


def _cut(line: str) -> str:
    return one_line(line if len(line) <= _LONGEST_LINE else line[: _LONGEST_LINE - 1] + "…")
