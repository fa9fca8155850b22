"""Every state that a power cut may leave, of every moment of saving, rotating and recovering: nothing committed is lost.

The real manager's operations are recorded once; the model of posix_disk.py says what a power cut at each of them may
leave; a new attempt then opens each of these folders, for real.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from checkpoint_parts import BEST_STEP, KEEP, assert_holds, commit, committed_steps, metric_of, open_manager, snapshot
from posix_disk import Disk, Fsync, Open, Operation, Rename, Told, Tree, Write
from recorder import Recorder, read_tree, write_tree

from latentwire.checkpoint import layout, reader
from latentwire.errors import LatentWireError, NoUsableCheckpoint
from latentwire.run.directory import Run

FEWEST_STATES = 2000


@dataclasses.dataclass(frozen=True)
class Record:
    """What a scenario did.

    Attributes:
        before: what was on the disk, durably.
        promised: steps that were committed before.
        in_doubt: steps that may be found too.
    """

    before: Tree
    operations: tuple[Operation, ...]
    promised: frozenset[int] = frozenset()
    in_doubt: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Recovered:
    """What a new attempt found: the step, None for none; what is visible; the attempts that are known."""

    found: int | None
    visible: frozenset[int]
    attempts: int


class Lost(AssertionError):
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
    """A new run saves five steps; the older ones go."""
    return record(place, lambda run, tell: attempt(run, range(1, 6), tell, threads=3), lambda run: None)


def recovery(place: Path) -> Record:
    """The newest checkpoint is corrupt, beside the remains of a save and of a deletion."""

    def before(run: Run) -> None:
        run.claim_attempt(job_id="1", scheduler="local")
        commit(open_manager(run.checkpoints), 1, 2, 3, 4)
        damage(run, 4)
        three = run.checkpoints / layout.step_name(3)
        (three / f".{layout.VERIFIED}.0123").write_text("half")
        shutil.copytree(three, run.checkpoints / f"{layout.SAVING_PREFIX}0000-00000005")
        shutil.copytree(three, run.checkpoints / f"{layout.DELETING_PREFIX}0000-step-1")

    made = record(place, lambda run, tell: attempt(run, range(4, 6), tell), before)
    return dataclasses.replace(made, promised=frozenset({BEST_STEP, 3}))


def last_one_damaged(place: Path) -> Record:
    """The only checkpoint is corrupt: it goes to quarantine, and the run must not begin anew in silence."""

    def before(run: Run) -> None:
        commit(open_manager(run.checkpoints), 1)
        damage(run, 1)

    return record(place, lambda run, tell: attempt(run, range(2, 3), tell), before)


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


def _renumbered(operations: tuple[Operation, ...]) -> Iterator[Operation]:
    """The handles of another process."""
    for operation in operations:
        handle = getattr(operation, "handle", None)
        yield operation if handle is None else dataclasses.replace(operation, handle=handle + 1_000_000)  # type: ignore[call-arg]


# --- recovering -------------------------------------------------------------------------------------------------------


class Checks:
    """Opens trees as a new attempt does; equal trees once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self._known: dict[frozenset[tuple[str, bytes | None]], Recovered | Lost] = {}

    @property
    def num_states(self) -> int:
        return len(self._known)

    def recovered(self, tree: Tree) -> Recovered:
        """What a new attempt makes of the tree.

        Raises:
            Lost: it sees something torn, or cannot go on.
        """
        key = frozenset(tree.items())
        if key not in self._known:
            self._known[key] = self._recover(tree)
        outcome = self._known[key]
        if isinstance(outcome, Lost):
            raise outcome
        return outcome

    def _recover(self, tree: Tree) -> Recovered | Lost:
        root = self._folder / str(next(self._numbers))
        write_tree(root, tree)
        try:
            return _recover(Run(root))
        except (AssertionError, LatentWireError, OSError) as error:
            return Lost(f"{type(error).__name__}: {error}")
        finally:
            shutil.rmtree(root)


def _recover(run: Run) -> Recovered:
    attempts = run.newest_number()
    failures: list[str] = []
    manager = open_manager(
        run.checkpoints, 99, event=lambda name, **fields: failures.append(name) if name == "save_failed" else None
    )
    try:
        manager.sweep()
        try:
            loaded = manager.restore()
        except NoUsableCheckpoint:
            return Recovered(None, frozenset(), attempts)
        found = 0 if loaded is None else loaded.manifest.step
        if loaded is not None:
            assert_holds(loaded, snapshot(found))
        visible = frozenset(step or 0 for step in committed_steps(manager))
        for step in visible:
            reader.verify(run.checkpoints / layout.step_name(step), threads=1)
        left = {entry.name for entry in run.checkpoints.iterdir()} - {layout.QUARANTINE}
        assert left == {layout.step_name(step) for step in visible}, "something half done was left"
        commit(manager, found + 1)
        assert committed_steps(manager)[-1] == found + 1
        assert not failures
        return Recovered(found, visible, attempts)
    finally:
        manager.close()


def power_cuts(recorded: Record, checks: Checks) -> None:
    """Cut the power at every operation.

    Raises:
        Lost: what was announced as committed before is not found, or not whole.
    """
    disk = Disk(recorded.before)
    promised, started, attempts, usable = set(recorded.promised), set(recorded.in_doubt), 0, True
    for number, operation in enumerate(recorded.operations):
        match operation:
            case Told("save_started", step) if step is not None:
                started.add(step)
            case Told("save_committed", step) if step is not None:
                promised.add(step)
            case Told("claimed", step) if step is not None:
                attempts = step
            case Told("checkpoint_quarantined"):
                usable = bool(promised)
        if not disk.apply(operation) and not isinstance(operation, Told):
            continue
        for tree in disk.after_power_cut():
            try:
                _hold(checks.recovered(tree), promised, started, attempts, usable)
            except Lost as lost:
                raise Lost(f"after operation {number}, {operation!r:.200}: {lost}\n{sorted(tree)}") from None


def _hold(recovered: Recovered, promised: set[int], started: set[int], attempts: int, usable: bool) -> None:
    newest = max(promised, default=0)
    if recovered.attempts < attempts:
        raise Lost(f"attempt {attempts} is forgotten: its number would be given again")
    if recovered.found is None and not promised:
        return
    if not usable:
        raise Lost("the run begins at step 0 in silence")
    if recovered.found != newest and recovered.found not in started - promised:
        raise Lost(f"step {newest} was committed and step {recovered.found} is found")
    stay = set(sorted(promised)[-KEEP:]) | set(sorted(promised, key=metric_of)[:1])
    if not stay <= recovered.visible <= promised | started:
        raise Lost(f"of the steps {sorted(stay)} only {sorted(recovered.visible)} are left")


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


SCENARIOS = (saves, recovery, last_one_damaged, step_again)


@pytest.fixture(scope="module")
def records(memory: Path) -> Mapping[str, Record]:
    return {scenario.__name__: scenario(memory / scenario.__name__) for scenario in SCENARIOS}


@pytest.mark.parametrize("name", [scenario.__name__ for scenario in SCENARIOS])
def test_no_power_cut_takes_what_was_committed(name: str, records: Mapping[str, Record], checks: Checks) -> None:
    before = checks.num_states
    power_cuts(records[name], checks)
    counted = collections.Counter(type(operation).__name__ for operation in records[name].operations)
    print(name, checks.num_states - before, dict(counted))
