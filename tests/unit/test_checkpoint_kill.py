"""kill -9 at every write point of a save and of a recovery: what was announced as committed is always found.

The real manager works in real processes on real files. A trap before every operation that changes the disk, and one in
the middle of every write, kills the process; then a new attempt opens the folder.
"""

from __future__ import annotations

import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from checkpoint_parts import (
    BEST_STEP,
    KEEP,
    assert_holds,
    assert_sound,
    commit,
    committed_steps,
    metric_of,
    open_manager,
    snapshot,
)
from fault_matrix import Matrix

from latentwire.checkpoint import layout, reader
from latentwire.run.directory import Run
from latentwire.run.journal import read_journal

LAST_STEP = 4
NUM_SERVERS = 2
FEWEST_RANDOM = 20
KILLED = "real processes"


class KillServer:
    """Starts processes that train and die; see kill_server.py."""

    def __init__(self) -> None:
        program = Path(__file__).with_name("kill_server.py")
        self._process = subprocess.Popen(
            [sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def train(
        self, run: Run, kill_at: int | None = None, kill_after_s: float | None = None, threads: int = 1
    ) -> list[str]:
        """Let an attempt train until it ends or dies; the operations that it counted, if it ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        last_step = LAST_STEP if kill_after_s is None else None
        order = {"run": str(run.path), "kill_at": kill_at, "last_step": last_step, "threads": threads}
        print(json.dumps(order), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = {"kinds": []}
        killer = None
        while "exit" not in answer:
            answer |= json.loads(self._process.stdout.readline())
            if kill_after_s is not None and killer is None:
                killer = threading.Timer(kill_after_s, os.kill, (answer["pid"], signal.SIGKILL))
                killer.start()
        assert answer["exit"] == (-signal.SIGKILL if kill_at or kill_after_s else 0)
        return list(answer["kinds"])

    def close(self) -> None:
        self._process.communicate()


class Servers:
    """Kills side by side."""

    def __init__(self) -> None:
        self._idle: queue.SimpleQueue[KillServer] = queue.SimpleQueue()
        for _ in range(NUM_SERVERS):
            self._idle.put(KillServer())

    def train(self, run: Run, **how: Any) -> list[str]:
        """See ``KillServer.train``."""
        server = self._idle.get()
        try:
            return server.train(run, **how)
        finally:
            self._idle.put(server)

    def at_each(self, points: range, kill_and_check: Callable[[int], int]) -> set[int]:
        """What was found after a kill at each of the points."""
        with ThreadPoolExecutor(NUM_SERVERS) as pool:
            return set(pool.map(kill_and_check, points))

    def close(self) -> None:
        for _ in range(NUM_SERVERS):
            self._idle.get().close()


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    servers = Servers()
    yield servers
    servers.close()


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: SIGKILL leaves what the kernel has, so that a disk shows nothing more."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def damaged(runs: Path) -> Run:
    """A run whose newest checkpoint is corrupt, beside the remains of a save and of a deletion."""
    run = new_run(runs / "damaged")
    commit(open_manager(run.checkpoints), 1, 2, 3, 4)
    moments = next((run.checkpoints / layout.step_name(4)).glob("optimizer*"))
    moments.write_bytes(moments.read_bytes()[:-1] + b"!")
    shutil.copytree(run.checkpoints / layout.step_name(3), run.checkpoints / f"{layout.SAVING_PREFIX}0000-00000005")
    shutil.copytree(run.checkpoints / layout.step_name(3), run.checkpoints / f"{layout.DELETING_PREFIX}0000-step-1")
    return run


def new_run(path: Path) -> Run:
    path.mkdir(parents=True)
    return Run(path)


def announced(run: Run) -> set[int]:
    """Steps that some attempt called committed."""
    events = [e for a in run.attempts() for e in read_journal(a.path / "events.rank0.jsonl")]
    return {int(event["step"]) for event in events if event.get("event") == "save_committed"}


def assert_recoverable(run: Run, promised: set[int], in_doubt: set[int]) -> int:
    """Open the folder as the next attempt does; returns the step that it found.

    Args:
        promised: steps of which the newest must be found, and all that retention keeps of them.
        in_doubt: steps that may be there too.
    """
    attempt = run.claim_attempt(job_id="2", scheduler="local")
    events: list[tuple[str, dict[str, Any]]] = []
    manager = open_manager(
        run.checkpoints, attempt.number, attempt.assert_newest, lambda name, **fields: events.append((name, fields))
    )
    manager.sweep()
    loaded = manager.restore()
    found = 0 if loaded is None else loaded.manifest.step
    assert found == max(promised, default=0) or found in in_doubt - promised
    if loaded is not None:
        assert_holds(loaded, snapshot(found))
        assert reader.is_verified(loaded.path)

    stay = set(sorted(promised)[-KEEP:]) | set(sorted(promised, key=metric_of)[:1])
    visible = set(committed_steps(manager))
    assert stay <= visible <= promised | in_doubt
    assert set(os.listdir(run.checkpoints)) - {layout.QUARANTINE} == {layout.step_name(step or 0) for step in visible}
    for path in manager.committed():
        assert_sound(path)

    commit(manager, found + 1)
    manager.close()
    assert committed_steps(manager)[-1] == found + 1
    assert_sound(run.checkpoints / layout.step_name(found + 1))
    assert [fields for name, fields in events if name == "save_failed"] == []
    return found


def test_a_kill_at_every_write_point_of_saves_loses_nothing(servers: Servers, runs: Path, matrix: Matrix) -> None:
    kinds = servers.train(new_run(runs / "undisturbed"))
    every = {"open", "write", "half a write", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir"}
    assert set(kinds) == every, "the undisturbed run went through save, read-back and deletion"
    assert kinds.count("rename") >= 1 + LAST_STEP + 1, "a claim, saves, a deletion"
    assert len(kinds) >= 200

    def kill_and_check(kill_at: int) -> int:
        run = new_run(runs / f"killed-{kill_at}")
        servers.train(run, kill_at=kill_at)
        promised = announced(run)
        found = assert_recoverable(run, promised, in_doubt={len(promised) + 1})
        shutil.rmtree(run.path)
        return found

    found = servers.at_each(range(1, len(kinds) + 1), kill_and_check)
    assert found == set(range(LAST_STEP + 1)), "the kills fell into every save"
    print(f"{len(kinds)} kills, one at each write point of {LAST_STEP} saves")
    matrix.count("SIGKILL at each operation of saves, in mid-write too", KILLED, len(kinds))


def test_a_kill_at_every_write_point_of_a_recovery_loses_nothing(
    servers: Servers, runs: Path, damaged: Run, matrix: Matrix
) -> None:
    def copy(name: str) -> Run:
        return Run(Path(shutil.copytree(damaged.path, runs / name)))

    kinds = servers.train(copy("undisturbed"))

    def kill_and_check(kill_at: int) -> int:
        run = copy(f"killed-{kill_at}")
        servers.train(run, kill_at=kill_at)
        found = assert_recoverable(run, {BEST_STEP, 3} | announced(run), in_doubt={LAST_STEP})
        shutil.rmtree(run.path)
        return found

    assert kinds.count("rename") >= 4, "a claim, a sweep, a quarantine, a save"
    assert servers.at_each(range(1, len(kinds) + 1), kill_and_check) == {3, LAST_STEP}
    print(f"{len(kinds)} kills, one at each write point of a recovery and what follows")
    matrix.count("SIGKILL at each operation of a recovery and what follows", KILLED, len(kinds))


def test_kills_at_random_times_of_one_run_lose_nothing(
    servers: Servers, runs: Path, pytestconfig: pytest.Config, matrix: Matrix
) -> None:
    """One run, started again and again by attempts that are killed from outside, at random times or write points."""
    seed = pytestconfig.getoption("--kill-seed")
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    num_points = len(servers.train(new_run(runs / "undisturbed")))
    num_kills = max(FEWEST_RANDOM, pytestconfig.getoption("--kills") - num_points)
    print(f"{num_kills} random kills; repeat with --kill-seed {seed}")
    choose = random.Random(seed)

    run = new_run(runs / "random")
    ours: set[int] = set()  # found and saved by the checks between two attempts, which write no journal
    for _ in range(num_kills):
        threads = choose.choice((1, 3))
        servers.train(run, kill_after_s=choose.uniform(0.01, 0.15), threads=threads)
        promised = announced(run) | ours
        found = assert_recoverable(run, promised, in_doubt={max(promised, default=0) + 1})
        ours |= {found, found + 1} - {0}  # found: it may have been committed by one that died before it could say so
    matrix.count("SIGKILL at random moments", KILLED, num_kills)
