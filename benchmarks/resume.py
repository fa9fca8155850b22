"""How long a killed attempt of the pair takes to train again, from a warm page cache, and where the seconds go.

``python benchmarks/resume.py [--shape tiny|full] [--folder F] [--rounds 3]`` draws both frozen models at random, saves
them as folders, trains until a checkpoint is verified, kills the attempt with SIGKILL, and starts it again, each round.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from latentwire.config import load_config
from latentwire.run.directory import Attempt, Run, create_run, is_step
from latentwire.run.journal import read_journal

TOP = Path(__file__).parents[1]
JOB = "import sys; from latentwire.scheduler.job import TrainingJob; TrainingJob(sys.argv[1])()"
PARTS = ("agent and imports", "models", "checkpoint", "warm-up", "first step", "in all")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="From a job's process to its first step, by parts.")
    parser.add_argument("--shape", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--folder", type=Path, default=Path("build/resume-benchmark"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    run = make_run(options.folder.absolute(), options.shape)
    start(run, until="save_verified")
    rounds = []
    for _ in range(options.rounds):
        warm(options.folder)
        rounds.append(start(run, until="first step"))
        print(json.dumps({part: round(seconds, 2) for part, seconds in rounds[-1].items()}), flush=True)
    print(f"\n| {' | '.join(PARTS)} |\n|{'---|' * len(PARTS)}")
    print(f"| {' | '.join(f'{median(r[part] for r in rounds):.2f}' for part in PARTS)} |")
    shutil.rmtree(options.folder)


def make_run(folder: Path, shape: str) -> Run:
    """A run of the pair whose models are folders on disk."""
    subprocess.run([sys.executable, __file__, "--draw", shape, folder], check=True)
    config = "pair_full_random" if shape == "full" else "../quickstart"
    sources = [
        word
        for name in ("llama", "qwen")
        for word in (
            f"workload.options.{name}.init=pretrained",
            f"workload.options.{name}.shape=null",
            f"workload.options.{name}.source={folder / name}",
        )
    ]
    saving = [
        "checkpoint.interval_s=null",
        "checkpoint.interval_steps=2",
        "train.steps=100000",
        "train.eval_every=null",
    ]
    return create_run(load_config(TOP / f"configs/experiments/{config}.yaml", (*sources, *saving)), folder)


def draw(shape: str, folder: Path) -> None:
    """Make both models' folders. A process of its own, so that what it holds is gone afterwards."""
    import torch

    from latentwire.workloads.base import BuildContext
    from latentwire.workloads.pair import models
    from latentwire.workloads.pair.families import FAMILIES

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    context = BuildContext(
        device=device,
        compute_dtype=torch.bfloat16,
        seed=0,
        run_path=folder / "drawn",
        gradient_checkpointing=False,
        safe_point=lambda: None,
        event=lambda name, **fields: None,
    )
    for name, family in FAMILIES.items():
        tokenizer = models._random_folder(name, shape, family, dataclasses.replace(context, device=torch.device("cpu")))
        shutil.copytree(tokenizer, folder / name)
        models._draw(family, shape, context).save_pretrained(folder / name)


def start(run: Run, until: str) -> dict[str, float]:
    """Start an attempt, kill it at that moment; the seconds of its parts."""
    number = len(run.attempts())
    started = time.time()
    process = subprocess.Popen([sys.executable, "-c", JOB, str(run.path)], stdout=sys.stderr)
    try:
        while len(run.attempts()) == number:
            look_again(process)
        attempt = run.attempts()[number]
        if until == "save_verified":
            while not [e for e in events(attempt) if e["event"] == until]:
                look_again(process)
            return {}
        while not (steps := list(filter(is_step, read_journal(attempt.metrics_path)))):
            look_again(process)
        return parts(started, events(attempt), steps[0])
    finally:
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.send_signal(signal.SIGKILL)
        process.wait()


def look_again(process: subprocess.Popen[bytes]) -> None:
    """Wait a moment for the attempt, which must be alive."""
    if process.poll() is not None:
        sys.exit(f"the job ended with {process.returncode}: see its run's attempts")
    time.sleep(0.01)


def events(attempt: Attempt) -> list[dict[str, Any]]:
    """What rank 0 wrote down."""
    return read_journal(attempt.path / "events.rank0.jsonl")


def parts(started: float, told: list[dict[str, Any]], step: dict[str, Any]) -> dict[str, float]:
    """Seconds between the marks of an attempt's journal."""
    built, restored, training = (
        next(e for e in told if e["event"] == name) for name in ("workload_built", "restored", "training_started")
    )
    assert restored["step"] > 0, "it did not resume"
    marks = [
        built["time"] - built["seconds"],
        built["time"],
        restored["time"],
        training["time"],
        step["time"],
    ]
    seconds = [end - begin for begin, end in zip([started, *marks], marks, strict=False)]
    return dict(zip(PARTS, [*seconds, step["time"] - started], strict=True))


def warm(folder: Path) -> None:
    """Read all files once."""
    for path in folder.rglob("*"):
        if path.is_file():
            subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--draw"]:
        draw(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
