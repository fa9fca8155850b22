"""Every state that a power cut may leave, at every moment of a save, a rotation, a recovery: nothing committed is lost.

The real manager's operations are recorded once; the model of posix_disk.py says what a power cut at each of them may
leave; a new attempt then opens each of these folders, for real.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_parts import (
    BEST_STEP,
    KEEP,
    Events,
    assert_holds,
    commit,
    committed_steps,
    half_changed,
    metric_of,
    open_manager,
    save_on_all,
    shared,
    snapshot,
)
from fault_matrix import Matrix
from posix_disk import Close, Disk, Fsync, Link, Mkdir, Open, Operation, Rename, Rmdir, Told, Tree, Unlink, Write
from recorder import Recorder, read_tree, write_tree

from latentwire.checkpoint import layout
from latentwire.checkpoint.layout import Snapshot
from latentwire.errors import LatentWireError, NoUsableCheckpoint
from latentwire.run.directory import Run

FEWEST_STATES = 2000


@dataclasses.dataclass(frozen=True)
class Record:
    """What a scenario did.

    Attributes:
        before: what was on the disk, durably.
        promised: steps that were committed before.
        damaged: a step whose checkpoint was bad before.
        never_empty: there was a checkpoint, so that a run may not begin at step 0.
        state: what a checkpoint of a step holds.
    """

    before: Tree
    operations: tuple[Operation, ...]
    promised: frozenset[int] = frozenset()
    damaged: int | None = None
    never_empty: bool = False
    state: Callable[[int], Snapshot] = snapshot


@dataclasses.dataclass(frozen=True)
class Recovered:
    """What a new attempt found: the step, None where none can be used.

    Attributes:
        torn: checkpoints that were visible before it cleaned up, and not whole.
        visible: checkpoints after that.
        attempts: how many are known.
    """

    found: int | None
    torn: frozenset[int]
    visible: frozenset[int]
    attempts: int


class Lost(Exception):
    """A power cut took what was committed, or left what is torn."""


# --- scenarios --------------------------------------------------------------------------------------------------------


def attempt(run: Run, steps: range, tell: Callable[..., None], threads: int = 1) -> None:
    """As a job does it: claim, clean up, restore, then save step by step."""
    claimed = run.claim_attempt(job_id="1", scheduler="local")
    tell("claimed", step=claimed.number)
    manager = open_manager(run.checkpoints, claimed.number, claimed.assert_newest, tell, threads=threads)
    manager.sweep()
    try:
        manager.restore()
    except NoUsableCheckpoint:
        tell("nothing_usable")
    else:
        commit(manager, *steps)
        manager.add_metrics(steps[-1], {"later": 1.0})
    manager.close()


def record(place: Path, scenario: Callable[[Run, Callable[..., None]], None], before: Callable[[Run], None]) -> Record:
    """Run a scenario under the recorder; what it recorded must lead to what is really on the disk."""
    run = Run(place)
    run.path.mkdir()
    before(run)
    start = read_tree(run.path)
    recorder = Recorder(run.path)
    with recorder.recording():
        scenario(run, recorder.tell)
    disk = Disk(start)
    for operation in recorder.operations:
        disk.apply(operation)
    assert disk.as_seen() == read_tree(run.path), "an operation escaped the recorder"
    return Record(start, tuple(recorder.operations))


def damage(run: Run, step: int) -> None:
    """Flip the last byte of a file of tensors."""
    file = next((run.checkpoints / layout.step_name(step)).glob("optimizer*"))
    file.write_bytes(file.read_bytes()[:-1] + b"!")


def saves(place: Path) -> Record:
    """A new run saves four steps, is started again, and saves two more; the older ones go."""

    def scenario(run: Run, tell: Callable[..., None]) -> None:
        attempt(run, range(1, 5), tell, threads=3)
        attempt(run, range(5, 7), tell)

    return record(place, scenario, lambda run: None)


def recovery(place: Path) -> Record:
    """The newest checkpoint is corrupt, beside the remains of a save and of a deletion."""

    def before(run: Run) -> None:
        run.claim_attempt(job_id="1", scheduler="local")
        commit(open_manager(run.checkpoints), 1, 2, 3, 4)
        damage(run, 4)
        three = run.checkpoints / layout.step_name(3)
        (three / f".{layout.VERIFIED}.0123").write_text("half")
        for remains in (f"{layout.SAVING_PREFIX}0000-00000005", f"{layout.DELETING_PREFIX}0000-step-1"):
            (run.checkpoints / remains).mkdir()
            shutil.copy(three / layout.STATE, run.checkpoints / remains)
            shutil.copy(three / layout.MANIFEST, run.checkpoints / remains)

    made = record(place, lambda run, tell: attempt(run, range(4, 6), tell), before)
    return dataclasses.replace(made, promised=frozenset({BEST_STEP, 3}), damaged=4)


def last_one_damaged(place: Path) -> Record:
    """The only checkpoint is corrupt: it goes to quarantine, and the run must not begin anew in silence."""

    def before(run: Run) -> None:
        commit(open_manager(run.checkpoints), 1)
        damage(run, 1)

    made = record(place, lambda run, tell: attempt(run, range(2, 3), tell), before)
    return dataclasses.replace(made, damaged=1, never_empty=True)


def step_again(place: Path) -> Record:
    """The step to save is there already: a kill came between its rename and the fsync of the folder."""

    def scenario(run: Run, tell: Callable[..., None]) -> None:
        manager = open_manager(run.checkpoints, event=tell)
        commit(manager, 1, 2)
        manager.close()

    made = record(place, scenario, lambda run: None)
    killed = next(i for i, o in enumerate(made.operations) if isinstance(o, Rename) and o.target.endswith("00000002"))
    disk = Disk(made.before)
    for operation in made.operations[: killed + 1]:
        disk.apply(operation)
    left = disk.as_seen()
    shutil.rmtree(place)

    def again(run: Run, tell: Callable[..., None]) -> None:
        manager = open_manager(run.checkpoints, 2, event=tell)
        commit(manager, 2)
        manager.close()

    def before(run: Run) -> None:
        shutil.rmtree(run.path)
        write_tree(run.path, left)

    second = record(place, again, before)
    operations = (*made.operations[: killed + 1], *_renumbered(second.operations))
    return Record(made.before, operations)


def ranks_and_links(place: Path) -> Record:
    """Two ranks write each checkpoint, and link what has not changed since the one before."""

    def state(step: int) -> Snapshot:
        return shared(half_changed(step))

    def scenario(run: Run, tell: Callable[..., None]) -> None:
        ranks = [open_manager(run.checkpoints, event=tell, rank=r, world_size=2, link_unchanged=True) for r in (0, 1)]
        for step in range(1, 5):
            save_on_all(ranks, state(step))
        for manager in ranks:
            manager.close()

    return dataclasses.replace(record(place, scenario, lambda run: None), state=state)


def _renumbered(operations: tuple[Operation, ...]) -> Iterator[Operation]:
    """The handles of another process."""
    for operation in operations:
        handle = getattr(operation, "handle", None)
        yield operation if handle is None else dataclasses.replace(operation, handle=handle + 1_000_000)  # type: ignore[call-arg]


# --- recovering -------------------------------------------------------------------------------------------------------


class Checks:
    """Opens trees as a new attempt does; equal trees once, and saves once into each folder that a recovery left."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self._known: dict[Any, Recovered | Lost] = {}
        self._saved_into: set[frozenset[str]] = set()

    @property
    def num_states(self) -> int:
        """Different trees so far."""
        return len(self._known)

    def recovered(self, tree: Tree, state: Callable[[int], Snapshot]) -> Recovered | Lost:
        """What a new attempt makes of the tree; ``Lost`` where it sees something torn, or cannot go on."""
        key = frozenset(tree.items()), state
        if key not in self._known:
            run = Run(self._folder / str(next(self._numbers)))
            write_tree(run.path, tree)
            try:
                self._known[key] = self._recover(run, tree, state)
            except (AssertionError, LatentWireError, OSError) as error:
                self._known[key] = Lost(f"{type(error).__name__}: {error}")
            shutil.rmtree(run.path)
        return self._known[key]

    def _recover(self, run: Run, tree: Tree, state: Callable[[int], Snapshot]) -> Recovered:
        attempts = run.newest_number()
        torn = frozenset(step for step in steps_in(tree) if not is_sound(tree, step))
        events = Events()
        manager = open_manager(run.checkpoints, 99, event=events)
        manager.sweep()
        try:
            loaded = manager.restore()
        except NoUsableCheckpoint:
            return Recovered(None, torn, frozenset(), attempts)
        found = 0 if loaded is None else loaded.manifest.step
        if loaded is not None:
            assert_holds(loaded, state(found))
        names = {path.name for path in run.checkpoints.iterdir()} - {layout.QUARANTINE}
        visible = frozenset(step or 0 for step in committed_steps(manager))
        assert names == set(map(layout.step_name, visible)), "something half done was left"

        left = frozenset(os.path.join(at, name) for at in names for name in os.listdir(run.checkpoints / at))
        if left not in self._saved_into:
            self._saved_into.add(left)
            commit(manager, found + 1)
            assert committed_steps(manager)[-1] == found + 1
            assert not events.named("save_failed")
        manager.close()
        return Recovered(found, torn, visible, attempts)


