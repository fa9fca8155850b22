"""``latentwire timeline``."""

from __future__ import annotations

import itertools
import json
import re
import time
from pathlib import Path

import pytest
from cli_parts import append, complaint, latentwire, make_run, on_terminal, printed, write_events
from fleet_parts import claim_at, running, train


def told(home: Path, *arguments: str) -> list[str]:
    """The lines without the time of day: how long, of which attempt, what."""
    lines = printed(home, "timeline", *arguments).splitlines()
    assert lines[0].split() == ["when", "took", "attempt", "what"]
    return [re.sub(r"^.*\d\d:\d\d:\d\d\s+", "", line) for line in lines[1:]]


def test_the_course_of_a_run(home: Path) -> None:
    running(home)
    lines = [re.sub(" +", " ", line) for line in told(home, "running")]
    assert lines[:12] == [
        "10 s - queued first start",
        "- submitted as job 4711 (slurm)",
        "2.0 s 1 starting attempt started (job 4711)",
        "3.0 s 1 loading",
        "1 placed on cuda:0 | cuda:1: two GPUs",
        "2.0 s 1 restoring starts at step 0",
        "3.0 s 1 starting",
        "3 min 1 training step 0 to 200, 10 saves in 1.8 s",
        "2.0 s 1 draining notice: SIGTERM",
        "1 step 200 committed in 0.4 s",
        "1 attempt ended: preempted at step 200",
        "18 s - queued preempted",
    ]
    assert lines[-2] == "20 s 3 redoing step 280 to 300, 1 save in 0.2 s"
    assert re.fullmatch("1 min 3 training step 300 to 400, 5 saves in 1 s, so far", lines[-1])


def test_stretches_fill_the_wall_clock_and_all_tells_each_save(home: Path) -> None:
    running(home)
    course, whole = (
        [json.loads(line) for line in printed(home, "timeline", "running", "--json", *more).splitlines()]
        for more in ([], ["--all"])
    )
    for entries in (course, whole):
        stretches = [entry for entry in entries if entry["seconds"] is not None]
        for before, after in itertools.pairwise(stretches):
            assert before["time"] + before["seconds"] == pytest.approx(after["time"], abs=0.002)
    assert [e["kind"] for e in course].count("save_committed") == 1, "that after the notice"
    assert [e["kind"] for e in whole].count("save_committed") == 21


def test_a_forecast_is_told_where_a_notice_would_not_fit(home: Path) -> None:
    run = running(home)
    assert "notice fits" not in printed(home, "timeline", "running")
    assert "notice fits" in printed(home, "timeline", "running", "--all")
    short = {"warning": "a notice saves nothing", "advice": "save sooner"}
    write_events(run.attempts()[-1], "rank0", (time.time(), "forecast", short))
    assert "WARNING a notice saves nothing. To change it: save sooner" in printed(home, "timeline", "running")


def test_ten_thousand_saves_are_one_line(home: Path) -> None:
    attempt = make_run(home).claim_attempt("1", "local")
    begin = time.time() - 20_000
    claim_at(attempt, begin)
    train(attempt, begin, 0, 10_000, total=20_000, save_every=1)
    lines = told(home, "toy")
    assert len(lines) < 10
    assert "step 0 to 10000, 10000 saves in" in lines[-1]


def test_it_obeys_nothing_and_is_upset_by_nothing(home: Path) -> None:
    attempt = make_run(home).claim_attempt("1", "local")
    write_events(attempt, "agent", (time.time(), "attempt_started", {"job_id": "\x1b]0;owned\x07"}))
    for name in ("events.agent.jsonl", "events.rank0.jsonl", "metrics.jsonl"):
        append(
            attempt.path / name, '{"time": "NaN", "event": "restored", "step": [], "seconds": {}}\n[1]\n{"time": 3, "ev'
        )
    (attempt.path / "placement.json").write_text('{"devices": 5}')
    shown = on_terminal(home, "timeline", "toy")
    assert "\x1b]" not in shown
    assert "\\x1b]0;own" in shown
    assert max(map(len, re.sub("\x1b\\[[0-9;]*m", "", shown).splitlines())) <= 80


def test_without_an_attempt_or_a_run(home: Path) -> None:
    make_run(home)
    result = latentwire(home, "timeline", "toy")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "toy has not been started yet\n")
    assert "there is no run 'else'" in complaint(home, "timeline", "else")
