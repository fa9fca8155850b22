"""The monitor's files: how they stay small for a month, and how they are read."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stats_parts import KIB, MONTH_S, FakeMachine, drive, samples

from latentwire.monitor import StatsFollower, read_stats, stats_files, summarise
from latentwire.monitor import thin as thin_module
from latentwire.monitor.thin import StatsWriter


def test_a_month_stays_below_the_stated_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin_module, "THIN_S", 600.0)
    full_bytes, thin_bytes, interval_s = 64 * KIB, 128 * KIB, 120.0
    machine, path = FakeMachine(MONTH_S), tmp_path / "gpu_stats.jsonl"
    writer = StatsWriter(path, interval_s, clock=machine.clock, full_bytes=full_bytes, thin_bytes=thin_bytes)
    largest_bytes = 0
    wait = machine.wait

    def wait_and_look(seconds: float) -> bool:
        nonlocal largest_bytes
        if machine.now_s % 600 == 0:
            largest_bytes = max(largest_bytes, sum(part.stat().st_size for part in tmp_path.iterdir()))
        return wait(seconds)

    machine.wait = wait_and_look  # type: ignore[method-assign]
    drive(machine, writer, interval_s)
    writer.close()

    minute_bytes = 2 * 1024
    assert 2 * full_bytes < largest_bytes < 2 * full_bytes + thin_bytes + 3 * minute_bytes
    assert sorted(part.name for part in tmp_path.iterdir()) == [
        "gpu_stats.jsonl", "gpu_stats.old.jsonl", "gpu_stats.thin.jsonl"
    ]  # fmt: skip
    records = list(read_stats(tmp_path))
    assert [record["event"] for record in records if "event" in record] == ["monitor_started", "monitor_stopped"]
    found = [record for record in records if "event" not in record]
    times = [record["time"] for record in found]
    assert times == sorted(times)
    assert sum(record["seconds"] for record in found) == pytest.approx(MONTH_S, abs=1)
    assert sum(record["num_samples"] for record in found) == MONTH_S / interval_s
    assert {record["num_samples"] for record in found[-100:]} == {1}, "the newest hours have every sample"
    assert max(record["gpus"][0]["temperature_c"] for record in found) == 95, "a short peak is not lost"

    summary: Any = summarise([path])
    gpu, host = summary["gpus"]["GPU-x"], summary["hosts"][found[0]["hostname"]]
    assert gpu["num_samples"] == MONTH_S / interval_s
    assert gpu["mean_utilisation_percent"] == pytest.approx(75, abs=0.1)
    assert gpu["energy_wh"] == pytest.approx(7 * 75 * MONTH_S / 3600, rel=1e-3)
    assert gpu["throttled_s"]["sw_power_cap"] == pytest.approx(MONTH_S / 10, rel=1e-3)
    assert (gpu["max_temperature_c"], host["min_disk_free_bytes"]) == (95, 10**9 - 720)
    assert summary["num_skipped_lines"] == 0


# ---- Readers ---------------------------------------------------------------------------------------------------------


def write(path: Path, *records: object) -> None:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines))


def started(time_s: float, hostname: str, interval_s: float = 1.0) -> dict[str, object]:
    return {"time": time_s, "event": "monitor_started", "hostname": hostname, "interval_s": interval_s}


def sample(time_s: float, **more: object) -> dict[str, object]:
    return {"time": time_s, "host": {"cpu_percent": 1.0}, "gpus": [{"uuid": "GPU-x"}], **more}


def test_the_nodes_of_an_attempt_are_one_stream(tmp_path: Path) -> None:
    write(tmp_path / "gpu_stats.jsonl", started(10, "n0"), sample(11), sample(13))
    write(tmp_path / "gpu_stats.node1.thin.jsonl", started(10.2, "n1"), sample(11.2, seconds=0.5, num_samples=5))
    write(tmp_path / "gpu_stats.node1.old.jsonl", sample(11.7))
    write(tmp_path / "gpu_stats.node1.jsonl", sample(12.2))
    assert [path.name for path in stats_files(tmp_path)] == ["gpu_stats.jsonl", "gpu_stats.node1.jsonl"]
    found = [(r["time"], r["hostname"], r.get("seconds"), r.get("num_samples")) for r in read_stats(tmp_path)]
    assert found == [
        (10, "n0", None, None),
        (10.2, "n1", None, None),
        (11, "n0", 1, 1),
        (11.2, "n1", 0.5, 5),
        (11.7, "n1", 0.5, 1),
        (12.2, "n1", 0.5, 1),
        (13, "n0", 2, 1),
    ]
    assert [r["time"] for r in read_stats(tmp_path, since=11.7)] == [11.7, 12.2, 13]


def test_readers_are_upset_by_nothing(tmp_path: Path) -> None:
    assert list(read_stats(tmp_path / "vanished")) == []
    garbage = ["", "{", "17", '{"time": "soon"}', '{"time": NaN, "host": {}}', '{"host": {}}', "[" * 100_000]
    odd = [sample(3, host=7, gpus=[3, {"uuid": 4}]), sample(4, gpus=None, seconds="x", num_samples=None)]
    write(tmp_path / "gpu_stats.jsonl", *garbage, started(1, "n0"), sample(2), *odd)
    with (tmp_path / "gpu_stats.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n{"time": 5, "host": {"cpu_per')
    (tmp_path / "gpu_stats.node1.jsonl").mkdir()
    found = samples(tmp_path)
    assert [(r["time"], r["host"], r["gpus"], r["seconds"]) for r in found] == [
        (2, {"cpu_percent": 1.0}, [{"uuid": "GPU-x"}], 1),
        (3, {}, [], 1),
        (4, {"cpu_percent": 1.0}, [], 1),
    ]


def test_the_newest_minutes_of_a_large_file_are_found(tmp_path: Path) -> None:
    write(tmp_path / "gpu_stats.jsonl", started(0, "n0"), *(sample(float(s)) for s in range(1, 20_000)))
    for since in (0.5, 7000.5, 19_990.0):
        found = samples(tmp_path, since)
        assert [r["time"] for r in found] == list(range(math.ceil(since), 20_000))
        assert {r["seconds"] for r in found} == {1}
    assert samples(tmp_path, 20_000.0) == []


def test_a_follower_misses_nothing_when_the_file_goes_on_in_a_new_part(tmp_path: Path) -> None:
    machine, path = FakeMachine(3600.0), tmp_path / "gpu_stats.jsonl"
    follower = StatsFollower(path)
    assert follower.read() == []
    writer = StatsWriter(path, 1.0, clock=machine.clock, full_bytes=32 * KIB)
    seen: list[dict[str, Any]] = []
    wait = machine.wait

    def wait_and_follow(seconds: float) -> bool:
        if machine.now_s % 7 == 0:
            seen.extend(follower.read())
        return wait(seconds)

    machine.wait = wait_and_follow  # type: ignore[method-assign]
    drive(machine, writer, 1.0)
    writer.close()
    seen.extend(follower.read())
    assert [r["time"] for r in seen if "host" in r] == [machine.start_s + s for s in range(1, 3601)]
    assert [r["event"] for r in seen if "event" in r] == ["monitor_started", "monitor_stopped"]
    assert (tmp_path / "gpu_stats.old.jsonl").exists(), "there was more than one part"


def test_a_follower_reads_a_file_that_has_become_shorter_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "gpu_stats.jsonl"
    write(path, started(0, "n0"), sample(1.0))
    follower = StatsFollower(path)
    assert [record["time"] for record in follower.read()] == [0, 1]
    write(path, started(7, "n0"))  # the same inode, as a new file may get it
    assert [record["time"] for record in follower.read()] == [7]


# ---- The writer's bad days -------------------------------------------------------------------------------------------

KILLED = """
import os, sys
from pathlib import Path
from latentwire.monitor import thin
from latentwire.monitor.thin import StatsWriter

