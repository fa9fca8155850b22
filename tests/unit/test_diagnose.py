"""Each verdict on a trace that was made for it, and none where there is nothing to see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_parts import make_run, printed
from trace_parts import BUSY_GPU, START, samples, steps, write

from latentwire.config import Config
from latentwire.monitor.diagnose import Finding, diagnose

Records = list[dict[str, Any]]

ELSEWHERE = ("workload.options.compile", "PYTORCH_CUDA_ALLOC_CONF")
"""The pair's own option, and PyTorch's variable."""

TRACES: dict[str, tuple[Records, Records, str, tuple[str, ...]]] = {
    "data-bound": (
        samples(utilisation_percent=60, sm_active_percent=50),
        steps(data_s=0.35, forward_backward_s=0.55),
        "data.workers",
        ("35% of a step", "0.35 s of 1 s"),
    ),
    "data-bound, with the CPUs full": (
        samples(host={"cpu_percent": 98.0}, utilisation_percent=60),
        steps(data_s=0.35, forward_backward_s=0.55),
        "scheduler.cpus",
        ("35% of a step", "98 %"),
    ),
    "host-bound": (
        samples(utilisation_percent=41, sm_active_percent=20),
        steps(),
        "train.micro_batch",
        ("41 % of the time", "compute for 99%"),
    ),
    "host-bound, with the CPUs full": (
        samples(host={"cpu_percent": 97.0}, utilisation_percent=41),
        steps(),
        "scheduler.cpus",
        ("41 %", "97 %"),
    ),
    "communication-bound": (
        samples(sm_active_percent=60),
        steps(reduction_s=0.7, exchange_s=0.3),
        "train.global_batch",
        ("30% of a step", "0.3 s"),
    ),
    "communication-bound, on CPUs": (
        [],
        steps(reduction_s=0.25, forward_backward_s=0.6),
        "train.global_batch",
        ("25% of a step",),
    ),
    "memory-bound": (
        samples(memory_busy_percent=85, tensor_active_percent=9.0, sm_active_percent=80),
        steps(),
        "workload.options.compile",
        ("85 %", "9 %"),
    ),
    "memory-bound, by the bandwidth": (
        samples(dram_bandwidth_percent=71.0, memory_busy_percent=55, tensor_active_percent=12.0),
        steps(),
        "workload.options.compile",
        ("71 % of the memory's bandwidth", "12 %"),
    ),
    "memory-bound, without tensor cores": (
        samples(memory_busy_percent=85, tensor_active_percent=0.0),
        steps(),
        "train.precision",
        ("85 %", "0 %"),
    ),
    "heat-throttled": (
        samples(40) + samples(sm_clock_mhz=990, throttle_reasons=["sw_thermal_slowdown"], temperature_c=91)[40:],
        steps(),
        "scheduler.exclude",
        ("990 MHz of the 1980", "91 °C"),
    ),
    "uneven steps": (
        samples(90),
        steps(57) + [step | {"time": START + 57 + 9 * i, "step_s": 9.0} for i, step in enumerate(steps(3), 1)],
        "scheduler.extra",
        ("3 of 59 steps took up to 9 s", "half of all steps 1 s or less: 29% of the time"),
    ),
    "power-throttled": (
        samples(20) + samples(sm_clock_mhz=1485, throttle_reasons=["sw_power_cap"], power_w=700.0)[20:],
        steps(),
        "scheduler.constraint",
        ("1485 MHz of the 1980", "700 W"),
    ),
    "idle in saves": (
        samples(75, utilisation_percent=82),
        steps(save_every=10, save_s=2.0),
        "checkpoint.interval_steps",
        ("2 s each",),
    ),
    "too-small batch": (
        samples(sm_active_percent=17.0, tensor_active_percent=4.0, memory_used_bytes=20 << 30),
        steps(),
        "train.micro_batch",
        ("17 % of the SMs", "14 % full"),
    ),
    "fragmentation": (
        samples(memory_used_bytes=133 << 30),
        steps(memory_reserved_peak_bytes=130e9, memory_allocated_peak_bytes=91e9, memory_retries=3.0),
        "PYTORCH_CUDA_ALLOC_CONF",
        ("130 GB", "30%", "3 times"),
    ),
}


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_made_for_a_verdict_gives_it_and_no_other(name: str) -> None:
    readings, timings, change, figures = TRACES[name]
    (finding,) = diagnose(readings, timings)
    assert (finding.verdict, finding.change) == (name.partition(",")[0], change)
    assert 0 < finding.share < 1
    assert all(figure in finding.evidence for figure in figures), finding.evidence


def test_saves_at_no_regular_steps_are_a_matter_of_the_interval() -> None:
    timings = steps()
    for step in (7, 20, 29, 51):
        timings[step]["save_s"] = 4.0
    (finding,) = diagnose([], timings)
    assert (finding.verdict, finding.change) == ("idle in saves", "checkpoint.interval_s")


def only(findings: list[Finding]) -> str:
    (finding,) = findings
    return finding.verdict


def test_a_run_without_trouble_is_healthy() -> None:
    (finding,) = diagnose(samples(), steps())
    assert (finding.verdict, finding.change) == ("healthy", None)
    assert "59 steps" in finding.evidence
    assert "1 GPUs" in finding.evidence


def test_without_gpus_only_the_timings_are_judged_and_that_is_said() -> None:
    (finding,) = diagnose([], steps())
    assert finding.verdict == "healthy"
    assert "no GPU was measured" in finding.evidence


def test_without_steps_nothing_is_guessed() -> None:
    idle = samples(utilisation_percent=0, throttle_reasons=["gpu_idle"])
    assert only(diagnose([], [])) == only(diagnose(idle, [])) == "nothing measured"
    assert only(diagnose(idle, [{"time": START, "step": 1, "eval/loss": 2.0}])) == "nothing measured"


def test_the_gravest_comes_first() -> None:
    found = diagnose([], steps(data_s=0.2, reduction_s=0.4, forward_backward_s=0.3))
    assert [finding.verdict for finding in found] == ["communication-bound", "data-bound"]
    found = diagnose([], steps(data_s=0.4, reduction_s=0.2, forward_backward_s=0.3))
    assert [finding.verdict for finding in found] == ["data-bound", "communication-bound"]


def test_gpus_that_wait_while_models_are_loaded_are_not_held_against_training() -> None:
    loading = [{**s, "time": s["time"] - 300} for s in samples(utilisation_percent=0, sm_active_percent=0.0)]
    assert only(diagnose(loading + samples(), steps())) == "healthy"


def test_a_gpu_that_belongs_to_somebody_else_does_not_count() -> None:
    idle = BUSY_GPU | {"index": 1, "uuid": "GPU-b", "utilisation_percent": 0, "sm_active_percent": 0.0}
    both = [{**sample, "gpus": [*sample["gpus"], idle]} for sample in samples()]
    assert only(diagnose(both, steps())) == "healthy"


def test_a_thinned_record_stands_for_all_its_seconds() -> None:
    idle = samples(utilisation_percent=10, sm_active_percent=8.0)
    assert only(diagnose(idle, steps())) != "healthy"
    assert only(diagnose([{**samples()[30], "seconds": 3600.0}, *idle], steps())) == "healthy"


def thinned(seconds: float, **readings: Any) -> list[dict[str, Any]]:
    return [{**sample, "seconds": seconds, "num_samples": seconds} for sample in samples(**readings)]


def test_a_thinned_record_was_throttled_for_the_seconds_that_it_says() -> None:
    capped = {"throttle_reasons": ["sw_power_cap", "hw_power_brake_slowdown"], "sm_clock_mhz": 1900}
    brief = {"throttled_s": {"sw_power_cap": 1.0, "hw_power_brake_slowdown": 1.0}}
    assert only(diagnose(thinned(60.0, **capped, **brief), steps())) == "healthy"
    long = {"throttled_s": {"sw_power_cap": 45.0, "hw_power_brake_slowdown": 30.0}}
    (finding,) = diagnose(thinned(60.0)[:21] + thinned(60.0, **capped, **long)[21:], steps())
    assert finding.verdict == "power-throttled"
    assert "held down for 50% of the time, at 1900 MHz of the 1980" in finding.evidence


def test_readings_of_seconds_weigh_less_than_those_of_minutes() -> None:
    timings = steps(data_s=0.35, forward_backward_s=0.55)
    full, idle = samples(host={"cpu_percent": 98.0}), samples(host={"cpu_percent": 10.0})
    (finding,) = diagnose([{**full[30], "seconds": 3600.0}, *idle], timings)
    assert finding.change == "scheduler.cpus"


def test_what_gpus_still_compute_is_no_exchange() -> None:
    assert only(diagnose(samples(), steps(reduction_s=0.8, forward_backward_s=0.1))) == "healthy"
    assert only(diagnose(samples(), steps(reduction_s=0.8, exchange_s=0.02))) == "healthy"


def test_memory_that_is_often_touched_is_not_therefore_full_of_traffic() -> None:
    touched = samples(memory_busy_percent=95, dram_bandwidth_percent=35.0, tensor_active_percent=20.0)
    assert only(diagnose(touched, steps())) == "healthy"


def test_an_evaluation_is_no_waiting_for_the_host() -> None:
    timings = steps()
    for step in timings[30:]:
        step["time"] += 60.0
    while_evaluating = samples(120, utilisation_percent=50)
    assert only(diagnose(while_evaluating, timings)) == "healthy"


def test_memory_that_nobody_needs_may_lie_in_pieces() -> None:
    figures = {"memory_reserved_peak_bytes": 20e9, "memory_allocated_peak_bytes": 8e9, "memory_retries": 0.0}
    assert only(diagnose(samples(memory_used_bytes=84 << 30), steps(**figures))) == "healthy"


def test_readings_that_are_missing_or_nonsense_upset_nothing() -> None:
    broken: Records = [
        {"time": START + 1, "gpus": [None, {"uuid": 5, "utilisation_percent": "NaN", "throttle_reasons": "hot"}]},
        {"time": "then", "host": [], "gpus": {}},
        {"time": START + 2, "host": {"cpu_percent": True}, "gpus": None},
        {"event": "monitor_started"},
        *samples(**dict.fromkeys(["memory_used_bytes", "power_w", "sm_clock_mhz", "throttle_reasons"])),
    ]
    odd: Records = [{"time": START, "step": "x", "step_s": "Infinity"}, *steps(exchange_s="NaN", save_s=None)]
    assert only(diagnose(broken, odd)) == "healthy"


def test_the_command_reads_the_newest_attempt_with_steps_and_names_the_present_value(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for readings, timings in ((samples(), steps()), TRACES["data-bound"][:2]):
        attempt = run.claim_attempt("1", "local")
        write(attempt.metrics_path, timings)
        write(attempt.path / "gpu_stats.jsonl", readings[:50])
        write(attempt.path / "gpu_stats.node1.jsonl", readings[50:])
    run.claim_attempt("1", "local")  # has made no step yet
    lines = printed(tmp_path, "diagnose", "toy").splitlines()
    assert lines[:2] == ["attempt 2:", "data-bound (35%): 35% of a step waits for data (0.35 s of 1 s)"]
    assert lines[2].startswith("  change data.workers (now 0): more workers")
    (told,) = json.loads(printed(tmp_path, "diagnose", "toy", "--json"))
    assert (told["attempt"], told["verdict"], told["change"]) == (2, "data-bound", "data.workers")
    assert printed(tmp_path, "diagnose", "toy", "--attempt", "1").startswith("attempt 1:\nhealthy: ")


def test_every_key_that_is_named_is_one_of_the_config() -> None:
    defaults = Config(name="a", workload={"target": "json:JSONDecoder"}).model_dump()
    for _, _, change, _ in TRACES.values():
        section, _, key = change.partition(".")
        assert change in ELSEWHERE or key in defaults[section]
