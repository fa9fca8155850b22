"""Fleets: many runs from one file, and what a mistake in it is answered with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from latentwire.errors import ConfigError
from latentwire.fleet import Fleet, load_fleet

SHARED = {"workload": {"target": "json:JSONDecoder"}, "train": {"steps": 500, "micro_batch": 2}}


def fleet_of(folder: Path, *overrides: str, **keys: Any) -> Fleet:
    """What a file fleet.yaml gives, whose base holds ``SHARED``."""
    (folder / "shared.yaml").write_text(yaml.safe_dump(SHARED))
    (folder / "fleet.yaml").write_text(yaml.safe_dump({"base": "shared.yaml", **keys}))
    return load_fleet(folder / "fleet.yaml", overrides)


def test_each_run_is_its_own_part_laid_over_the_rest(tmp_path: Path) -> None:
    runs = [{"name": "a"}, {"name": "b", "seed": 2, "train": {"steps": 200}}]
    fleet = fleet_of(tmp_path, seed=1, max_running=1, runs=runs)
    assert fleet.max_running == 1
    assert [(c.name, c.seed, c.train.steps, c.train.micro_batch) for c in fleet.configs] == [
        ("a", 1, 500, 2),
        ("b", 2, 200, 2),
    ]


def test_overrides_go_to_each_run_and_win(tmp_path: Path) -> None:
    runs = [{"name": "a"}, {"name": "b", "train": {"steps": 200}}]
    fleet = fleet_of(tmp_path, "train.steps=300", "scheduler.partition=preempt", runs=runs)
    assert [(c.train.steps, c.train.micro_batch) for c in fleet.configs] == [(300, 2)] * 2
    assert {c.scheduler.partition for c in fleet.configs} == {"preempt"}


def test_a_config_of_one_run_is_a_fleet_of_one(tmp_path: Path) -> None:
    fleet = fleet_of(tmp_path, "name=b", name="a")
    assert ([config.name for config in fleet.configs], fleet.max_running) == (["b"], None)


def test_a_mistake_is_told_with_the_file_the_run_and_the_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        fleet_of(tmp_path, runs=[{"name": "a"}, {"name": "b", "train": {"stepz": 3}}])
    path = tmp_path / "fleet.yaml"
    assert str(caught.value).startswith(f"{path}, runs[1] (b):\n  train.stepz: unknown key; did you mean train.steps")
    with pytest.raises(ConfigError, match=r"fleet\.yaml, runs\[0\]:\n  name: "):
        fleet_of(tmp_path, runs=[{"seed": 3}])


@pytest.mark.parametrize("runs", [[], {}, "a", 3, ["a"], [{"name": "a"}, None]])
def test_runs_are_a_list_of_parts(tmp_path: Path, runs: Any) -> None:
    with pytest.raises(ConfigError, match=r"fleet\.yaml: runs: is a list of what each run has of its own"):
        fleet_of(tmp_path, runs=runs)


@pytest.mark.parametrize("max_running", [0, -1, 1.5, "two", True])
def test_max_running_is_a_number_of_runs(tmp_path: Path, max_running: Any) -> None:
    with pytest.raises(ConfigError, match=r"fleet\.yaml: max_running is how many"):
        fleet_of(tmp_path, name="a", max_running=max_running)


@pytest.mark.parametrize("overrides", [[], ["name=c"]])
def test_two_runs_of_one_name_are_refused(tmp_path: Path, overrides: list[str]) -> None:
    fleet_of(tmp_path, runs=[{"name": "a"}, {"name": "b"}, {"name": "b" if not overrides else "d"}])
    command = [sys.executable, "-m", "latentwire.orchestrate", "--config", "fleet.yaml", *overrides]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    name = "c" if overrides else "b"
    assert (done.returncode, f"two configs have the name '{name}'" in done.stderr) == (1, True), done.stderr
    assert not (tmp_path / "runs").exists()


def test_an_override_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not of the form a\.b=value"):
        fleet_of(tmp_path, "seed", runs=[{"name": "a"}])
