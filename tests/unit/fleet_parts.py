"""A fleet of runs in every state, made of journals; those that run are claimed by this process, so that they live."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from cli_parts import make_run, write_events

from latentwire.run.directory import Attempt, Run
from latentwire.run.journal import Journal

GPUS = ("GPU-aa", "GPU-bb")


def write_own(run: Run, *events: tuple[float, str, dict[str, Any]]) -> None:
    """Into the orchestrator's journal."""
    clock = iter([time for time, _, _ in events])
    journal = Journal(run.orchestrator_events, clock=lambda: next(clock))
    for _, name, fields in events:
        journal.event(name, **fields)
    journal.close()


def train(attempt: Attempt, begin: float, first: int, last: int, total: int = 1000, save_every: int = 20) -> float:
    """Events and steps of an attempt that trains from one step to another, a second a step; when it was done."""
    write_events(
        attempt,
        "agent",
        (begin, "attempt_started", {"job_id": "4711", "total_steps": total}),
        (begin + 2, "placed", {"devices": [["cuda:0"], ["cuda:1"]], "why": "two GPUs"}),
        (begin + 2, "forecast", {"needs_s": 2.5, "grace_s": 20.0}),
    )
    at = begin + 10
    events: list[tuple[float, str, dict[str, Any]]] = [
        (begin + 5, "workload_built", {"seconds": 3.0}),
        (begin + 7, "restored", {"step": first, "seconds": 2.0}),
        (at, "training_started", {"step": first, "total_steps": total}),
    ]
    metrics = Journal(attempt.metrics_path, clock=lambda: at)
    for step in range(first + 1, last + 1):
        at += 1
        metrics.record(step=step, loss=1 + 500 / (step + 100), samples_per_s=128.0, step_s=1.0)
        if step % save_every == 0:
            events.append((at, "save_staged", {"step": step, "reason": "interval", "seconds": 0.2}))
            events.append((at + 0.4, "save_committed", {"step": step, "seconds": 0.4}))
            events.append((at + 0.6, "save_verified", {"step": step, "seconds": 0.2}))
    metrics.close()
    write_events(attempt, "rank0", *events)
    return at


def preempt(attempt: Attempt, at: float, step: int) -> None:
    write_events(
        attempt,
        "agent",
        (at, "notice", {"signal": "SIGTERM"}),
        (at + 2, "attempt_ended", {"outcome": "preempted", "step": step}),
    )


def write_gpus(attempt: Attempt, until: float, num_s: int = 180) -> None:
    """What a monitor writes: two GPUs, the first ever busier, the second idle."""
    seconds = iter(range(num_s))
    journal = Journal(attempt.path / "gpu_stats.jsonl", clock=lambda: until - num_s + 1 + next(seconds))
    for second in range(num_s):
        gpus = [
            {"index": index, "uuid": uuid, "name": "NVIDIA H200", "utilisation_percent": busy, "power_w": 400.0,
             "memory_used_bytes": 61e9, "memory_total_bytes": 143e9, "temperature_c": 64}
            for index, (uuid, busy) in enumerate(zip(GPUS, (100 * second // num_s, 0), strict=True))
        ]  # fmt: skip
        journal.record(host={}, gpus=gpus)
    journal.close()


def running(home: Path, name: str = "running") -> Run:
    """Third attempt under way, at step 400 of 1000; the second was killed and lost ten steps."""
    run, now = make_run(home, name), time.time()
    write_own(run, (now - 710, "submitted", {"job_id": "4711", "scheduler": "slurm"}))
    first = run.claim_attempt("4711", "slurm")
    claim_at(first, now - 700)
    preempt(first, train(first, now - 700, 0, 200), 200)
    second = run.claim_attempt("4711", "slurm", restart=1)
    claim_at(second, now - 470)
    train(second, now - 470, 200, 300)
    third = run.claim_attempt("4711", "slurm", restart=2)
    claim_at(third, now - 140)
    train(third, now - 140, 280, 400)
    write_gpus(third, now)
    return run


def claim_at(attempt: Attempt, moment: float) -> None:
    """As if it had been claimed then."""
    path = attempt.path / "attempt.json"
    path.write_text(json.dumps(attempt.record() | {"claimed": moment}))


def lose(attempt: Attempt) -> None:
    """As if its process had been killed."""
    path = attempt.path / "attempt.json"
    agent = attempt.record()["agent"] | {"started": 1.0}
    path.write_text(json.dumps(attempt.record() | {"agent": agent}))


def fleet(home: Path) -> None:
    """A run in each state; those that run do so while this process lives."""
    now = time.time()
    running(home)
    running(home, "pair-llama31-8b-qwen25-7b-with-a-long-name-seed-0001")
    stalled = make_run(home, "stalled").claim_attempt("1", "slurm")
    claim_at(stalled, now - 4000)
    train(stalled, now - 4000, 0, 60)
    make_run(home, "pending")
    for name, outcome in (("preempted", None), ("requeued", True), ("given-up", "failed"), ("retrying", "failed"),
                          ("stopped", "interrupted"), ("done", "finished"), ("lost", "lost")):  # fmt: skip
        run = make_run(home, name)
        write_own(run, (now - 330, "submitted", {"job_id": "7", "scheduler": "slurm"}))
        attempt = run.claim_attempt("7", "slurm")
        claim_at(attempt, now - 320)
        at = train(attempt, now - 320, 0, 200, total=200 if name == "done" else 1000)
        if outcome in (None, True):
            preempt(attempt, at, 200)
        elif outcome == "lost":
            lose(attempt)
        else:
            more = {"cause": "other", "error": "ValueError: the batch is empty"} if outcome == "failed" else {}
            write_events(attempt, "agent", (at + 1, "attempt_ended", {"outcome": outcome, "step": 200, **more}))
        if outcome is True:
            write_own(run, (at + 5, "submitted", {"job_id": "8", "scheduler": "slurm"}))
        if name == "given-up":
            write_own(run, (at + 5, "given_up", {"reason": "unexpected error 3 times, 2 allowed: ValueError"}))
    make_run(home, "cancelled").mark_cancelled(user="ada")
