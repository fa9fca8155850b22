"""``latentwire metrics`` and what ``latentwire track`` refuses."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from cli_parts import append, complaint, end, finished_run, make_run, printed, program, read_line

from latentwire.run.directory import Run

Points = list[tuple[int, int]]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


def points(text: str) -> Points:
    """(step, attempt) of each line."""
    return [(record["step"], record["attempt"]) for record in map(json.loads, text.splitlines())]


def add(run: Run, number: int, *steps: int) -> None:
    for step in steps:
        append(run.attempts()[number - 1].metrics_path, json.dumps({"step": step, "loss": 1.0, "step_s": 1.0}) + "\n")


def test_the_curve_stands_once_over_all_attempts(home: Path) -> None:
    run = finished_run(home)
    add(run, 1, 11, 20)
    append(run.attempts()[0].metrics_path, '{"step": 21, "lo')
    assert points(printed(home, "metrics", "toy")) == [(10, 1), (11, 1), (20, 2)]
    printed(home, "metrics", "toy", "--to", "curve.jsonl")
    assert points((home / "curve.jsonl").read_text()) == [(10, 1), (11, 1), (20, 2)]
    assert [path.name for path in home.iterdir() if path.name.startswith(".")] == []


def test_a_run_that_has_not_started_has_no_curve(home: Path) -> None:
    make_run(home)
    assert printed(home, "metrics", "toy") == ""


def test_follow_goes_on_until_the_run_is_finished(home: Path) -> None:
    run = make_run(home)
    first = run.claim_attempt("1", "local")
    add(run, 1, 1, 2)
    with subprocess.Popen(program("metrics", "toy", "-f"), cwd=home, stdout=subprocess.PIPE, text=True) as follower:
        assert points(read_line(follower) + read_line(follower)) == [(1, 1), (2, 1)]
        end(first, "preempted")
        second = run.claim_attempt("1", "local")
        add(run, 2, 2)
        assert points(read_line(follower)) == [(2, 2)]
        add(run, 2, 3)
        end(second, "finished")
        assert points(follower.communicate()[0]) == [(3, 2)]
    assert follower.returncode == 0


def test_a_tracker_that_there_is_not(home: Path) -> None:
    make_run(home)
    said = complaint(home, "track", "toy", "--with", "tensorbord")
    assert said == "latentwire: there is no tracker 'tensorbord'; did you mean tensorboard?\n"


def test_a_file_that_is_replaced_whole_cannot_be_followed(home: Path) -> None:
    make_run(home)
    assert "cannot be followed" in complaint(home, "metrics", "toy", "--follow", "--to", "x", code=2)


def test_a_full_disk_is_named(home: Path, small_disk: Path) -> None:
    finished_run(home)
    (small_disk / "filler").write_bytes(bytes(2**20))
    path = small_disk / "m"
    said = complaint(home, "metrics", "toy", "--to", str(path))
    assert said == f"latentwire: {path}: No space left on device; free some space there\n"
