"""``latentwire status``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from cli_parts import (
    Agents,
    finished_run,
    make_run,
    on_terminal,
    printed,
    write_events,
)

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
    assert toy[:6] == ["toy", "DONE", "2", "1", "20/20", "2.5"]
    assert waiting[:3] == ["waiting", "PENDING", "0"]


def test_status_of_one_run_tells_of_its_attempts(home: Path) -> None:
    finished_run(home)
    text = printed(home, "status", "toy")
    assert "20 of 20" in text
    assert [line.split()[0] for line in text.splitlines()[-2:]] == ["1", "2"]
    assert "preempted" in text
    assert "finished" in text


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


def test_status_obeys_nothing_and_is_cut_on_a_terminal(home: Path) -> None:
    attempt = make_run(home).claim_attempt("1", "local")
    ended = {"outcome": "failed", "error": "\x1b]0;owned\x07\nand more"}
    write_events(attempt, "agent", (1.0, "attempt_ended", ended))
    assert printed(home, "status").splitlines()[1].endswith("\\x1b]0;owned\\x07\\nand more")
    header, line = on_terminal(home, "status").splitlines()
    assert len(header) == 80
    assert line.removeprefix("\x1b[31m").removesuffix("\x1b[0m").endswith("…")
    assert "\x1b]" not in line
