"""The drill passes for a workload that keeps the law, and fails for one that breaks it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from running import OFTEN_SAVED, write_config

from latentwire.checklist import drill


def test_a_workload_that_depends_on_the_attempt_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"depends_on_attempt": True, "pause_s": 0.005}
    config = write_config(tmp_path, "toy-drill", workload={"options": options}, checkpoint=OFTEN_SAVED)
    one = [disturbance for disturbance in drill.DISTURBANCES if disturbance.name == "TERM in training"]
    monkeypatch.setattr(drill, "DISTURBANCES", one)
    assert drill.main(config, tmp_path / "runs", as_json=False, keep=False) == 1
    output = capsys.readouterr()
    (row,) = [line for line in output.out.splitlines() if line.startswith("TERM in training")]
    assert "FAILED" not in row, "the run itself recovered"
    (model,) = [line for line in output.out.splitlines() if line.startswith("model ")]
    assert model.endswith("DIFFERENT")
    assert "drill FAILED" in output.out
    assert "the runs are in" in output.err, "what went wrong is kept"


def test_a_law_abiding_workload_passes(drill_program: subprocess.Popen[str]) -> None:
    output, errors = drill_program.communicate()
    assert drill_program.returncode == 0, output + errors
    result = json.loads(output)
    assert result["passed"] is True
    assert [row["name"] for row in result["rows"]] == [disturbance.name for disturbance in drill.DISTURBANCES]
    assert all(row["hit"] and row["recovered"] and row["passed"] for row in result["rows"])
    assert all(row["steps_lost"] <= row["may_lose"] for row in result["rows"])
    assert set(result["undisturbed"]) == {"model", "optimizer", "ema", "random"}
    assert result["undisturbed"] == result["disturbed"]
    assert result["attempts"] > len(drill.DISTURBANCES)
    assert "the runs are in" not in errors, "what went well is cleaned up"
