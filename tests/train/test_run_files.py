"""What a run leaves on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from running import NEVER, agent_of, hold, make_run, run_agent, trained_steps, wait_for

from latentwire import Session
from latentwire.checkpoint import reader
from latentwire.monitor import read_stats
from latentwire.run.atomic import write_json
from latentwire.run.curve import merged_metrics
from latentwire.run.directory import Run
from latentwire.run.journal import read_journal
from latentwire.run.prometheus import Scrape
from latentwire.run.rollup import summarise_metrics

STEP = 16
"""Samples of one step."""


def test_an_attempt_has_all_its_files(calm: Run) -> None:
    (attempt,) = calm.attempts()
    assert (attempt.path / "stdout.log").read_text() == "the toy is built\n"
    assert (attempt.path / "stderr.log").read_text().splitlines()[0] == "the toy complains"
    environment = json.loads((attempt.path / "environment.json").read_text())
    assert {"gpus", "cpu_model", "versions", "host", "python"} <= set(environment)
    assert environment["versions"]["torch"]
    placement = json.loads((attempt.path / "placement.json").read_text())
    assert (len(placement["devices"]), placement["micro_batch"], placement["num_micro_batches"]) == (1, 2, 8)
    stats = list(read_journal(attempt.path / "gpu_stats.jsonl"))
    assert stats[0]["event"] == "monitor_started"
    samples = [line["host"] for line in stats if "host" in line]
    assert len(samples) >= 2
    assert all(host["memory_total_bytes"] > 0 for host in samples)
    for rollup in ("metrics.json", "gpu_stats.json"):
        assert json.loads((calm.path / rollup).read_text())


def test_the_monitor_thins_what_earlier_attempts_left(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    hold(run, "step", 2)
    earlier = run.claim_attempt("0", "local")
    write_json(earlier.path / "attempt.json", {k: v for k, v in earlier.record().items() if k != "agent"})  # it is over
    samples, minutes = earlier.path / "gpu_stats.jsonl", earlier.path / "gpu_stats.thin.jsonl"
    line = json.dumps({"time": 1.0, "host": {}, "gpus": [], "padding": " " * (1 << 20)}) + "\n"
    samples.write_text(97 * line)  # more than earlier attempts may keep
    minutes.write_text('{"time": 1.0, "host": {}, "gpus": [], "seconds": 60.0, "num_samples": 60}\n')
    for part in (samples, minutes):
        os.utime(part, (0, 0))
    with agent_of(run) as agent:
        wait_for(lambda: not samples.exists(), "the samples are removed")
        hold(run, "step", NEVER)
        assert agent.outcome() == "finished"
    assert [record["num_samples"] for record in read_stats(earlier.path)] == [60]
    assert (agent.attempt.path / "gpu_stats.jsonl").exists()


def test_a_micro_batch_that_was_found_before_is_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path, overrides=("train.micro_batch=auto", "train.steps=5", "train.eval_every=null"))
    (run.path / "micro_batch.json").write_text(json.dumps({"micro_batch": 4, "attempt": 1}))
    assert run_agent(run) == "finished"
    (attempt,) = run.attempts()
    placement = json.loads((attempt.path / "placement.json").read_text())
    assert (placement["micro_batch"], placement["num_micro_batches"], placement["probe_up_to"]) == (4, 4, None)
    (placed,) = [event for event in attempt.events() if event["event"] == "placed"]
    assert (placed["micro_batch"], placed["why"]) == (4, placement["why"])


def test_every_step_has_its_line_of_metrics(calm: Run) -> None:
    (attempt,) = calm.attempts()
    steps = trained_steps(attempt)
    assert [r["step"] for r in steps] == list(range(1, calm.config().train.steps + 1))
    wanted = {"time", "step", "loss", "plane", "lr", "grad_norm", "samples_per_s", "tokens_per_s", "step_s"}
    wanted |= {"data_s", "forward_backward_s", "optimizer_s", "save_s"}
    assert all(wanted <= set(record) for record in steps)
    assert any(record["save_s"] > 0 for record in steps)
    evaluations = [r for r in read_journal(attempt.metrics_path) if "eval/loss" in r]
    assert [r["step"] for r in evaluations] == [6, 12, 18, 20]


def test_an_own_loop_that_logs_no_loss_has_steps(tmp_path: Path) -> None:
    with Session(tmp_path / "experiment_own", checkpoint={"best_metric": None}) as session:
        session.track(model=torch.nn.Linear(2, 1))
        for step in session.steps(4, evaluate=lambda: {"loss": 0.5}, evaluate_every=2):
            session.log(accuracy=step / 4)
    curve = [(r["step"], r.get("accuracy"), r.get("loss")) for r in merged_metrics(session.run)]
    assert curve == [(1, 0.0, None), (2, 0.25, None), (2, None, 0.5), (3, 0.5, None), (4, 0.75, None), (4, None, 0.5)]
    summary = summarise_metrics(session.run)
    assert (summary["first"]["step"], summary["steps"], summary["last"]["accuracy"]) == (1, 4, 0.75)
    assert summary["step_s_total"] > 0
    assert Scrape.of(session.run).metrics["accuracy"] == 0.75


def test_a_checkpoint_holds_all_states(calm: Run) -> None:
    loaded = reader.load(max(calm.checkpoints.glob("step-*")))
    assert set(loaded.tensors) == {"model", "optimizer", "ema", "random"}
    trees = loaded.values["trees"]
    assert set(trees) == {"model", "optimizer", "scheduler", "scaler", "ema", "random"}
    assert set(trees["random"]) == {"python", "numpy", "torch", "cuda"}
    assert len(trees["random"]["python"][1]) == 625
    assert len(trees["random"]["numpy"][1]) == 624
    assert trees["scheduler"]["last_epoch"] == 20
    assert loaded.values["step"] == 20
    assert loaded.values["progress"]["counters"] == {"samples": 20 * STEP, "tokens": 20 * STEP, "skipped_steps": 0}
    assert loaded.manifest.identity == {"config": calm.config().digest(), "frozen": {"nothing": "0" * 64}}
    assert "eval/loss" in loaded.manifest.metrics
    names = {path.suffix for path in loaded.path.iterdir()}
    assert names <= {".safetensors", ".json", ""}


def test_the_newest_and_the_best_checkpoints_are_kept(calm: Run) -> None:
    steps = sorted(int(path.name.removeprefix("step-")) for path in calm.checkpoints.glob("step-*"))
    assert steps == [16, 18, 20]
