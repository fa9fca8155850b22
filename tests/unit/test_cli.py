"""The command line: help, wrong usage, and how it ends; configs."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from cli_parts import (
    complaint,
    make_run,
    printed,
    program,
    write_events,
)

from latentwire import __version__


def test_version(home: Path) -> None:
    assert printed(home, "--version") == f"latentwire {__version__}\n"


def test_help_names_every_command(home: Path) -> None:
    text = printed(home, "--help")
    commands = "status logs events plan config checkpoints preempt cancel drill checklist"
    for command in commands.split():
        assert f"\n  {command} " in text


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("status", "--json --runs-dir"),
        ("checkpoints", "ls verify inspect diff export prune"),
        ("plan", "--gpus --nodes --json"),
        ("drill", "--json --keep"),
        ("checklist run", "--only --write"),
    ],
)
def test_help_of_a_command_names_its_options(home: Path, command: str, options: str) -> None:
    text = printed(home, *command.split(), "--help")
    assert [option for option in options.split() if option not in text] == []


@pytest.mark.parametrize("words", ["status --bogus", "logs", "nonsense", "preempt toy --signal X"])
def test_wrong_usage_exits_with_2(home: Path, words: str) -> None:
    assert "usage:" in complaint(home, *words.split(), code=2).lower()


@pytest.mark.parametrize("command", ["status", "logs", "events", "preempt", "cancel"])
def test_unknown_run_names_those_that_there_are(home: Path, command: str) -> None:
    make_run(home, "apple")
    make_run(home, "pear")
    said = complaint(home, command, "plum")
    assert said.startswith("latentwire: there is no run 'plum'")
    assert "apple, pear" in said


def test_drill_hands_its_config_on(home: Path) -> None:
    assert "absent.yaml" in complaint(home, "drill", "--config", "absent.yaml")


def test_drill_under_slurm_says_what_it_lacks(home: Path) -> None:
    (home / "toy.yaml").write_text("name: toy\nworkload: {target: 'json:JSONDecoder'}\n")
    words = ["drill", "--config", "toy.yaml"]
    assert "give --partition P" in complaint(home, *words, "--cluster", "slurm")
    assert "add --cluster slurm" in complaint(home, *words, "--partition", "preempt")
    environ = os.environ | {"PATH": str(home)}
    command = program(*words, "--cluster", "slurm", "--partition", "preempt")
    result = subprocess.run(command, cwd=home, env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "no sbatch on PATH: log in to the cluster" in result.stderr
    assert list((home / "runs").iterdir()) == []


def test_unreadable_folder_is_one_line(home: Path) -> None:
    run = make_run(home)
    (run.path / "attempts").mkdir()
    (run.path / "attempts" / "0001").mkdir()
    (run.path / "attempts" / "0001" / "stdout.log").mkdir()
    said = complaint(home, "logs", "toy")
    assert said.startswith("latentwire: ")
    assert "stdout.log is no regular file" in said


def many_events(home: Path, number: int = 5000) -> None:
    """So many that a pipe does not hold them."""
    attempt = make_run(home).claim_attempt("1", "local")
    write_events(attempt, "rank0", *[(float(i), "save_failed", {"step": i}) for i in range(number)])


@pytest.mark.parametrize("words", ["status", "status toy", "events toy", "timeline toy", "config show toy", "--help"])
@pytest.mark.parametrize("number", [1, 5000], ids=["few events", "many events"])
def test_where_nobody_reads_it_ends_quietly(home: Path, words: str, number: int) -> None:
    many_events(home, number)
    ours, theirs = os.pipe()
    os.close(ours)
    result = subprocess.run(program(*words.split()), cwd=home, stdout=theirs, stderr=subprocess.PIPE, check=False)
    os.close(theirs)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("words", ["events toy", "events toy --json --follow", "timeline toy --all"])
def test_a_reader_that_has_enough_ends_it_as_cat(home: Path, words: str) -> None:
    many_events(home)
    (home / "large").write_bytes(bytes(1 << 20))

    def piped(command: str) -> tuple[int, bytes, int]:
        line = f"set -o pipefail; {command} | head -c 1000"
        result = subprocess.run(["bash", "-c", line], cwd=home, capture_output=True, check=False)
        return result.returncode, result.stderr, len(result.stdout)

    assert piped(shlex.join(program(*words.split()))) == piped("cat large") == (128 + signal.SIGPIPE, b"", 1000)


# ---- config ----------------------------------------------------------------------------------------------------------


def test_config_show_resolves_bases_and_overrides(home: Path) -> None:
    import yaml

    (home / "base.yaml").write_text("name: toy\nworkload: {target: 'json:JSONDecoder'}\nseed: 1\n")
    (home / "mine.yaml").write_text("base: base.yaml\nseed: 2\n")
    tree = yaml.safe_load(printed(home, "config", "show", "mine.yaml", "train.steps=777"))
    assert (tree["seed"], tree["train"]["steps"], tree["retry"]["oom"]) == (2, 777, 5)
    assert "unknown key; did you mean train.steps" in complaint(home, "config", "show", "mine.yaml", "train.stepz=7")
    assert "there is no config absent.yaml" in complaint(home, "config", "show", "absent.yaml")


def test_config_show_of_a_run(home: Path) -> None:
    run = make_run(home)
    assert printed(home, "config", "show", "toy") == (run.path / "config.yaml").read_text()
    assert "its config is fixed" in complaint(home, "config", "show", "toy", "seed=3")
    assert "nor is there a file 'absent'" in complaint(home, "config", "show", "absent")
