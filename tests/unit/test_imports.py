"""What an import may cost, and the public names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "torch", "transformers", "submitit", "pynvml", "numpy", "datasets", "accelerate", "fsspec", "s3fs", "tensorboard",
}  # fmt: skip


def modules_after(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after a statement, and all of ours."""
    program = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    return set(json.loads(out.splitlines()[-1]))


@pytest.mark.parametrize(
    "module",
    ["latentwire", "latentwire.run.status", "latentwire.config", "latentwire.preemption.handler",
     "latentwire.checkpoint.manager", "latentwire.checkpoint.mirror", "latentwire.train.agent",
     "latentwire.monitor", "latentwire.monitor.gpu", "latentwire.run.curve",
     "latentwire.run.prometheus", "latentwire.cli.metrics", "latentwire.workloads.jsonl",
     "latentwire.elastic.planner", "latentwire.workloads.pair.footprint", "latentwire.errors"],
)  # fmt: skip
def test_rooms_without_torch_load_none_of_the_heavy_packages(module: str) -> None:
    assert modules_after(f"import {module}") & HEAVY == set()


@pytest.mark.parametrize("module", ["latentwire", "latentwire.run.status", "latentwire.cli.main"])
def test_status_needs_neither_pydantic_nor_yaml(module: str) -> None:
    assert modules_after(f"import {module}") & {"pydantic", "yaml", "stamina", "typer", "rich"} == set()


def test_a_config_of_the_pair_is_checked_without_torch() -> None:
    tree = {"name": "a", "workload": {"target": "latentwire.workloads.pair:PairWorkload", "options": PAIR}}
    statement = f"from latentwire.config import parse_config; parse_config({tree!r}, 'here')"
    assert modules_after(statement) & HEAVY == set()


def test_a_plan_of_the_pair_is_made_without_torch() -> None:
    config = Path(__file__).parents[2] / "configs" / "pair_llama31_8b_qwen25_7b.yaml"
    arguments = ["latentwire", "plan", str(config), "--gpus", "4xH100-80GB"]
    statement = (
        f"import contextlib, sys; sys.argv = {arguments!r}\n"
        "from latentwire.cli.main import main\n"
        "with contextlib.suppress(SystemExit): main()"
    )
    loaded = modules_after(statement)
    assert loaded & HEAVY == set()
    assert {"latentwire.elastic.planner", "latentwire.workloads.pair.footprint"} <= loaded


PAIR = {
    "llama": {"init": "random", "shape": "tiny"},
    "qwen": {"init": "random", "shape": "tiny"},
    "data": {"kind": "pydoc"},
}


def test_importing_the_package_loads_nothing_else_of_it() -> None:
    assert {m for m in modules_after("import latentwire") if m.startswith("latentwire")} == {"latentwire"}


def test_the_public_names_are_those_that_are_documented() -> None:
    import latentwire

    documented = {
        "CheckpointManager", "Config", "GPUMonitor", "JsonlShards", "Preempted", "PreemptionHandler", "Session",
        "ShardedSource", "Workload", "__version__", "load_config",
    }  # fmt: skip
    assert set(latentwire.__all__) == documented
    assert set(dir(latentwire)) == documented


def test_each_public_name_resolves() -> None:
    program = "import latentwire\nfor name in latentwire.__all__: print(name, getattr(latentwire, name).__class__)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert len(out.splitlines()) == 11


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    import latentwire

    with pytest.raises(AttributeError, match="has no 'Sesion'; it has: CheckpointManager, Config"):
        _ = latentwire.Sesion


@pytest.mark.parametrize("module", ["latentwire.config", "latentwire.checkpoint.manager", "latentwire.train.agent"])
def test_importing_starts_nothing_and_binds_no_signal(module: str) -> None:
    program = (
        "import signal, threading\n"
        "before = [signal.getsignal(s) for s in signal.valid_signals()]\n"
        f"import {module}\n"
        "assert [signal.getsignal(s) for s in signal.valid_signals()] == before\n"
        "assert threading.active_count() == 1\n"
    )
    left = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (left.returncode, left.stdout, left.stderr) == (0, "", "")
