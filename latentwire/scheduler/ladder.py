"""The ladder of GPUs: a job asks for the most that can start soon, and steps down while it waits for too long.

A job never has a second one beside it: a pending job is changed in place, so that at no moment two can run.
"""

from __future__ import annotations

import datetime
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from latentwire.config import Config
from latentwire.scheduler.parameters import sbatch_text, slurm_parameters
from latentwire.scheduler.queue import JobState, run_once

_TIMEOUT_S = 30.0
_NOT_FOR_WANT_OF_GPUS = (
    "BeginTime", "Dependency", "JobArrayTaskLimit", "JobHeld", "PartitionDown", "PartitionInactive",
)  # fmt: skip
_STARTS = re.compile(r"to start at (\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2})")

StartOf = Callable[[Config, int], float | None]


def expected_start(config: Config, gpus: int) -> float | None:
    """When Slurm expects a new job with so many GPUs to start, in unix seconds; submits nothing. None: it does not say.

    ``sbatch --test-only``; blocks for it.
    """
    text = sbatch_text("true", Path.cwd(), slurm_parameters(config, "test", gpus))
    try:
        done = subprocess.run(
            ["sbatch", "--test-only"], input=text, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = _STARTS.search(done.stderr + done.stdout)
    return None if found is None else datetime.datetime.fromisoformat(found.group(1)).astimezone().timestamp()


def best_rung(config: Config, start_of: StartOf = expected_start) -> int:
    """GPUs to ask for: the most that are expected within the patience, else those that are expected first. Blocks."""
    ladder = config.scheduler.ladder
    if len(ladder) == 1:
        return ladder[0]
    starts = {}
    for rung in ladder:
        start = start_of(config, rung)
        if start is not None and start - time.time() <= config.elastic.patience_s:
            return rung
        starts[rung] = start
    known = {rung: start for rung, start in starts.items() if start is not None}
    return min(known, key=lambda rung: known[rung]) if known else ladder[0]


def next_rung(config: Config, state: JobState, decided: float | None, now: float) -> int | None:
    """The fewer GPUs that a pending job is to ask for now; None: it waits on. Pure.

    Args:
        config: the run's.
        state: the job's.
        decided: when its present number of GPUs was decided upon, unix seconds.
        now: unix seconds.
    """
    section = config.scheduler
    if state.state != "PENDING" or state.eligible is None or state.gpus_per_node is None:
        return None
    if (
        state.reason.startswith(_NOT_FOR_WANT_OF_GPUS)
        or now - max(state.eligible, decided or 0.0) < config.elastic.patience_s
    ):
        return None
    lower = [rung for rung in section.ladder if rung < state.gpus_per_node * section.nodes]
    return lower[0] if lower else None


def change_gpus(config: Config, job_id: str, gpus: int) -> None:
    """Have a pending job ask for so many GPUs, over all its nodes. Blocks.

    Raises:
        SchedulerError: Slurm refused: it has just started, most likely.
    """
    run_once(["scontrol", "update", f"JobId={job_id}", f"Gres=gpu:{gpus // config.scheduler.nodes}"])
