"""What the tests of checkpoints share: states whose content follows from their step, managers, checks of a folder."""

from __future__ import annotations

import array
import dataclasses
import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from latentwire.checkpoint import layout, reader
from latentwire.checkpoint.layout import FileRecord, Snapshot
from latentwire.checkpoint.manager import CheckpointManager
from latentwire.checkpoint.reader import Loaded
from latentwire.checkpoint.tensor_file import HostTensor

KEEP = 2
METRIC = "eval/loss"
BEST_STEP = 2
IDENTITY = {"config": "c" * 64, "frozen": {"llama": "f" * 64}}


class Events(list[dict[str, Any]]):
    """An ``event`` callable that keeps what it was told."""

    def __call__(self, name: str, **fields: Any) -> None:
        self.append({"event": name, **fields})

    def named(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self if event["event"] == name]


def tensor(code: str, values: list[float] | list[int]) -> HostTensor:
    """A one-dimensional tensor; ``code`` is ``f`` (F32) or ``q`` (I64)."""
    data = memoryview(array.array(code, values)).cast("B")
    return HostTensor({"f": "F32", "q": "I64"}[code], (len(values),), data)


def metric_of(step: int) -> float:
    """The best is that of step ``BEST_STEP``."""
    return 0.25 if step == BEST_STEP else 1.0 + step / 100


def snapshot(step: int, num_items: int = 24) -> Snapshot:
    """A state that follows from its step: weights in two files, an optimizer, values."""
    weights = [step + i / 8 for i in range(num_items)]
    model = {"head.weight": tensor("f", weights), "body.weight": tensor("f", weights[::-1])}
    optimizer = {"0.exp_avg": tensor("f", [-w for w in weights]), "0.step": tensor("q", [step])}
    values = {"step": step, "cursor": {"epoch": step // 3, "index": step}, "rng": [step, "π", None, 1.5]}
    return Snapshot(step, {"model": model, "optimizer": optimizer}, values, {METRIC: metric_of(step)})


def half_changed(step: int) -> Snapshot:
    """The weights of step 1, all else of this step."""
    whole = snapshot(step)
    return dataclasses.replace(whole, tensors={**whole.tensors, "model": snapshot(1).tensors["model"]})


def shared(whole: Snapshot) -> Snapshot:
    """The same, of which any rank may write any file."""
    everything = frozenset((group, name) for group, named in whole.tensors.items() for name in named)
    return dataclasses.replace(whole, replicated=everything)


def save_on_all(managers: Sequence[CheckpointManager], *snapshots: Snapshot, may_give_up_older: bool = False) -> None:
    """All ranks save at once: one snapshot, or each its own view of the step."""
    views = snapshots if len(snapshots) > 1 else snapshots * len(managers)
    for manager, view in zip(managers, views, strict=True):
        manager.save(view, may_give_up_older)
    for manager in managers:
        manager.wait()


def open_manager(
    folder: Path,
    token: int = 1,
    fence: Callable[[], None] = lambda: None,
    event: Callable[..., Any] = lambda name, **fields: None,
    **options: Any,
) -> CheckpointManager:
    """A manager that keeps two and the best, and cuts ``snapshot``'s model into two files."""
    defaults: dict[str, Any] = {"keep": KEEP, "best_metric": METRIC, "shard_bytes": 100, "threads": 1}
    settings = defaults | options
    return CheckpointManager(
        folder, token=token, version="0.0.test", identity=IDENTITY, fence=fence, event=event, **settings
    )


def next_attempt(folder: Path, events: Events | None = None, token: int = 2, **options: Any) -> CheckpointManager:
    """A manager as a restarted job opens it."""
    manager = open_manager(folder, token, event=Events() if events is None else events, **options)
    manager.sweep()
    return manager


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def commit(manager: CheckpointManager, *steps: int) -> None:
    """Save these steps one after the other and wait for each."""
    for step in steps:
        manager.save(snapshot(step))
        manager.wait()


def committed_steps(manager: CheckpointManager) -> list[int | None]:
    return [layout.parse_step_name(path.name) for path in manager.committed()]


def plain(tensors: Any) -> dict[str, dict[str, tuple[str, tuple[int, ...], bytes]]]:
    """Groups of tensors as values that can be compared."""
    return {g: {n: (t.dtype, t.shape, bytes(t.data)) for n, t in named.items()} for g, named in tensors.items()}


def assert_holds(loaded: Loaded | None, expected: Snapshot) -> None:
    """Exactly the bytes and values of the snapshot."""
    assert loaded is not None
    assert loaded.manifest.step == expected.step
    assert plain(loaded.tensors) == plain(expected.tensors)
    assert loaded.values == expected.values
    assert loaded.manifest.metrics == expected.metrics


def assert_sound(path: Path) -> None:
    """A visible checkpoint is whole for us and for coreutils, and holds no file that nobody knows."""
    manifest = reader.verify(path)
    assert_holds(reader.load(path), snapshot(manifest.step))
    check = subprocess.run(["sha256sum", "--strict", "-c", layout.SUMS], cwd=path, capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr
    known = {*manifest.files, layout.MANIFEST, layout.SUMS}
    assert check.stdout.splitlines() == [f"{name}: OK" for name in sorted(known - {layout.SUMS})]
    assert {file.name for file in path.iterdir()} - {layout.VERIFIED} == known


def digest_of(path: Path) -> FileRecord:
    """Size and SHA-256 of a file, by coreutils."""
    listing = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout
    return FileRecord(path.stat().st_size, listing.split()[0])


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change manifest.json and give it the right digest, as somebody would who means harm."""
    tree = json.loads((path / layout.MANIFEST).read_text())
    change(tree)
    (path / layout.MANIFEST).write_text(json.dumps(tree))
    sums = {name: record["sha256"] for name, record in tree["files"].items()}
    sums[layout.MANIFEST] = digest_of(path / layout.MANIFEST).sha256
    (path / layout.SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