def steps_in(tree: Tree) -> set[int]:
    """Steps whose checkpoints a reader of the tree would see."""
    steps = (layout.parse_step_name(path.removeprefix("checkpoints/")) for path in tree)
    return {step for step in steps if step is not None}


def is_sound(tree: Tree, step: int) -> bool:
    """As ``sha256sum -c SHA256SUMS`` would say."""
    folder = f"checkpoints/{layout.step_name(step)}/"
    lines = (tree.get(folder + layout.SUMS) or b"").decode().splitlines()
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    there = {path.removeprefix(folder): content or b"" for path, content in tree.items() if path.startswith(folder)}
    hidden = {name for name in there if name.startswith(f".{layout.VERIFIED}")}
    content = {name: data for name, data in there.items() if name not in {layout.SUMS, layout.VERIFIED} | hidden}
    return bool(listed) and listed == {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}


def power_cuts(recorded: Record, checks: Checks) -> None:
    """Cut the power at every operation.

    Raises:
        Lost: what was announced as committed before is not found, or not whole.
    """
    disk = Disk(recorded.before)
    promised, started, attempts = set(recorded.promised), set(recorded.promised), 0
    outcomes: dict[Recovered | Lost, Tree] = {}
    for number, operation in enumerate(recorded.operations):
        match operation:
            case Told("save_started", int(step)):
                started.add(step)
            case Told("save_committed", int(step)):
                promised.add(step)
            case Told("claimed", int(step)):
                attempts = step
        if disk.apply(operation):
            outcomes = {checks.recovered(tree, recorded.state): tree for tree in disk.after_power_cut()}
        for outcome, tree in outcomes.items():
            broken = breach(recorded, outcome, promised, started, attempts)
            if broken is not None:
                raise Lost(f"after operation {number}, {operation!r:.200}: {broken}\n{sorted(tree)}")


