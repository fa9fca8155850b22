"""``latentwire checkpoints diff``, ``export`` and ``prune``, driven as a program."""

from __future__ import annotations

import array
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from checkpoint_parts import METRIC, Events, commit, open_manager
from cli_parts import latentwire as program
from cli_parts import printed
from safetensors.numpy import load_file
from test_simulation import lived

from latentwire.checkpoint.layout import Snapshot
from latentwire.checkpoint.tensor_file import HostTensor
from latentwire.config import CheckpointSection, Config, WorkloadSection, parse_config
from latentwire.errors import ConfigError
from latentwire.run.directory import Run, create_run


def tensor(dtype: str, code: str, *values: float) -> HostTensor:
    return HostTensor(dtype, (len(values),), memoryview(array.array(code, values)).cast("B"))


def bfloat(*values: float) -> HostTensor:
    """The upper halves of float32 numbers."""
    halves = [struct.unpack("<I", struct.pack("<f", value))[0] >> 16 for value in values]
    return HostTensor("BF16", (len(values),), memoryview(array.array("H", halves)).cast("B"))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that keeps one checkpoint and the best."""
    section = CheckpointSection(keep=1, best_metric=METRIC)
    return create_run(Config(name="toy", workload=WorkloadSection(target="script"), checkpoint=section), tmp_path)


def latentwire(run: Run, *arguments: str, code: int = 0) -> str:
    """What ``latentwire checkpoints`` says: on stdout if it goes well, on stderr if not."""
    command = [sys.executable, "-m", "latentwire", "checkpoints", *arguments, "--runs-dir", str(run.path.parent)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout or result.stderr


def save(run: Run, step: int, values: dict[str, object], **groups: dict[str, HostTensor]) -> None:
    manager = open_manager(run.checkpoints, keep=9)
    manager.save(Snapshot(step, groups, values))
    manager.close()


def names(run: Run) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def test_diff_tells_which_tensors_and_values_differ_and_by_how_much(run: Run) -> None:
    same = tensor("F32", "f", 1.0, 2.0)
    model = {"same": same, "moved": tensor("F32", "f", 1.0, 2.0), "half": bfloat(1.0, 2.0), "gone": same}
    save(run, 1, {"step": 1, "lr": [0.1, 0.2]}, model=model, random={"torch": tensor("U8", "B", 1, 2)})
    model = {"same": same, "moved": tensor("F32", "f", 1.5, 2.25), "half": bfloat(1.0, 4.0), "new": same}
    save(run, 2, {"step": 2, "lr": [0.1, 0.3]}, model=model, random={"torch": tensor("U8", "B", 1, 2)})
    header, *groups = latentwire(run, "diff", "toy", "1", "2", code=1).splitlines()
    assert header.split() == ["group", "equal", "different", "only", "in", "1", "only", "in", "2"]
    table = [line.split(maxsplit=2) for line in groups]
    assert table[0] == ["model", "1", "2          1          1"]
    assert table[1] == ["random", "1", "0          0          0"]
    assert sorted(table[3:]) == [
        ["model", "gone", "only in the first"],
        ["model", "half", "BF16 [2], largest difference 2"],
        ["model", "moved", "F32 [2], largest difference 0.5"],
        ["model", "new", "only in the second"],
        ["values", "lr.1", "0.2 -> 0.3"],
        ["values", "step", "1 -> 2"],
    ]
    assert len(latentwire(run, "diff", "toy", "2", "2").splitlines()) == 3


def test_export_writes_the_weights_that_it_verified(run: Run, tmp_path: Path) -> None:
    average = {"n_averaged": tensor("I64", "q", 3), "module.w": tensor("F32", "f", 7.0)}
    save(run, 1, {}, model={"w": tensor("F32", "f", 1.0), "v": tensor("F32", "f", 3.0)})
    save(run, 2, {}, model={"w": tensor("F32", "f", 2.0)}, ema=average)
    said = latentwire(run, "export", "toy", "1", "--to", str(tmp_path / "first"))
    assert said.startswith("step-00000001: 2 tensors, 8 B, verified")
    latentwire(run, "export", "toy", "--ema", "--to", str(tmp_path / "average"))
    exported = {name: load_file(tmp_path / name / "model.safetensors") for name in ("first", "average")}
    numpy.testing.assert_equal(exported, {"first": {"w": [1.0], "v": [3.0]}, "average": {"w": [7.0]}})
    assert "first exists" in latentwire(run, "export", "toy", "--to", str(tmp_path / "first"), code=1)


_WORKLOAD = """
from pathlib import Path
import pydantic
Path(__file__).with_name("was-imported").touch()
class Options(pydantic.BaseModel):
    size: int = 3
