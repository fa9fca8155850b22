"""The page for Prometheus, read by its own client's parser."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from run_parts import NOW, config, tell

from latentwire.run.atomic import write_json
from latentwire.run.directory import Run, create_run
from latentwire.run.journal import Journal
from latentwire.run.prometheus import Scrape, exposition

Labels = dict[str, str]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create_run(config(), tmp_path)


def parsed(*scrapes: Scrape) -> dict[str, list[tuple[Labels, float]]]:
    """Every sample of a page by its name."""
    found: dict[str, list[tuple[Labels, float]]] = {}
    for family in text_string_to_metric_families(exposition(scrapes, NOW + 30)):
        assert family.documentation
        assert family.type in ("gauge", "counter")
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def test_a_run_that_trains(run: Run) -> None:
    attempt = run.claim_attempt("1", "local")
    tell(attempt, "agent", "attempt_started", total_steps=100)
    tell(attempt, "rank0", "save_committed", step=8)
    tell(attempt, "rank0", "save_verified", step=8)
    metrics = Journal(attempt.metrics_path, clock=lambda: NOW)
    metrics.record(step=9, loss=2.5, samples_per_s=64.0, step_s=0.5, grad_norm=math.inf, **{"loss/llama": math.nan})
    metrics.record(step=9, **{"eval/loss": 2.25})
    metrics.close()
    gpu = {"uuid": "GPU-1", "utilisation_percent": 87, "memory_used_bytes": 2**34, "power_w": None}
    for name in ("gpu_stats.jsonl", "gpu_stats.node1.jsonl"):
        stats = Journal(attempt.path / name, clock=lambda: NOW)
        stats.record(host={}, gpus=[{"index": 0, **gpu}, {"index": 1, **gpu}, "foreign"])
        stats.close()
    page = parsed(Scrape.of(run, NOW))
    name = {"run": "test"}
    assert page["latentwire_run_state"] == [(name | {"state": "RUNNING"}, 1)]
    expected = {"step": 9, "target_step": 100, "committed_step": 8, "loss": 2.5, "samples_per_second": 64}
    expected |= {"eta_seconds": 45.5, "checkpoint_age_seconds": 30, "preemptions_total": 0, "attempt": 1}
    for key, value in expected.items():
        assert page[f"latentwire_{key}"] == [(name, value)], key
    figures = {labels["name"]: value for labels, value in page["latentwire_metric"]}
    assert (figures["grad_norm"], figures["eval/loss"]) == (math.inf, 2.25)
    assert math.isnan(figures["loss/llama"])
    usage = {(g["node"], g["gpu"]): value for g, value in page["latentwire_gpu_utilisation_ratio"]}
    assert usage == {(node, gpu): 0.87 for node in ("node0", "node1") for gpu in ("0", "1")}
    assert "latentwire_gpu_power_watts" not in page


def test_several_runs_stand_in_one_family(tmp_path: Path) -> None:
    scrapes = [Scrape.of(create_run(config(name), tmp_path), NOW) for name in ("a", "b")]
    assert [(labels["run"], step) for labels, step in parsed(*scrapes)["latentwire_step"]] == [("a", 0), ("b", 0)]
    assert exposition([]) == ""


def test_text_from_files_cannot_break_the_page(run: Run) -> None:
    evil = 'a"} 1\nlatentwire_step{run="b"} 7\\'
    scrape = Scrape.of(run, NOW)
    scrape = dataclasses.replace(scrape, metrics={evil: 1.0, "words": "no number", "list": [1], "flag": True})
    page = parsed(scrape)
    assert page["latentwire_metric"] == [({"run": "test", "name": evil}, 1.0)]
    assert page["latentwire_step"] == [({"run": "test"}, 0)]


def test_foreign_files_do_not_upset_it(run: Run) -> None:
    attempt = run.claim_attempt("1", "local")
    write_json(attempt.path / "gpu_stats.jsonl", {"gpus": 7})
    attempt.metrics_path.write_text('{"step": {}, "loss": [1], "eval/loss": null}\n{"step": 3, "lo')
    assert "latentwire_loss" not in parsed(Scrape.of(run, NOW))