def breach(
    recorded: Record, outcome: Recovered | Lost, promised: set[int], started: set[int], attempts: int
) -> str | None:
    """What is wrong with an outcome, given what was announced before the power cut."""
    if isinstance(outcome, Lost):
        return str(outcome)
    if outcome.attempts < attempts:
        return f"attempt {attempts} is forgotten: its number would be given again"
    if outcome.torn - {recorded.damaged}:
        return f"the steps {sorted(outcome.torn)} are visible and not whole"
    if outcome.found is None:
        return f"step {max(promised)} was committed and nothing can be used" if promised else None
    if recorded.never_empty and outcome.found == 0:
        return "the run begins at step 0 in silence"
    if outcome.found != max(promised, default=0) and outcome.found not in started - promised:
        return f"step {max(promised)} was committed and step {outcome.found} is found"
    stay = set(sorted(promised)[-KEEP:]) | set(sorted(promised, key=metric_of)[:1])
    if not stay <= outcome.visible <= started:
        return f"the steps {sorted(stay)} must stay, and {sorted(outcome.visible)} are there"
    return None


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: the model is the disk."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def checks(memory: Path) -> Checks:
    (memory / "states").mkdir()
    return Checks(memory / "states")


@pytest.fixture(scope="module")
def records(memory: Path) -> dict[str, Record]:
    return {scenario.__name__: scenario(memory / scenario.__name__) for scenario in SCENARIOS}


