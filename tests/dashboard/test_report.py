"""The report: written by a command, and when an attempt has ended by the orchestrator, or by a job that has none."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from orchestrate_parts import orchestrate, toy_run
from running import PATIENCE_S, make_run, write_config

from latentwire.run.directory import Run
from latentwire.run.status import run_status


def reported(run: Run) -> Any:
    """What is in the sections of its report."""
    page = (run.path / "report.html").read_text()
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert data is not None
    return json.loads(data[1])["sections"]


def latentwire(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "latentwire", *words], capture_output=True, text=True, timeout=PATIENCE_S
    )


def test_an_orchestrated_run_leaves_a_report_of_its_end(tmp_path: Path) -> None:
    write_config(tmp_path, "toy", train={"steps": 8})
    assert orchestrate(tmp_path, "--config", "toy.yaml").returncode == 0
    sections = reported(toy_run(tmp_path))
    assert (sections["status"]["state"], sections["curve"]["num_points"]) == ("DONE", 8)


@pytest.mark.parametrize(("fails", "code", "num_points"), [(False, 0, 8), (True, 1, 6)])
def test_a_run_without_an_orchestrator_leaves_a_report_of_its_end(
    tmp_path: Path, fails: bool, code: int, num_points: int
) -> None:
    options = {"troubles": [{"kind": "bug", "after_samples": 16 * 6}] if fails else []}
    config = write_config(tmp_path, "toy", train={"steps": 8}, workload={"options": options}, retry={"other": 0})
    ended = latentwire("run", str(config), "--runs-dir", str(tmp_path / "runs"))
    assert ended.returncode == code, ended.stdout + ended.stderr
    run = toy_run(tmp_path)
    sections = reported(run)
    assert (sections["status"]["state"], sections["curve"]["num_points"]) == (run_status(run).state, num_points)


def test_a_run_without_an_orchestrator_ends_well_where_its_report_cannot_be_written(tmp_path: Path) -> None:
    config = write_config(tmp_path, "toy", train={"steps": 8})
    (toy_run(tmp_path).path / "report.html").mkdir(parents=True)
    ended = latentwire("run", str(config), "--runs-dir", str(tmp_path / "runs"))
    assert (ended.returncode, ended.stdout.splitlines()[-1]) == (0, "toy: finished")
    assert "toy: no report was written: " in ended.stderr


def test_a_report_that_cannot_be_written_is_told_and_harms_nothing(tmp_path: Path) -> None:
    """Of a run that is given up: that, and nothing of its report, is the last word in its journal."""
    write_config(tmp_path, "toy", workload={"options": {"no_data": True}})
    run = toy_run(tmp_path)
    (run.path / "report.html").mkdir(parents=True)
    ended = orchestrate(tmp_path, "--config", "toy.yaml")
    assert "no report was written" in ended.stdout
    assert "report.html" in ended.stdout
    assert run_status(run).state == "FAILED"


def test_the_command_says_where_the_page_is_and_what_is_missing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    runs_dir = ("--runs-dir", str(tmp_path / "runs"))
    assert latentwire("report", "toy", *runs_dir).stdout.strip() == str(run.path / "report.html")
    elsewhere = tmp_path / "page.html"
    assert latentwire("report", "toy", "--to", str(elsewhere), *runs_dir).returncode == 0
    assert "not started yet" in elsewhere.read_text()
    assert "there is no run 'toys'" in latentwire("report", "toys", *runs_dir).stderr
    refused = latentwire("report", "toy", "--to", "/proc/page.html", *runs_dir)
    assert refused.returncode == 1
    assert "No such file or directory; see whether the path is right" in refused.stderr


def test_without_the_extra_both_commands_name_the_cure(tmp_path: Path) -> None:
    make_run(tmp_path)
    program = (
        "import sys\n"
        "for name in ('plotly', 'starlette'): sys.modules[name] = None\n"
        f"sys.argv = ['latentwire', *{{words}}, '--runs-dir', {str(tmp_path)!r}]\n"
        "from latentwire.cli.main import main\n"
        "main()"
    )
    for words in (["report", "toy"], ["dashboard", "--port", "0"]):
        script = program.format(words=words)
        refused = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert refused.returncode == 1
        assert "pip install 'latentwire[dashboard]'" in refused.stderr
