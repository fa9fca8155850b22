"""The drill passes for a workload that keeps the law, and fails for one that breaks it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import BIN, INT, OFTEN_SAVED, SLOW_ENOUGH, make_run, write_config

from latentwire.checklist import drill
from latentwire.checklist.disturb import DISTURBANCES
from latentwire.checklist.result import Result, other_hardware, table
from latentwire.run.atomic import write_json


@pytest.fixture(scope="module", autouse=True)
def drill_program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """``latentwire drill --json`` of the toy, begun before the first test of this file: it takes a minute."""
    folder = tmp_path_factory.mktemp("drill")
    # a network and pauses large enough for every window to be hit, and steps enough for windows that were missed
    workload = {"options": {"width": 1000, "pause_s": 0.02}}
    train = {"steps": 120, "global_batch": 8, "eval_every": 8, "warmup_batches": 40}
    config = write_config(folder, "toy-drill", workload=workload, train=train, checkpoint=OFTEN_SAVED)
    process = subprocess.Popen(
        [BIN / "latentwire", "drill", "--json", "--config", config, "--runs-dir", "runs"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    if process.poll() is None:
        process.send_signal(INT)  # it ends what it started
    process.communicate()


@pytest.mark.slow
def test_a_workload_that_depends_on_the_attempt_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"depends_on_attempt": True, **SLOW_ENOUGH["workload"]["options"]}
    config = write_config(tmp_path, "toy-drill", workload={"options": options}, checkpoint=OFTEN_SAVED)
    one = [disturbance for disturbance in DISTURBANCES if disturbance.name == "TERM in training"]
    assert drill.main(config, tmp_path / "runs", as_json=False, keep=False, disturbances=one) == 1
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
    assert [row["name"] for row in result["rows"]] == [disturbance.name for disturbance in DISTURBANCES]
    assert all(row["hit"] and row["recovered"] and row["passed"] for row in result["rows"])
    assert all(row["steps_lost"] <= row["may_lose"] for row in result["rows"])
    assert set(result["undisturbed"]) == {"model", "optimizer", "ema", "random"}
    assert result["undisturbed"] == result["disturbed"]
    assert result["attempts"] > len(DISTURBANCES)
    assert "the runs are in" not in errors, "what went well is cleaned up"


def test_a_difference_between_two_kinds_of_chip_is_explained_and_fails(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name) for name in ("undisturbed", "disturbed")]
    for run, model in ((runs[0], "old"), (runs[1], "old"), (runs[1], "new")):
        attempt = run.claim_attempt("7", "slurm")
        environment = {"gpus": [], "cpu_model": model, "versions": {}, "host": "n1"}
        write_json(attempt.path / "environment.json", environment)
    met = other_hardware(*runs)
    assert met == ("attempt 2 of the disturbed run, on n1: cpu_model: old -> new",)
    other = Result(
        (), {"model": "1"}, {"model": "2"}, undisturbed_attempts=1, attempts=2, other_hardware=met, seconds=1
    )
    assert not other.passed
    assert "says nothing: run the drill on one kind" in table(other)
    assert met[0] in table(other)