SCENARIOS = (saves, recovery, last_one_damaged, step_again, ranks_and_links)
EVERY_KIND = {Open, Write, Fsync, Close, Mkdir, Rename, Link, Unlink, Rmdir}


def test_no_power_cut_takes_what_was_committed(records: dict[str, Record], checks: Checks, matrix: Matrix) -> None:
    for name, made in records.items():
        before = checks.num_states
        power_cuts(made, checks)
        cuts = sum(not isinstance(operation, Told) for operation in made.operations)
        print(f"{name}: power cut at {cuts} operations, {checks.num_states - before} new states")
        matrix.count(f"power cut: {name.replace('_', ' ')}", "model of the disk", checks.num_states - before)
    print(f"{checks.num_states} states, 0 committed checkpoints lost")
    assert checks.num_states > FEWEST_STATES
    kinds = {type(operation) for made in records.values() for operation in made.operations}
    assert kinds - {Told} >= EVERY_KIND


# --- the model can fail -----------------------------------------------------------------------------------------------


def without_fsync_of(what: str) -> Callable[[Record], Record]:
    """As if the disk, or we, had left those out: ``files`` or ``folders``."""

    def change(made: Record) -> Record:
        files = {o.handle for o in made.operations if isinstance(o, Open) and o.writes}
        kept = (o for o in made.operations if not isinstance(o, Fsync) or (o.handle in files) != (what == "files"))
        return dataclasses.replace(made, operations=tuple(kept))

    return change


def visible_before_the_manifest(made: Record) -> Record:
    """Each commit's rename comes before the manifest is written."""
    operations = list(made.operations)
    for rename in [o for o in operations if isinstance(o, Rename) and layout.SAVING_PREFIX in o.source]:
        late = operations.index(rename)
        manifest = f"{rename.source}/{layout.MANIFEST}"
        early = next(i for i, o in enumerate(operations) if isinstance(o, Open) and o.path == manifest)
        between = [
            dataclasses.replace(o, path=o.path.replace(rename.source, rename.target)) if isinstance(o, Open) else o
            for o in operations[early:late]
        ]
        operations[early : late + 1] = [rename, *between]
    return dataclasses.replace(made, operations=tuple(operations))


def files_go_before_the_name(made: Record) -> Record:
    """No fsync between a deletion's rename and the removal of its files."""
    operations = list(made.operations)
    for rename in [o for o in operations if isinstance(o, Rename) and layout.DELETING_PREFIX in o.target]:
        at = operations.index(rename)
        del operations[next(i for i in range(at, len(operations)) if isinstance(operations[i], Fsync))]
    return dataclasses.replace(made, operations=tuple(operations))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (without_fsync_of("files"), "not whole"),
        (without_fsync_of("folders"), "is forgotten"),
        (visible_before_the_manifest, "not whole"),
        (files_go_before_the_name, "not whole"),
    ],
    ids=["no fsync of files", "no fsync of folders", "visible before the manifest", "files go before the name"],
)
def test_the_model_finds_what_a_missing_step_would_cost(
    change: Callable[[Record], Record], found: str, records: dict[str, Record], checks: Checks
) -> None:
    with pytest.raises(Lost, match=found):
        power_cuts(change(records["saves"]), checks)
