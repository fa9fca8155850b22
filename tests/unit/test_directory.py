"""Attempts, and the directories of runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from run_parts import Start, config, first_line, go_on

from latentwire.errors import Fenced, RunConflict, RunError, RunNotFound
from latentwire.run.directory import Attempt, Run, create_run, list_runs, open_run


def test_eight_processes_that_claim_at_once_get_eight_numbers(run: Run, start: Start) -> None:
    program = f"""
from pathlib import Path
from latentwire.run.directory import Run
import psutil
print("ready", flush=True)
input()
for _ in range(5):
    print(Run(Path({str(run.path)!r})).claim_attempt("1", "local").number, flush=True)
"""
    processes = [start(program) for _ in range(8)]
    assert [first_line(process) for process in processes] == ["ready"] * 8
    for process in processes:
        go_on(process)
    numbers = [[int(line) for line in process.communicate()[0].split()] for process in processes]
    assert sorted(n for each in numbers for n in each) == list(range(1, 41))
    assert all(each == sorted(each) for each in numbers), "a later claim has a higher number"
    assert [attempt.number for attempt in run.attempts()] == list(range(1, 41))
    for number, process in zip(numbers, processes, strict=True):
        agent = Attempt(run, number[0]).agent()
        assert agent is not None
        assert agent.pid == process.pid
    assert {entry for entry in os.listdir(run.path / "attempts") if entry.startswith(".")} == set()


def test_an_attempt_is_fenced_by_the_next(run: Run) -> None:
    first = run.claim_attempt("1", "local")
    first.assert_newest()
    assert first.is_newest()
    second = run.claim_attempt("2", "local")
    assert not first.is_newest()
    with pytest.raises(Fenced, match="attempt 1 of test was superseded by attempt 2"):
        first.assert_newest()
    second.assert_newest()


def test_an_agent_that_was_superseded_claims_no_more(run: Run) -> None:
    mine = run.claim_attempt("1", "slurm")
    mine = run.claim_attempt("1", "slurm", after=mine)
    theirs = run.claim_attempt("1", "slurm", restart=1)
    with pytest.raises(Fenced, match="attempt 3"):
        run.claim_attempt("1", "slurm", after=mine)
    assert run.attempts() == [Attempt(run, 1), mine, theirs]
    assert theirs.record()["restart"] == 1
    assert sorted(path.name for path in theirs.path.parent.iterdir()) == ["0001", "0002", "0003"]


def test_numbers_go_on_past_four_digits(run: Run) -> None:
    (run.path / "attempts" / "9999").mkdir(parents=True)
    assert run.claim_attempt("1", "local").path.name == "10000"
    assert run.newest_number() == 10000


def test_other_entries_are_no_attempts(run: Run) -> None:
    for name in (".claim-abc", "12", "notes", "0001.bak"):
        (run.path / "attempts" / name).mkdir(parents=True)
    assert run.attempts() == []
    assert run.newest_number() == 0


def test_a_checkpoint_under_two_marks_is_deadly(run: Run) -> None:
    attempts = [run.claim_attempt(str(number), "local") for number in range(4)]
    assert run.deadly_checkpoints() == set()
    attempts[0].mark_restoring("step-00000005")
    attempts[1].mark_restoring("step-00000004")
    assert run.deadly_checkpoints() == set()
    attempts[2].mark_restoring("step-00000005")
    assert attempts[2].restoring() == "step-00000005"
    assert run.deadly_checkpoints() == {"step-00000005"}
    attempts[2].unmark_restoring()
    attempts[2].unmark_restoring()
    assert attempts[2].restoring() is None
    assert run.deadly_checkpoints() == set()


def test_events_of_all_writers_are_merged_by_time(run: Run) -> None:
    attempt = run.claim_attempt("1", "local")
    for writer, times in (("agent", (1, 4)), ("rank0", (2, 3))):
        lines = [json.dumps({"time": t, "event": f"e{t}"}) for t in times]
        (attempt.path / f"events.{writer}.jsonl").write_text("\n".join(lines) + "\n")
    assert [(e["event"], e["writer"]) for e in attempt.events()] == [
        ("e1", "agent"), ("e2", "rank0"), ("e3", "rank0"), ("e4", "agent"),
    ]  # fmt: skip


# ---- Directories of runs ---------------------------------------------------------------------------------------------


def test_a_run_is_made_once_and_found_again(tmp_path: Path) -> None:
    run = create_run(config(), tmp_path)
    assert run.config() == config()
    assert create_run(config(), tmp_path) == run
    for name in ("test", "experiment_test", str(run.path)):
        assert open_run(name, tmp_path) == run
    assert list_runs(tmp_path) == [run]
    assert list_runs(tmp_path / "missing") == []


def test_a_run_of_another_config_is_refused_with_the_difference(tmp_path: Path) -> None:
    run = create_run(config(), tmp_path)
    before = (run.path / "config.yaml").read_bytes()
    with pytest.raises(RunConflict) as caught:
        create_run(config(seed=3, train={"steps": 7000}, retry={"oom": 1}), tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[1:3] == ["  seed: 0 -> 3", "  train.steps: 1000 -> 7000"]
    assert str(run.path) in lines[0]
    assert "name=test-2" in lines[3]
    assert len(lines) == 4
    assert (run.path / "config.yaml").read_bytes() == before


def test_settings_of_operation_may_change_between_attempts(tmp_path: Path) -> None:
    create_run(config(), tmp_path)
    assert create_run(config(retry={"oom": 1}), tmp_path).config().retry.oom == 1


def test_an_unknown_run_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(RunNotFound, match=r"no run 'x'.*none yet"):
        open_run("x", tmp_path)
    create_run(config("one"), tmp_path)
    create_run(config("two"), tmp_path)
    with pytest.raises(RunNotFound, match="it has: one, two"):
        open_run("x", tmp_path)


@pytest.mark.parametrize("content", [b"a: [", b"\xff", b"name: 2001-99-99"])
def test_a_damaged_config_says_what_to_do(tmp_path: Path, content: bytes) -> None:
    run = create_run(config(), tmp_path)
    (run.path / "config.yaml").write_bytes(content)
    with pytest.raises(RunError, match="submit the run's config again"):
        run.config()
