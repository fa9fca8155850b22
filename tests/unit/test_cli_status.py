"""``latentwire status``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_parts import (
    Agents,
    finished_run,
    latentwire,
    make_run,
    on_terminal,
    printed,
    write_events,
)
from fleet_parts import fleet, running

from latentwire.run.journal import Journal
from latentwire.views.run_page import RunPage

_ESCAPES = re.compile("\x1b\\[[0-9;]*m")

_HEAVY = ("torch", "submitit", "transformers", "pydantic", "yaml", "rich", "typer", "click")


def test_status_imports_nothing_heavy(home: Path) -> None:
    finished_run(home)
    command = [sys.executable, "-X", "importtime", "-m", "latentwire", "status"]
    result = subprocess.run(command, cwd=home, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "latentwire" in imported
    assert imported.isdisjoint(_HEAVY)


def test_status_of_the_fleet(home: Path, agents: Agents) -> None:
    finished_run(home)
    agents(make_run(home, "alive"))
    make_run(home, "waiting")
    header, alive, toy, waiting = (line.split() for line in printed(home, "status").splitlines())
    assert header[:5] == ["run", "state", "attempt", "preempted", "step"]
    assert alive[:3] == ["alive", "RUNNING", "1"]
    assert toy[:9] == ["toy", "DONE", "2", "1", "20/20", "━━━━━━━━━━", "100", "%", "2.5"]
    assert waiting[:3] == ["waiting", "PENDING", "0"]


def test_status_of_one_run_tells_of_its_attempts(home: Path) -> None:
    finished_run(home)
    text = printed(home, "status", "toy")
    assert "20 of 20" in text
    assert [line.split()[0] for line in text.splitlines()[-2:]] == ["1", "2"]
    assert "preempted" in text
    assert "finished" in text


def test_of_a_lost_attempt_its_last_step_is_known(home: Path) -> None:
    run = make_run(home)
    lost = run.claim_attempt("1", "local")
    journal = Journal(lost.metrics_path, clock=lambda: lost.record()["claimed"] + 50)
    journal.record(step=86, loss=1.0, step_s=0.5)
    journal.close()
    run.claim_attempt("2", "local")
    row = printed(home, "status", "toy").splitlines()[-2]
    assert re.match(r"1 .* 50 s +lost +86 ", row), row


def test_where_an_orchestrator_is_missing_its_command_is_told(home: Path) -> None:
    fleet(home)
    assert "orchestrator  none: python -m latentwire.orchestrate --resume lost\n" in printed(home, "status", "lost")
    assert "orchestrator  none\n" in printed(home, "status", "done")


def test_an_absurd_time_upsets_no_command(home: Path) -> None:
    run = finished_run(home)
    write_events(run.attempts()[0], "agent", (1e18, "attempt_started", {}))
    for command in ("timeline", "events", "goodput", "status"):
        assert printed(home, command, "toy")


def test_status_as_json(home: Path) -> None:
    finished_run(home)
    make_run(home, "waiting")
    fleet = json.loads(printed(home, "status", "--json"))
    assert [each["state"] for each in fleet] == ["DONE", "PENDING"]
    one = json.loads(printed(home, "status", "toy", "--json"))
    assert one == fleet[0]


def test_status_without_runs(home: Path) -> None:
    assert printed(home, "status") == f"no runs in {home / 'runs'}\n"
    assert json.loads(printed(home, "status", "--json", "--runs-dir", "elsewhere")) == []


def test_status_takes_another_runs_folder_and_a_path(home: Path) -> None:
    run = finished_run(home)
    os.rename(home / "runs", home / "others")
    assert "toy" in printed(home, "status", "--runs-dir", "others")
    assert "DONE" in printed(home, "status", f"others/{run.path.name}")


def test_status_obeys_nothing_and_cuts_what_is_long(home: Path) -> None:
    attempt = make_run(home).claim_attempt("1", "local")
    ended = {"outcome": "failed", "error": "\x1b]0;owned\x07\nand more" + 90 * "!"}
    write_events(attempt, "agent", (1.0, "attempt_ended", ended))
    assert "\\x1b]0;owned\\x07\\nand more!" in printed(home, "status").splitlines()[1]
    shown = on_terminal(home, "status")
    assert "\x1b]" not in shown
    assert shown.splitlines()[-1].startswith("toy: \\x1b]0;owned")
    assert shown.splitlines()[-1].endswith("!…")


@pytest.mark.parametrize(
    ("width", "header"),
    [
        (60, ["run", "state", "step", "verified", "goodput"]),
        (80, ["run", "state", "attempt", "step", "ETA", "verified", "goodput"]),
        (140, ["run", "state", "attempt", "preempted", "step", "loss", "ETA", "verified", "goodput", "GPU", "note"]),
        (None, ["run", "state", "attempt", "preempted", "step", "progress", "loss", "samples/s", "ETA", "verified",
                "goodput", "GPU", "note"]),
    ],
)  # fmt: skip
def test_the_columns_that_matter_most_fit(home: Path, width: int | None, header: list[str]) -> None:
    fleet(home)
    text = printed(home, "status") if width is None else on_terminal(home, "status", columns=width)
    lines = _ESCAPES.sub("", text).splitlines()
    assert lines[0].split() == header
    assert max(map(len, lines)) <= (width or 1000)
    states = {line.split()[0]: line.split()[1] for line in lines[1:13]}
    assert sorted(states.values()) == sorted(
        ["CANCELLED", "DONE", "FAILED", "LOST", "PENDING", "PREEMPTED", "REQUEUED", "RETRYING", "RUNNING", "RUNNING",
         "STALLED", "STOPPED"]
    )  # fmt: skip
    assert "given-up: unexpected error 3 times, 2 allowed: ValueError" in lines or "note" in header


def test_gpus_of_a_running_run_are_drawn(home: Path) -> None:
    running(home)
    run = printed(home, "status").splitlines()[1]
    assert "▂▂▃▃▃▄▄▄" in run, "the mean of a GPU that is ever busier and an idle one"
    assert "▂▂▃▃▃▄▄▄ 48 % busy" in printed(home, "status", "running")


def test_a_run_that_cannot_be_read_hides_no_other(home: Path) -> None:
    finished_run(home)
    broken = make_run(home, "broken")
    (broken.path / "attempts").symlink_to("attempts")  # a loop: listing it fails
    result = latentwire(home, "status")
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["run", "toy"]
    assert "broken cannot be read" in result.stderr
    assert [each["name"] for each in json.loads(printed(home, "status", "--json"))] == ["toy"]


def test_a_cause_is_told_in_words_to_people_and_by_its_key_to_programs(home: Path) -> None:
    run = make_run(home)
    for _ in range(2):
        attempt = run.claim_attempt("1", "local")
        write_events(
            attempt, "agent", (attempt.claimed() + 1, "attempt_ended", {"outcome": "failed", "cause": "other"})
        )
    for command in ("status toy", "timeline toy"):
        assert "failed (unexpected error)" in printed(home, *command.split()), command
    assert "unexpected error" in printed(home, "goodput")
    assert "other" in json.loads(printed(home, "goodput", "--json"))["total"]["lost"]
    page = RunPage(run).read()
    assert [attempt["cause"] for attempt in page["attempts"]] == ["unexpected error"] * 2
    assert page["goodput"]["lost"][0][0] == "unexpected error"
