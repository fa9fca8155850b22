"""``latentwire plan``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_parts import complaint, latentwire, printed

CONFIGS = Path(__file__).parents[2] / "configs"
PAIR = "configs/pair_llama31_8b_qwen25_7b.yaml"


@pytest.fixture
def home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With the repository's configs, and no model in the hub's cache."""
    shutil.copytree(CONFIGS, home / "configs")
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "hub"))
    return home


def rows(text: str) -> list[str]:
    table, _, _ = text.partition("\n4 of 4 GPUs")
    return [line for line in table.splitlines()[1:] if line.strip()]


def test_it_shows_all_ways_and_marks_the_one_that_is_taken(home: Path) -> None:
    text = printed(home, "plan", PAIR, "train.micro_batch=8", "--gpus", "4xH100-80GB")
    assert text.split()[:6] == ["GPUs", "layout", "micro-batch", "at", "once", "checkpointing"]
    assert len(rows(text)) == 8
    (chosen,) = [row for row in rows(text) if row.startswith(">")]
    assert "4 whole replicas" in chosen
    assert "8 x 8" in chosen
    assert "times slower" in rows(text)[0]
    assert "\n4 of 4 GPUs: 4 whole replicas\nexpected " in text
    assert "llama: meta-llama/Meta-Llama-3.1-8B-Instruct is not on this machine" in text


def test_overrides_and_nodes(home: Path) -> None:
    text = printed(
        home, "plan", PAIR, "elastic.gpus_per_replica=2", "train.micro_batch=4", "--gpus", "2xA100-40GB", "--nodes", "2"
    )
    assert "\n4 of 4 GPUs, 2 nodes: 2 replicas, llama 0 | qwen 1\n" in text


def test_json_holds_the_placement_and_all_candidates(home: Path) -> None:
    tree = json.loads(printed(home, "plan", PAIR, "train.micro_batch=4", "--gpus", "2xA100-40GB", "--json"))
    assert tree["placement"]["devices"] == [["cuda:0", "cuda:1"]]
    assert tree["placement"]["why"] == tree["why"]
    assert [(each["layout"], each["fits"]) for each in tree["candidates"]] == [
        ("1 whole replica", False),
        ("2 whole replicas", False),
        ("1 replica, llama 0 | qwen 1", True),
    ]
    assert [each["chosen"] for each in tree["candidates"]] == [False, False, True]


def test_where_nothing_fits_the_table_stands_before_the_error(home: Path) -> None:
    result = latentwire(home, "plan", PAIR, "--gpus", "1xL4-24GB")
    assert result.returncode == 1
    assert "GB too much on GPU 0" in result.stdout
    assert "the workload does not fit" in result.stderr
    assert "What helps: " in result.stderr
    as_json = latentwire(home, "plan", PAIR, "--gpus", "1xL4-24GB", "--json")
    assert (as_json.returncode, json.loads(as_json.stdout)["placement"]) == (1, None)


def test_without_gpus_it_is_the_cpu(home: Path) -> None:
    text = printed(home, "plan", "configs/quickstart.yaml", "--gpus", "0")
    assert "CPU" in text
    assert "no GPU: 1 on the CPU" in text


def test_this_machine_has_a_plan_too(home: Path) -> None:
    assert printed(home, "plan", "configs/quickstart.yaml")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["configs/fleet.yaml"], "is a fleet of several runs: python -m latentwire.orchestrate --config"),
        ([PAIR, "--gpus", "four"], "'four' is not of the form 4xH100-80GB"),
        ([PAIR, "train.stepz=7", "--gpus", "0"], "did you mean train.steps"),
        ([PAIR, "elastic.num_ranks=3", "--gpus", "2xH100-80GB"], "elastic.num_ranks is 3, and the job sees 2 GPUs"),
    ],
)
def test_mistakes_are_explained(home: Path, words: list[str], said: str) -> None:
    assert said in complaint(home, "plan", *words)
