"""Faults of the disk under a real process that trains: nothing committed is lost, and training goes on.

The process asserts after each fault that the newest announced checkpoint is found, whole, and that the next save is
made; see faulty_training.py. The faults come from libc's own calls, made to fail by faulty_disk.c.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from checkpoint_parts import assert_holds, assert_sound, open_manager, snapshot
from fault_matrix import Matrix

from latentwire.run.directory import Run

HOW = "LD_PRELOAD"
TESTS = Path(__file__).parents[1]
NUM_RIVALS = 6
CHANGES = ["write", "fsync", "create", "mkdir", "rename", "link", "unlink"]


def start(library: Path, run: Run, **order: Any) -> subprocess.Popen[str]:
    """The program, on a disk with that fault."""
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS / "unit")))
    return subprocess.Popen(
        [sys.executable, Path(__file__).with_name("faulty_training.py"), json.dumps({"run": str(run.path), **order})],
        env=os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def events_of(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """All that it said, once it has ended well."""
    out, err = process.communicate()
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()]


def named(events: Sequence[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] in names]


def struck(events: Sequence[dict[str, Any]]) -> int:
    """How often the fault struck."""
    times = int(events[-1]["times"])
    assert times > 0
    return times


SAVE_FAULTS = [
    ("ENOSPC on write", ["write"], "ENOSPC", "No space left on device; free some space"),
    ("EDQUOT on write", ["write"], "EDQUOT", "Disk quota exceeded; .*have the quota raised"),
    ("EIO on write", ["write"], "EIO", "Input/output error; .*dmesg"),
    ("EIO on fsync", ["fsync"], "EIO", "Input/output error; .*dmesg"),
    ("EIO on rename", ["rename"], "EIO", "Input/output error; .*dmesg"),
    ("ENOSPC on mkdir and open", ["mkdir", "create"], "ENOSPC", "No space left on device; free some space"),
    ("EMFILE on open", ["open"], "EMFILE", "Too many open files; .*ulimit -n"),
    ("EROFS on every change", CHANGES, "EROFS", "Read-only file system; .*mounted again"),
    ("EIO on read, in the read-back", ["read"], "EIO", "Input/output error; .*dmesg"),
]


@pytest.mark.parametrize(("fault", "calls", "error", "says"), SAVE_FAULTS, ids=[fault[0] for fault in SAVE_FAULTS])
def test_a_fault_at_any_call_of_a_save_loses_nothing(
    faulty_disk: Path, run: Run, matrix: Matrix, fault: str, calls: list[str], error: str, says: str
) -> None:
    events = events_of(start(faulty_disk, run, what="save", calls=calls, error=error))
    told = named(events, "save_failed", "prune_failed", "mark_failed")
    assert named(told, "save_failed")
    for event in told:
        assert re.fullmatch(f"{re.escape(str(run.checkpoints))}.*: {says}.*", event["error"]), event["error"]
    matrix.count(fault, HOW, struck(events))


@pytest.mark.parametrize("error", ["EIO", "EMFILE"])
def test_a_fault_at_any_call_of_a_recovery_loses_nothing(
    faulty_disk: Path, run: Run, matrix: Matrix, error: str
) -> None:
    call = {"EIO": "read", "EMFILE": "open"}[error]
    events = events_of(start(faulty_disk, run, what="read", calls=[call], error=error))
    [refusal] = named(events, "nothing_usable")
    cure = {"EIO": "dmesg", "EMFILE": "ulimit -n"}[error]
    for event in [*named(events, "checkpoint_unreadable"), refusal]:
        assert f"{run.checkpoints}/step-" in event["error"]
        assert cure in event["error"]
    matrix.count(f"{error} on {call}, in a recovery", HOW, struck(events))


@pytest.mark.parametrize(
    ("fault", "calls", "error", "delay_us"),
    [
        ("short writes", ["write"], "short", 0),
        ("a slow disk: 2 ms for each write and fsync", ["write", "fsync"], "", 2000),
        ("a clock that jumps by up to 400 days", ["clock"], "", 0),
    ],
)
def test_a_bad_disk_or_clock_fails_no_save(
    faulty_disk: Path, run: Run, matrix: Matrix, fault: str, calls: list[str], error: str, delay_us: int
) -> None:
    events = events_of(start(faulty_disk, run, what="steadily", calls=calls, error=error, delay_us=delay_us))
    assert [event["step"] for event in named(events, "save_committed")] == list(range(1, 22))
    matrix.count(fault, HOW, struck(events))


def test_of_several_processes_on_one_run_the_newest_goes_on(faulty_disk: Path, run: Run, matrix: Matrix) -> None:
    """Each is started while the one before it saves; a slow disk lets their saves overlap."""
    announced = 0
    with ExitStack() as ended:

        def rival() -> subprocess.Popen[str]:
            how: dict[str, Any] = {"what": "rival", "calls": ["write", "rename"], "error": "", "delay_us": 2000}
            process = start(faulty_disk, run, **how)
            ended.callback(process.kill)
            return process

        older = rival()
        for _ in range(NUM_RIVALS):
            read_until(older, "save_committed", 2)
            newer = rival()
            restored = read_until(newer, "restored", 1)[-1]["step"]
            announced = max(announced, last_step_of(older))
            assert restored >= announced, "what the older one announced, the newer one found"
            older = newer
        run.claim_attempt(job_id="2", scheduler="local")  # fences the last
        announced = max(announced, last_step_of(older))
    manager = open_manager(run.checkpoints, token=99)
    assert_holds(manager.restore(), snapshot(announced))
    for path in manager.committed():
        assert_sound(path)
    matrix.count("a second process saves into the same run", "real processes", NUM_RIVALS + 1)


def last_step_of(superseded: subprocess.Popen[str]) -> int:
    """The last step that it announced; waits for its end."""
    said = events_of(superseded)
    assert said[-1]["event"] == "fenced"
    return max((event["step"] for event in named(said, "save_committed")), default=0)


def read_until(process: subprocess.Popen[str], name: str, times: int) -> list[dict[str, Any]]:
    """What it says until it has said that so often. Blocks."""
    assert process.stdout is not None
    said: list[dict[str, Any]] = []
    while len(named(said, name)) < times:
        said.append(json.loads(process.stdout.readline()))
    return said
