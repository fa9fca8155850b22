"""Runs that cannot be read, in whole or in part: they are told of, and keep nobody from reading the others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_parts import complaint, end, finished_run, latentwire, make_run, printed, program
from test_dashboard_app import ask
from test_simulation import configured, lived

from latentwire.dashboard.app import Dashboard
from latentwire.errors import RunError
from latentwire.run.directory import Run, create_run, list_runs, open_run
from latentwire.run.process import ProcessIdentity
from latentwire.views.fleet_page import FleetPage

PATIENCE_S = 60.0


def unreadable(home: Path, name: str) -> Path:
    """A link that leads to itself: whoever looks into it is refused, be it root."""
    path = home / "runs" / f"experiment_{name}"
    path.symlink_to(path.name)
    return path


def without_config(home: Path, name: str) -> Run:
    run = make_run(home, name)
    run.claim_attempt("1", "local")
    run.config_path.unlink()
    return run


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["metrics.jsonl", "attempt.json", "events.agent.jsonl"])
def test_a_folder_in_place_of_a_file_keeps_no_run_from_goodput(home: Path, part: str) -> None:
    finished_run(home)
    path = make_run(home, "broken").claim_attempt("1", "local").path / part
    path.unlink(missing_ok=True)
    path.mkdir()
    table = latentwire(home, "goodput")
    assert (table.returncode, [line.split()[0] for line in table.stdout.splitlines()[:2]]) == (0, ["run", "toy"])
    assert table.stderr == (
        f"latentwire: broken cannot be read: {path} is no regular file: "
        "remove it, or put the file back that belongs there\n"
    )
    assert list(json.loads(printed(home, "goodput", "--json"))["runs"]) == ["toy"]
    assert f"{path} is no regular file" in complaint(home, "goodput", "broken")


@pytest.mark.skipif(shutil.which("setpriv") is None and os.geteuid() == 0, reason="root without setpriv may read all")
def test_a_run_that_only_another_may_look_into_is_told_of(home: Path) -> None:
    finished_run(home)
    private = make_run(home, "private")
    private.claim_attempt("1", "local")
    private.path.chmod(0)
    powerless = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    for command in ("status", "goodput"):
        result = subprocess.run([*powerless, *program(command)], cwd=home, capture_output=True, text=True, check=True)
        assert "toy" in result.stdout
        assert result.stderr == (
            f"latentwire: private cannot be read: {private.config_path}: Permission denied; "
            "make it readable and writable for this user\n"
        )
    one = subprocess.run([*powerless, *program("status", "private")], cwd=home, capture_output=True, text=True)
    assert (one.returncode, "config.yaml: Permission denied" in one.stderr) == (1, True)
    private.path.chmod(0o755)


@pytest.mark.parametrize("part", ["attempts", "checkpoints"])
def test_a_run_that_has_lost_its_config_is_listed_with_the_cure(home: Path, part: str) -> None:
    run = make_run(home)
    config = run.config()
    run.config_path.unlink()
    assert list_runs(home / "runs") == [], "an empty folder is no run"
    (run.path / part).mkdir()
    assert list_runs(home / "runs") == [run]
    said = f"{run.config_path} is missing: submit the run's config again to write it anew"
    assert said in printed(home, "status")
    assert json.loads(printed(home, "status", "toy", "--json"))["reason"].startswith(said)
    assert "toy is not running" in complaint(home, "preempt", "toy")
    with pytest.raises(RunError, match="submit the run's config again"):
        open_run("toy", home / "runs").config()
    create_run(config, home / "runs")
    assert said not in printed(home, "status")


def test_runs_that_cannot_be_read_keep_no_other_from_going_on(home: Path) -> None:
    make_run(home, "sound")
    without_config(home, "lost")
    (make_run(home, "damaged").config_path).write_text("a: [")
    unreadable(home, "loop")
    command = [sys.executable, "-m", "latentwire.orchestrate", "--resume", "--dry-run"]
    result = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line for line in lines if "would go on" in line] == ["sound: PENDING at step 0, would go on"]
    assert {line.partition(":")[0] for line in lines} >= {"lost", "damaged", "loop"}


def test_runs_that_cannot_be_read_are_shown_as_such_by_the_dashboard(home: Path) -> None:
    make_run(home, "sound")
    end(without_config(home, "lost").attempts()[0], "preempted")
    path = unreadable(home, "loop")
    page = FleetPage(home / "runs")
    while (message := page.read()) and message["unfinished"]:
        pass
    rows = {row["name"]: row for row in page.snapshot()["rows"]}
    assert {name: row["state"] for name, row in rows.items()} == {
        "sound": "PENDING", "lost": "PREEMPTED", "loop": "UNREADABLE",
    }  # fmt: skip
    assert str(path) in rows["loop"]["reason"]
    assert "config.yaml is missing" in rows["lost"]["reason"]
    app = Dashboard(home / "runs", allow_actions=False).app()
    status, text = ask(app, "/api/runs/loop")
    assert (status, str(path) in text) == (409, True)
    assert 'run="sound"' in ask(app, "/metrics")[1]


# --- damaged files ----------------------------------------------------------------------------------------------------

COMMANDS = ("status", "timeline test", "goodput", "simulate test", "report test")


def _with_numbers(value: Any, number: int) -> Any:
    if isinstance(value, dict):
        return {key: _with_numbers(each, number) for key, each in value.items()}
    return number if type(value) in (int, float) else value


@pytest.mark.parametrize("number", [99_999_999_999_999, int("9" * 400), None], ids=["beyond time", "no float", "[["])
def test_a_damaged_attempt_upsets_no_command(run: Run, tmp_path: Path, number: int | None) -> None:
    configured(lived(run))
    for attempt in run.attempts():
        text = "[" * 200_000 if number is None else json.dumps(_with_numbers(attempt.record(), number))
        (attempt.path / "attempt.json").write_text(text)
    for command in COMMANDS:
        printed(tmp_path, *command.split())


def test_without_a_time_of_training_nothing_is_simulated(run: Run, tmp_path: Path) -> None:
    configured(lived(run))
    for attempt in run.attempts():
        (attempt.path / "events.rank0.jsonl").unlink()
    assert "too few to tell what a step takes" in complaint(tmp_path, "simulate", "test")


def test_an_event_with_an_endless_number_is_told(home: Path) -> None:
    attempt = make_run(home).claim_attempt("1", "local")
    line = {"time": 5.0, "event": "save_committed", "step": 3, "seconds": int("9" * 400)}
    (attempt.path / "events.rank0.jsonl").write_text(json.dumps(line) + "\n")
    assert "step 3 committed in 999" in printed(home, "timeline", "toy", "--all")


@pytest.mark.parametrize("pid", [0, -1, 2**40, "1", True])
def test_a_number_that_no_process_has_names_none(pid: Any) -> None:
    assert ProcessIdentity.from_json({"host": "here", "pid": pid, "started": 1.0}) is None


@pytest.mark.parametrize("name", ["attempt.json", "metrics.jsonl", "events.agent.jsonl", "gpu_stats.jsonl"])
def test_nobody_waits_for_a_pipe_in_place_of_a_file(home: Path, name: str) -> None:
    finished_run(home)
    path = make_run(home, "pipe").claim_attempt("1", "local").path / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    for command in ("status", "goodput", "timeline pipe", "metrics pipe", "report pipe", "diagnose pipe"):
        arguments = program(*command.split())
        result = subprocess.run(arguments, cwd=home, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert "Traceback" not in result.stderr
        assert not (result.returncode and f"{path} is no regular file" not in result.stderr), result.stderr
