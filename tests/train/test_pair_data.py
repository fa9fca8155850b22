"""What the pair reads: its options, the shipped configs, and data in every format. Imports no torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from latentwire.config import load_config
from latentwire.errors import ConfigError, WorkloadError
from latentwire.workloads.pair import Options
from latentwire.workloads.pair.data import load_pairs
from latentwire.workloads.pair.options import DataOptions

CONFIGS = Path(__file__).parents[2] / "configs"
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": "The wire has 32 latents. " * 9,
                    "qas": [
                        {"question": "How many latents?", "answers": [{"text": "32"}]},
                        {"question": "How heavy is it?", "answers": []},
                    ],
                }
            ]
        }
    ]
}


def data_options(**fields: Any) -> DataOptions:
    return DataOptions(**{"eval_size": 0, **fields})


def test_squad_keeps_the_question_when_the_context_is_cut(tmp_path: Path) -> None:
    file = tmp_path / "squad.json"
    file.write_text(json.dumps(SQUAD))
    data = load_pairs(data_options(kind="squad", path=str(file), max_source_bytes=50))
    assert [pair.target for pair in data.train] == ["32"]
    assert len(data.train[0].source) == 50
    assert data.train[0].source.startswith(b"The wire has 32")
    assert data.train[0].source.endswith(b"\nHow many latents?")


def test_jsonl_splits_the_same_way_every_time(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [
        json.dumps({"source": f"source {i} é\u2028", "target": f"target {i}"}, ensure_ascii=False) for i in range(20)
    ]
    file.write_text("\n".join(rows) + "\n\n", encoding="utf-8")
    options = data_options(kind="jsonl", path=str(file), eval_size=5, train_size=12)
    data = load_pairs(options)
    assert (len(data.train), len(data.eval)) == (12, 5)
    assert not set(data.train) & set(data.eval)
    assert load_pairs(options) == data
    file.write_text("\n".join(rows).replace("target 3", "target three"), encoding="utf-8")
    assert load_pairs(options).digest != data.digest


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("jsonl", '{"source": "a", "target": "b"}\n{"source": "a"}\n', "line 2: must be"),
        ("jsonl", '{"source": "a", "target": ""}', "line 1: must be"),
        ("jsonl", '{"source": "a", "target": "b"}\n\n{oops', "line 3: not JSON"),
        ("jsonl", "", "has 0 pairs"),
        ("squad", "{\n oops", "line 2: not JSON"),
        ("squad", "[]", "the file must have 'data', a list"),
        (
            "squad",
            json.dumps({"data": [{"paragraphs": [{"qas": []}]}]}),
            r"data\[0\].paragraphs\[0\] must have 'context'",
        ),
    ],
)
def test_malformed_data_names_the_place(tmp_path: Path, kind: str, text: str, message: str) -> None:
    file = tmp_path / "data"
    file.write_text(text)
    with pytest.raises(WorkloadError, match=message) as caught:
        load_pairs(data_options(kind=kind, path=str(file)))
    assert str(file) in str(caught.value)


def test_missing_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorkloadError, match=r"there is no file .*absent.json"):
        load_pairs(data_options(kind="squad", path=str(tmp_path / "absent.json")))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(WorkloadError, match="pip install datasets"):
        load_pairs(data_options(kind="datasets", name="rajpurkar/squad"))
    with pytest.raises(WorkloadError, match="nothing is left to train on"):
        load_pairs(data_options(kind="pydoc", eval_size=10**6))


def test_pydoc_is_split_by_passage() -> None:
    data = load_pairs(data_options(kind="pydoc", eval_size=64, max_source_bytes=128))
    assert len(data.train) > 1000
    assert len(data.eval) == 64
    assert not {pair.source for pair in data.train} & {pair.source for pair in data.eval}
    assert all(pair.source and pair.target and len(pair.source) <= 128 for pair in data.train)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("llama.shape=null", "needs shape"),
        ("llama.source=./folder", "loads nothing"),
        ("qwen={source: Qwen/Qwen2.5-7B-Instruct}", "must pin"),
        ("qwen={source: Qwen/Qwen2.5-7B-Instruct, revision: main}", "must pin"),
        ("qwen={source: models}", "is no hub id"),
        ("qwen={source: ./models, revision: main}", "a folder has no revision"),
        ("wire.heads=5", "multiple of heads"),
        ("data.path=x.json", "reads no file"),
        ("data.kind=squad", "needs path"),
        ("data.eval_split=test", "no named splits"),
    ],
)
def test_impossible_options_are_refused(override: str, message: str) -> None:
    clean = ["workload.options.qwen={}"] if override.startswith("qwen") else []
    with pytest.raises(ConfigError, match=message):
        load_config(CONFIGS / "quickstart.yaml", [*clean, f"workload.options.{override}"])


@pytest.mark.parametrize("name", ["quickstart", "pair_llama31_8b_qwen25_7b"])
def test_shipped_configs_are_valid(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.name == name
    Options.model_validate(config.workload.options)
