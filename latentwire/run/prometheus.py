"""Runs as Prometheus reads them: the text exposition format 0.0.4."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from latentwire.run.directory import Run
from latentwire.run.journal import last_record
from latentwire.run.status import RunStatus, run_status

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ALIVE = ("RUNNING", "STALLED")
_FAMILIES = {
    "latentwire_run_state": ("gauge", "1 for the state that the run is in."),
    "latentwire_attempt": ("gauge", "Number of the newest attempt."),
    "latentwire_preemptions_total": ("counter", "Attempts that ended preempted."),
    "latentwire_lost_attempts_total": ("counter", "Attempts that ended without a word."),
    "latentwire_step": ("gauge", "Completed optimizer steps."),
    "latentwire_target_step": ("gauge", "Optimizer steps wanted."),
    "latentwire_committed_step": ("gauge", "Newest step that the run committed."),
    "latentwire_loss": ("gauge", "Loss of the last step."),
    "latentwire_samples_per_second": ("gauge", "Pace of the last step, while the run is alive."),
    "latentwire_eta_seconds": ("gauge", "Time to the last step at the present pace."),
    "latentwire_checkpoint_age_seconds": ("gauge", "Since the newest verified checkpoint was verified."),
    "latentwire_notice_needs_seconds": ("gauge", "What a notice would take for the step under way and its save."),
    "latentwire_grace_seconds": ("gauge", "What a notice would have for that."),
    "latentwire_goodput_ratio": ("gauge", "Training that stood, over the time allotted."),
    "latentwire_metric": ("gauge", "Any other figure of the last step's and the last evaluation's line, by its name."),
    "latentwire_gpu_utilisation_ratio": ("gauge", "Share of time in which the GPU was busy."),
    "latentwire_gpu_sm_active_ratio": ("gauge", "Share of multiprocessors with work."),
    "latentwire_gpu_tensor_active_ratio": ("gauge", "Share of time in which the tensor cores worked."),
    "latentwire_gpu_memory_used_bytes": ("gauge", "Memory in use on the GPU."),
    "latentwire_gpu_memory_total_bytes": ("gauge", "Memory of the GPU."),
    "latentwire_gpu_temperature_celsius": ("gauge", "Temperature of the GPU."),
    "latentwire_gpu_power_watts": ("gauge", "Power that the GPU draws."),
}
_GPU_READINGS = {
    "utilisation_percent": ("latentwire_gpu_utilisation_ratio", 0.01),
    "sm_active_percent": ("latentwire_gpu_sm_active_ratio", 0.01),
    "tensor_active_percent": ("latentwire_gpu_tensor_active_ratio", 0.01),
    "memory_used_bytes": ("latentwire_gpu_memory_used_bytes", 1.0),
    "memory_total_bytes": ("latentwire_gpu_memory_total_bytes", 1.0),
    "temperature_c": ("latentwire_gpu_temperature_celsius", 1.0),
    "power_w": ("latentwire_gpu_power_watts", 1.0),
}
_STATS = "gpu_stats.jsonl"
_TOLD_ELSEWHERE = ("step", "time", "loss", "samples_per_s")

_Sample = tuple[str, dict[str, str], Any]
"""Name, labels, value."""


@dataclasses.dataclass(frozen=True)
class Scrape:
    """What is known of a run at one moment.

    Attributes:
        status: folded from its files.
        metrics: the last evaluation's line of metrics.jsonl, the last step's with a loss and the last step's, over one
            another.
        nodes: of an attempt that runs, the monitors' newest lines by node: ``node0`` is the leader's.
    """

    status: RunStatus
    metrics: Mapping[str, Any]
    nodes: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, run: Run, now: float | None = None) -> Scrape:
        """Read a run's files. Does not block; upset by no half-written or missing file."""
        status = run_status(run, now)
        metrics: dict[str, Any] = {}
        nodes: dict[str, Mapping[str, Any]] = {}
        for attempt in run.attempts()[-1:]:
            for key in ("eval/loss", "loss", "step_s"):
                metrics |= last_record(attempt.metrics_path, key) or {}
            if status.state in _ALIVE:
                for path in (attempt.path / _STATS, *attempt.path.glob("gpu_stats.node*.jsonl")):
                    if path.name.endswith((".old.jsonl", ".thin.jsonl")):
                        continue  # what a node's monitor wrote before
                    node = "node0" if path.name == _STATS else path.name.split(".")[1]
                    nodes[node] = last_record(path, "gpus") or {}
        return cls(status, metrics, nodes)


def exposition(scrapes: Iterable[Scrape], now: float | None = None) -> str:
    """All runs as one page for Prometheus; figures that are not known are left out. Pure but for the clock.

    Args:
        scrapes: of each run one.
        now: unix seconds, for ages.
    """
    now = time.time() if now is None else now
    by_family: dict[str, list[str]] = {name: [] for name in _FAMILIES}
    for scrape in scrapes:
        for name, labels, value in _samples(scrape, now):
            number = _number(value)
            if number is not None:
                marks = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
                by_family[name].append(f"{name}{{{marks}}} {number}\n")
    return "".join(
        f"# HELP {name} {text}\n# TYPE {name} {kind}\n{''.join(by_family[name])}"
        for name, (kind, text) in _FAMILIES.items()
        if by_family[name]
    )


def _samples(scrape: Scrape, now: float) -> Iterator[_Sample]:
    status, run = scrape.status, {"run": scrape.status.name}
    yield "latentwire_run_state", run | {"state": status.state}, 1
    yield "latentwire_attempt", run, status.attempt
    yield "latentwire_preemptions_total", run, status.num_preemptions
    yield "latentwire_lost_attempts_total", run, status.num_lost
    yield "latentwire_step", run, status.step
    yield "latentwire_target_step", run, status.total_steps
    yield "latentwire_committed_step", run, status.committed_step
    yield "latentwire_loss", run, scrape.metrics.get("loss", status.loss)
    yield "latentwire_samples_per_second", run, status.samples_per_s
    yield "latentwire_eta_seconds", run, status.eta_s
    verified_at = status.verified_at
    yield "latentwire_checkpoint_age_seconds", run, None if verified_at is None else max(0.0, now - verified_at)
    yield "latentwire_notice_needs_seconds", run, status.notice_needs_s
    yield "latentwire_grace_seconds", run, status.grace_s
    yield "latentwire_goodput_ratio", run, status.goodput
    for key, value in scrape.metrics.items():
        if key not in _TOLD_ELSEWHERE:
            yield "latentwire_metric", run | {"name": key}, value
    for node, sample in scrape.nodes.items():
        gpus = sample.get("gpus")
        for gpu in gpus if isinstance(gpus, list) else []:
            if isinstance(gpu, dict):
                labels = run | {"node": node, "gpu": str(gpu.get("index")), "uuid": str(gpu.get("uuid"))}
                for key, (name, scale) in _GPU_READINGS.items():
                    value = _number(gpu.get(key))
                    yield name, labels, None if value is None else float(value) * scale


def _number(value: Any) -> str | None:
    """A number as the format writes it; journals have NaN and infinities as words."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        return None
    if number is None:
        return None
    return repr(number) if math.isfinite(number) else {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}[str(number)]


def _escaped(text: str) -> str:
    sendable = text.encode("utf-8", "replace").decode()  # names of files and JSON may hold halves of surrogate pairs
    return sendable.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
