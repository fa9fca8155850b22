"""The report: written by a command, and by the orchestrator whenever an attempt has ended."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from orchestrate_parts import orchestrate, toy_run
from running import make_run, write_config

from latentwire.run.status import run_status


def latentwire(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "latentwire", *words], capture_output=True, text=True, timeout=60)


def test_an_orchestrated_run_leaves_a_report_of_its_end(tmp_path: Path) -> None:
    write_config(tmp_path, "toy", train={"steps": 8})
    assert orchestrate(tmp_path, "--config", "toy.yaml").returncode == 0
    page = (toy_run(tmp_path).path / "report.html").read_text()
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert data is not None
    sections = json.loads(data[1])["sections"]
    assert (sections["status"]["state"], sections["curve"]["num_points"]) == ("DONE", 8)


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
