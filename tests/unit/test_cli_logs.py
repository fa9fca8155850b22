"""``latentwire logs`` and ``events``."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
from cli_parts import (
    append,
    complaint,
    end,
    finished_run,
    make_run,
    on_terminal,
    printed,
    program,
    read_line,
    write_events,
)


def test_logs_of_the_newest_attempt_or_another(home: Path) -> None:
    run = finished_run(home)
    for attempt in run.attempts():
        (attempt.path / "stdout.log").write_text(f"out {attempt.number}\n")
        (attempt.path / "stderr.log").write_text(f"err {attempt.number}\n")
    assert printed(home, "logs", "toy") == "out 2\n"
    assert printed(home, "logs", "toy", "--attempt", "1", "--stderr") == "err 1\n"
    assert "has no attempt 7; it has: 1, 2" in complaint(home, "logs", "toy", "--attempt", "7")


def test_logs_before_the_first_attempt_says_so(home: Path) -> None:
    make_run(home)
    assert "has not been started yet" in complaint(home, "logs", "toy")


@pytest.mark.parametrize("end", ["\n", ""], ids=["closed", "half a line at the end"])
@pytest.mark.parametrize("num_lines", [0, 1, 3, 9000, 20000])
def test_logs_last_lines(home: Path, num_lines: int, end: str) -> None:
    attempt = make_run(home).claim_attempt("1", "local")
    lines = [f"line number {i}" for i in range(10000)]
    (attempt.path / "stdout.log").write_text("\n".join(lines) + end)
    wanted = lines[-num_lines:] if num_lines else []
    assert printed(home, "logs", "toy", "--lines", str(num_lines)).splitlines() == wanted


def test_logs_are_raw_in_a_pipe_and_escaped_on_a_terminal(home: Path) -> None:
    attempt = make_run(home).claim_attempt("1", "local")
    (attempt.path / "stdout.log").write_text("\x1b[2Jcleared? é\n")
    assert printed(home, "logs", "toy") == "\x1b[2Jcleared? é\n"
    assert on_terminal(home, "logs", "toy") == "\\x1b[2Jcleared? é\r\n"


def test_logs_follow_into_the_next_attempt_until_the_run_is_finished(home: Path) -> None:
    run = make_run(home)
    with subprocess.Popen(program("logs", "toy", "-f"), cwd=home, stdout=subprocess.PIPE, text=True) as follower:
        first = run.claim_attempt("1", "local")
        append(first.path / "stdout.log", "one\n")
        assert read_line(follower) == "one\n"
        append(first.path / "stdout.log", "two\n")
        assert read_line(follower) == "two\n"
        end(first, "preempted")
        second = run.claim_attempt("2", "local")
        append(second.path / "stdout.log", "three\n")
        assert read_line(follower) == "three\n"
        append(second.path / "stdout.log", "four\n")
        end(second, "finished")
        assert follower.communicate()[0] == "four\n"
    assert follower.returncode == 0


def test_interrupted_follow_ends_quietly_with_130(home: Path) -> None:
    attempt = make_run(home).claim_attempt("1", "local")
    write_events(attempt, "agent", (1.0, "attempt_started", {}))
    with subprocess.Popen(
        program("events", "toy", "--follow"), cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as follower:
        assert "attempt_started" in read_line(follower)
        follower.send_signal(signal.SIGINT)
        assert follower.communicate() == ("", "")
    assert follower.returncode == 130


def test_events_are_merged_in_order(home: Path) -> None:
    finished_run(home)
    lines = printed(home, "events", "toy").splitlines()
    assert [line.split()[2:5] for line in lines] == [
        ["-", "orchestrator", "submitted"],
        ["1", "agent", "attempt_started"],
        ["1", "rank0", "save_committed"],
        ["1", "agent", "attempt_ended"],
        ["2", "agent", "attempt_started"],
        ["2", "rank0", "save_committed"],
        ["2", "agent", "attempt_ended"],
    ]
    assert lines[2].endswith('step=10 why="two words"')


def test_events_of_one_attempt_as_json(home: Path) -> None:
    finished_run(home)
    records = [json.loads(line) for line in printed(home, "events", "toy", "--attempt", "2", "--json").splitlines()]
    assert {record["attempt"] for record in records} == {2}
    assert [record["writer"] for record in records] == ["agent", "rank0", "agent"]
    assert "has no attempt 3" in complaint(home, "events", "toy", "--attempt", "3")


def test_events_obey_nothing_and_survive_foreign_lines(home: Path) -> None:
    attempt = make_run(home).claim_attempt("1", "local")
    odd = {"time": "yesterday", "event": "\x1b[31m\nodd", "\x9bkey": ["\x07"]}
    (attempt.path / "events.rank0.jsonl").write_text(f'half a li\n[1]\n{json.dumps(odd)}\n{{"time": 2}}\n')
    lines = printed(home, "events", "toy").splitlines()
    assert len(lines) == 2
    assert "\\x1b[31m\\nodd" in lines[0]
    assert all(line.isprintable() for line in lines)


def test_events_follow_sees_a_writer_that_joins(home: Path) -> None:
    run = make_run(home)
    attempt = run.claim_attempt("1", "local")
    write_events(attempt, "agent", (1.0, "attempt_started", {}))
    with subprocess.Popen(program("events", "toy", "-f"), cwd=home, stdout=subprocess.PIPE, text=True) as follower:
        assert "attempt_started" in read_line(follower)
        write_events(attempt, "rank0", (2.0, "restored", {"step": 0}))
        assert "rank0" in read_line(follower)
        end(attempt, "cancelled")
        assert "attempt_ended" in follower.communicate()[0]
    assert follower.returncode == 0
