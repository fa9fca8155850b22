"""How what monitors left in a run's earlier attempts stays small, and stays readable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from stats_parts import KIB, MONTH_S, FakeMachine, drive, samples

from latentwire.monitor import earlier as earlier_module
from latentwire.monitor import read_stats, stats_files, summarise
from latentwire.monitor import thin as thin_module
from latentwire.monitor.earlier import SETTLED_S, thin_earlier
from latentwire.monitor.thin import StatsWriter
from latentwire.run.directory import Attempt, Run

ATTEMPT_S = 8 * 3600.0
SAMPLES, OLD_SAMPLES, MINUTES = "gpu_stats.jsonl", "gpu_stats.old.jsonl", "gpu_stats.thin.jsonl"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "experiment_month")


@pytest.fixture
def complaints() -> list[str]:
    return []


def claim(run: Run) -> Attempt:
    return run.claim_attempt("1", "local")


def much_later() -> float:
    """When nobody writes any more to what is there now."""
    return time.time() + 2 * SETTLED_S


def thin(attempt: Attempt, complaints: list[str], **limits: Any) -> None:
    thin_earlier(attempt, complaints.append, **{"clock": much_later, "seconds_bytes": 0} | limits)


def watch(attempt: Attempt, seconds: float, name: str = SAMPLES, *, is_killed: bool = False) -> None:
    """A monitor's files of so many seconds, in several parts; a killed one has written no last minute."""
    machine = FakeMachine(seconds)
    writer = StatsWriter(attempt.path / name, 1.0, clock=machine.clock, full_bytes=64 * KIB)
    drive(machine, writer, 1.0)
    if not is_killed:
        writer.close()


def names(attempt: Attempt) -> set[str]:
    return {path.name for path in attempt.path.iterdir()} - {"attempt.json"}


def covered_s(attempt: Attempt) -> float:
    return sum(float(record["seconds"]) for record in samples(attempt.path))


def test_a_month_of_attempts_stays_below_the_stated_size(
    run: Run, monkeypatch: pytest.MonkeyPatch, complaints: list[str]
) -> None:
    for module in (thin_module, earlier_module):
        monkeypatch.setattr(module, "THIN_S", 1200.0)
    machine, interval_s = FakeMachine(0.0), 240.0
    full_bytes, minutes_bytes = 64 * KIB, 256 * KIB
    own_bytes = full_bytes + 32 * KIB
    seconds_bytes = 2 * own_bytes
    sizes = []
    for _ in range(int(MONTH_S / ATTEMPT_S)):
        attempt = claim(run)
        thin(attempt, complaints, seconds_bytes=seconds_bytes, minutes_bytes=minutes_bytes)
        machine.end_s = machine.now_s + ATTEMPT_S - interval_s / 2
        path = attempt.path / SAMPLES
        writer = StatsWriter(path, interval_s, clock=machine.clock, full_bytes=full_bytes)
        drive(machine, writer, interval_s)
        writer.close()
        sizes.append(sum(part.stat().st_size for part in run.path.glob("attempts/*/gpu_stats*")))

    assert minutes_bytes < max(sizes) < own_bytes + seconds_bytes + minutes_bytes
    assert sizes[-1] < max(sizes), "what came first is thinned again"
    assert complaints == []
    attempts = run.attempts()
    for attempt in attempts:
        found = [record["event"] for record in read_stats(attempt.path) if "event" in record]
        assert found == ["monitor_started", "monitor_stopped"]
        times = [record["time"] for record in read_stats(attempt.path)]
        assert times == sorted(times)
    assert {record["num_samples"] for record in samples(attempts[-2].path)} == {1}, "the newest have every sample"
    assert names(attempts[0]) == {MINUTES}
    summary: Any = summarise([path for attempt in attempts for path in stats_files(attempt.path)])
    gpu = summary["gpus"]["GPU-x"]
    assert gpu["num_samples"] == len(attempts) * (ATTEMPT_S / interval_s - 1)
    assert gpu["covered_s"] == pytest.approx(len(attempts) * (ATTEMPT_S - interval_s), abs=1)
    assert (gpu["max_temperature_c"], summary["num_skipped_lines"]) == (95, 0)


@pytest.mark.parametrize("is_killed", [False, True])
def test_of_an_attempt_the_minutes_stay_and_a_killed_monitors_last_ones_too(
    run: Run, complaints: list[str], is_killed: bool
) -> None:
    first = claim(run)
    watch(first, 1234.0, is_killed=is_killed)
    watch(first, 333.0, "gpu_stats.node1.jsonl", is_killed=is_killed)
    assert OLD_SAMPLES in names(first)
    before: Any = summarise(stats_files(first.path))
    second = claim(run)
    watch(second, 100.0)
    files = names(second)
    thin(second, complaints)
    assert names(first) == {MINUTES, "gpu_stats.node1.thin.jsonl"}, "of all nodes, however many the next attempt has"
    assert covered_s(first) == pytest.approx(1234 + 333, abs=0.01)
    after: Any = summarise(stats_files(first.path))
    for key in ("num_samples", "energy_wh", "throttled_s", "max_temperature_c"):
        assert after["gpus"]["GPU-x"][key] == pytest.approx(before["gpus"]["GPU-x"][key])
    assert after["events"] == before["events"]
    assert names(second) == files, "its own are another's to write"
    assert complaints == []