folder, call, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
now_s, count, real = 0.0, 0, getattr(os, call)

def killing(*arguments):
    global count
    count += 1
    if count == number:
        os._exit(9)
    return real(*arguments)

setattr(os, call, killing)
writer = StatsWriter(folder / "gpu_stats.jsonl", 1.0, clock=lambda: now_s, full_bytes=4096, thin_bytes=4096)
writer.event("monitor_started", hostname="n0", interval_s=1.0)
for _ in range(20_000):
    now_s += 1
    writer.record({"cpu_percent": 1.0}, [{"uuid": "GPU-x", "power_w": 700.0}])
"""


@pytest.mark.parametrize(("call", "number"), [("replace", 1), ("replace", 2), ("open", 3), ("fsync", 2), ("fsync", 5)])
def test_a_kill_while_the_parts_change_costs_at_most_the_last_minutes(tmp_path: Path, call: str, number: int) -> None:
    """Killed before and after each rename, and while the thinned file is written anew; then a monitor goes on."""
    command = [sys.executable, "-c", KILLED, str(tmp_path), call, str(number)]
    assert subprocess.run(command).returncode == 9, "it was killed there"
    found = samples(tmp_path)
    last_s = found[-1]["time"]
    assert sum(r["seconds"] for r in found) == pytest.approx(last_s, abs=0.01), "no second is missing or there twice"

    now_s = last_s + 100
    writer = StatsWriter(tmp_path / "gpu_stats.jsonl", 1.0, clock=lambda: now_s, full_bytes=4096, thin_bytes=4096)
    writer.event("monitor_started", hostname="n0", interval_s=1.0)
    for _ in range(5000):
        now_s += 1
        writer.record({"cpu_percent": 1.0}, [{"uuid": "GPU-x", "power_w": 700.0}])
    writer.close()
    found = samples(tmp_path)
    assert last_s + 5000 - 60 <= sum(r["seconds"] for r in found) <= last_s + 5000
    assert {part.name for part in tmp_path.iterdir()} <= {
        "gpu_stats.jsonl", "gpu_stats.old.jsonl", "gpu_stats.thin.jsonl"
    }, "the half-written file of the first was used up by the second"  # fmt: skip


def test_a_folder_that_takes_no_rename_is_an_event_and_costs_no_sample(tmp_path: Path) -> None:
    (tmp_path / "gpu_stats.old.jsonl").mkdir()
    (tmp_path / "gpu_stats.old.jsonl" / "in the way").touch()
    machine, path = FakeMachine(1800.0), tmp_path / "gpu_stats.jsonl"
    writer = StatsWriter(path, 1.0, clock=machine.clock, full_bytes=64 * KIB)
    drive(machine, writer, 1.0)
    writer.close()
    records = list(read_stats(tmp_path))
    assert len([r for r in records if "event" not in r]) == 1800
    told = [r for r in records if r.get("event") == "stats_not_thinned"]
    assert 1 <= len(told) < 50, "told when it fails, not each minute"
    assert "in the way" in os.listdir(tmp_path / "gpu_stats.old.jsonl")


@pytest.mark.parametrize("name", ["gpu_stats.jsonl", "gpu_stats.thin.jsonl"])
def test_a_file_that_could_not_be_opened_anew_is_opened_a_minute_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    num_opened, real = 0, os.open

    def failing_once(path: Any, *arguments: Any) -> int:
        nonlocal num_opened
        num_opened += Path(path).name == name
        if num_opened == 2 and Path(path).name == name:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, *arguments)

    monkeypatch.setattr("latentwire.run.journal.os.open", failing_once)
    machine, path = FakeMachine(2 * 3600.0), tmp_path / "gpu_stats.jsonl"
    writer = StatsWriter(path, 1.0, clock=machine.clock, full_bytes=64 * KIB, thin_bytes=8 * KIB)
    drive(machine, writer, 1.0)
    writer.close()
    assert num_opened > 2
    assert sum(r["seconds"] for r in samples(tmp_path)) == pytest.approx(7200, abs=0.01), "nothing was lost"
    assert max(part.stat().st_size for part in tmp_path.iterdir()) < 96 * KIB