class Toy: ...
def export_config(options, shapes):
    return {"size": options["size"]}
"""


def test_commands_that_only_read_run_nobodys_code_and_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy_workload.py").write_text(_WORKLOAD)
    monkeypatch.chdir(tmp_path)
    config = {"name": "test", "workload": {"target": "toy_workload.py:Toy"}, "train": {"steps": 300}}
    run = create_run(parse_config(config, "here"), tmp_path / "runs")
    assert run.config().workload.options == {"size": 3}, "checked and completed when it was made"
    lived(run)
    save(run, 1, {}, model={"w": tensor("F32", "f", 1.0)})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "was-imported").unlink()
    for words in ("simulate test", "diagnose test", "checkpoints prune test --dry-run", "config show test"):
        for home in (tmp_path, elsewhere):
            printed(home, *words.split(), "--runs-dir", str(run.path.parent))
            assert not (tmp_path / "was-imported").exists()
    export = ("checkpoints", "export", "test", "--runs-dir", str(run.path.parent), "--to")
    result = program(elsewhere, *export, "out")
    assert (result.returncode, sorted(os.listdir(elsewhere / "out"))) == (0, ["model.safetensors"])
    assert result.stderr == (
        "latentwire: config.json is left out, which the workload writes: "
        f"workload.target: there is no file {elsewhere}/toy_workload.py\n"
    )
    printed(tmp_path, *export, "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["size"] == 3


def test_whoever_trains_a_run_has_its_options_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "another_toy.py").write_text(_WORKLOAD)
    monkeypatch.chdir(tmp_path)
    target = {"target": "another_toy.py:Toy"}
    run = create_run(parse_config({"name": "test", "workload": target}, "here"), tmp_path / "runs")
    run.config_path.write_text(run.config_path.read_text().replace("size: 3", "size: three"))
    assert run.config().workload.options == {"size": "three"}
    with pytest.raises(ConfigError, match=r"config\.yaml:\n  workload\.options\.size"):
        run.checked_config()
    with pytest.raises(ConfigError, match=r"workload\.options\.size"):
        create_run(parse_config({"name": "test", "workload": target}, "here"), tmp_path / "runs")


def test_export_of_a_corrupt_checkpoint_writes_nothing(run: Run, tmp_path: Path) -> None:
    save(run, 1, {}, model={"w": tensor("F32", "f", 1.0)})
    weights = run.checkpoints / "step-00000001" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    before = sorted(os.listdir(tmp_path))
    assert str(weights) in latentwire(run, "export", "toy", "--to", str(tmp_path / "out"), code=1)
    assert sorted(os.listdir(tmp_path)) == before


def test_prune_says_what_goes_and_keeps_the_newest_and_the_best(run: Run) -> None:
    commit(open_manager(run.checkpoints, keep=9), 1, 2, 3, 4, 5)  # the best is 2
    before = names(run)
    dry = latentwire(run, "prune", "toy", "--dry-run", "--keep", "2").splitlines()
    assert [line.split(":")[0] for line in dry[:-1]] == ["step-00000001", "step-00000003"]
    assert dry[-1].endswith("would be freed")
    assert names(run) == before
    assert latentwire(run, "prune", "toy").splitlines()[-1].endswith("were freed")
    assert names(run) == ["step-00000002", "step-00000005"]


def test_prune_leaves_a_run_alone_that_is_running(run: Run) -> None:
    commit(open_manager(run.checkpoints, keep=9, event=Events()), 1, 3)
    run.claim_attempt("1", "local")  # this very process is its agent
    assert "toy is running" in latentwire(run, "prune", "toy", code=1)
    assert names(run) == ["step-00000001", "step-00000003"]
