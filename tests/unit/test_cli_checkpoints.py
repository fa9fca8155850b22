"""``latentwire checkpoints``."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_parts import (
    complaint,
    latentwire,
    make_run,
    printed,
    save,
)

from latentwire.run.atomic import read_json


def test_checkpoints_ls(home: Path) -> None:
    run = make_run(home)
    assert printed(home, "checkpoints", "ls", "toy") == "toy has no checkpoint yet\n"
    save(run, 10, 20)
    (run.checkpoints / "step-00000020" / "manifest.json").write_text("{}")
    (run.checkpoints / "quarantine" / "step-00000005.attempt-0001-1").mkdir(parents=True)
    _, first, second, quarantined = printed(home, "checkpoints", "ls", "toy").splitlines()
    assert first.split()[:2] == ["step-00000010", "verified"]
    assert first.endswith("eval/loss=1.25")
    assert second.split()[:2] == ["step-00000020", "BAD"]
    assert quarantined.endswith("step-00000005.attempt-0001-1")


def test_checkpoints_verify_names_the_file_and_changes_nothing(home: Path) -> None:
    run = make_run(home)
    save(run, 10, 20)
    assert len(printed(home, "checkpoints", "verify", "toy").splitlines()) == 2
    bad = run.checkpoints / "step-00000020" / "model.safetensors"
    data = bytearray(bad.read_bytes())
    data[-1] ^= 1
    bad.write_bytes(data)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    result = latentwire(home, "checkpoints", "verify", "toy")
    assert result.returncode == 1
    assert result.stdout.startswith("step-00000010: ")
    assert result.stderr.startswith(f"latentwire: {bad} has SHA-256")
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before
    assert "step-00000010" in printed(home, "checkpoints", "verify", "toy", "10")
    assert "has no checkpoint of step 7; it has: 10, 20" in complaint(home, "checkpoints", "verify", "toy", "7")


def test_checkpoints_inspect_counts_the_tensors(home: Path) -> None:
    run = make_run(home)
    assert "has no checkpoint yet" in complaint(home, "checkpoints", "inspect", "toy")
    save(run, 10, 20)
    text = printed(home, "checkpoints", "inspect", "toy")
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert rows["step"] == ["20"]
    assert rows["identity.config"] == ["ab"]
    assert rows["model"][:3] == ["2", "2", "F32"]
    assert rows["optimizer"][:3] == ["1", "1", "I64"]
    manifest = read_json(run.checkpoints / "step-00000020" / "manifest.json")
    assert rows["model"][-1] == manifest["files"]["model.safetensors"]["sha256"]
    assert "10" in printed(home, "checkpoints", "inspect", "toy", "10").splitlines()[0]


@pytest.mark.parametrize("damage", ["truncated", "emptied", "removed", "linked"])
def test_checkpoints_inspect_of_a_damaged_file_is_one_line(home: Path, damage: str) -> None:
    run = make_run(home)
    save(run, 10)
    path = run.checkpoints / "step-00000010" / "model.safetensors"
    data = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(data[:-1])
    elif damage == "emptied":
        path.touch()
    elif damage == "linked":
        path.symlink_to("optimizer.safetensors")
    said = complaint(home, "checkpoints", "inspect", "toy")
    assert said.startswith("latentwire: ")
    assert "model.safetensors" in said