KILLED = """
import os, sys, time
from pathlib import Path
from latentwire.monitor.earlier import thin_earlier
from latentwire.run.directory import Attempt, Run

folder, call, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
count, real = 0, getattr(os, call)

def killing(*arguments, **more):
    global count
    count += 1
    if count == number:
        os._exit(9)
    return real(*arguments, **more)

setattr(os, call, killing)
thin_earlier(Attempt(Run(folder), 2), print, clock=lambda: time.time() + 9000, seconds_bytes=0, minutes_bytes=1000)
"""


@pytest.mark.parametrize(
    ("call", "number"), [("fsync", 1), ("replace", 1), ("unlink", 1), ("unlink", 2), ("replace", 2), ("fsync", 3)]
)
def test_a_kill_at_any_point_costs_no_second(run: Run, complaints: list[str], call: str, number: int) -> None:
    """Before the last minute is in its place, before each removal, and while the minutes are thinned again."""
    first = claim(run)
    watch(first, 1234.0, is_killed=True)
    second = claim(run)
    command = [sys.executable, "-c", KILLED, str(run.path), call, str(number)]
    assert subprocess.run(command).returncode == 9, "it was killed there"
    assert covered_s(first) == pytest.approx(1234, abs=0.01)
    thin(second, complaints)
    assert covered_s(first) == pytest.approx(1234, abs=0.01)
    assert names(first) - {f".{MINUTES}"} == {MINUTES}
    assert complaints == []


def test_a_file_that_may_have_a_writer_is_left_alone(run: Run, complaints: list[str]) -> None:
    first = claim(run)
    watch(first, 1234.0)
    files, second = names(first), claim(run)
    thin(second, complaints, clock=time.time)
    assert names(first) == files, "its monitor wrote just now: it may live on, cut off from whoever started the next"
    third = claim(run)
    thin(second, complaints)
    assert names(first) == files, "a newer attempt does it"
    thin(third, complaints)
    assert names(first) == {MINUTES}


def test_what_cannot_be_thinned_is_told_and_keeps_no_other(run: Run, complaints: list[str]) -> None:
    attempts = [claim(run) for _ in range(4)]
    for attempt in attempts[:3]:
        watch(attempt, 1234.0)
    blocked, vanished, sound, newest = attempts
    (blocked.path / MINUTES).unlink()
    (blocked.path / MINUTES / "in the way").mkdir(parents=True)
    for part in vanished.path.glob("gpu_stats*"):
        part.unlink()
    (vanished.path / MINUTES).symlink_to("gone")
    thin(newest, complaints, minutes_bytes=0)
    assert names(sound) == {MINUTES}
    assert {SAMPLES, OLD_SAMPLES} <= names(blocked), "what was not brought elsewhere stays"
    (told,) = complaints
    assert told.startswith(f"{blocked.path / SAMPLES} was not thinned, the next attempt tries again: ")


# ---- The process -----------------------------------------------------------------------------------------------------


def large(attempt: Attempt) -> Path:
    """More than earlier attempts may keep, last written long ago."""
    watch(attempt, 300.0)
    old = attempt.path / OLD_SAMPLES
    *_, last = old.read_text().splitlines()
    with old.open("a") as file:
        for _ in range(97):
            file.write(json.dumps(json.loads(last) | {"padding": " " * (1 << 20)}) + "\n")
    for part in attempt.path.glob("gpu_stats*"):
        os.utime(part, (0, 0))
    return old


@pytest.mark.parametrize("options", [["--thin-earlier"], []])
def test_only_a_monitor_that_is_told_to_thins(run: Run, options: list[str]) -> None:
    old, attempt = large(claim(run)), claim(run)
    command = [sys.executable, "-m", "latentwire.monitor", "--output-dir", attempt.path, "--interval", "0.01", *options]
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen([*command, "--until-stdin-closes"], env=environ, stdin=subprocess.PIPE) as monitor:
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s:
            if len(samples(attempt.path)) >= 20 and old.exists() == (not options):
                break
            time.sleep(0.01)
        monitor.communicate()
    assert monitor.returncode == 0
    assert old.exists() == (not options)
    assert len(samples(attempt.path)) >= 20


def test_a_folder_that_is_no_attempts_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "latentwire.monitor", "--output-dir", str(tmp_path / "watched"), "--thin-earlier"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert done.stderr.endswith("is no attempt's folder, such as attempts/0003; leave the option out\n")
