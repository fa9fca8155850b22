"""The monitor: the real process on this machine, the host's readings, and the roll-up of the files."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from latentwire.monitor import HostMonitor, summarise
from latentwire.run.journal import Journal

GIB = 1 << 30
PATIENCE_S = 120
PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

Start = Callable[..., subprocess.Popen[bytes]]


# ---- The real process ------------------------------------------------------------------------------------------------


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a real monitor that sees no GPU; ends what still runs."""
    started: list[subprocess.Popen[bytes]] = []

    def start(output_dir: Path, *options: str, **popen: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "latentwire.monitor", "--output-dir", str(output_dir), *options]
        environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        started.append(subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, **popen))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def records_in(path: Path) -> list[dict[str, Any]]:
    """The whole, sound lines."""
    found = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def await_that(is_true: Callable[[], bool], what: str) -> None:
    """Wait for something that another process does."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_true():
        assert time.monotonic() < deadline_s, f"waited {PATIENCE_S} s in vain: {what}"
        time.sleep(0.005)


def await_samples(path: Path, num: int) -> None:
    await_that(lambda: len([r for r in records_in(path) if "host" in r]) >= num, f"{num} samples in {path}")


def test_records_the_host_and_says_that_there_is_no_gpu(start: Start, tmp_path: Path) -> None:
    stats = tmp_path / "new" / "folder" / "gpu_stats.jsonl"
    monitor = start(stats.parent, "--interval", "0.05", "--until-stdin-closes")
    await_samples(stats, 3)
    monitor.communicate()

    header, *samples, last = records_in(stats)
    assert header["event"] == "monitor_started"
    assert header["source"].startswith("host only: ")
    assert (header["interval_s"], header["gpus"]) == (0.05, [])
    assert last["event"] == "monitor_stopped"
    host = samples[-1]["host"]
    assert samples[-1]["gpus"] == []
    assert 0 <= host["cpu_percent"] <= 100
    assert 0 < host["memory_available_bytes"] <= host["memory_total_bytes"]
    assert 0 < host["disk_free_bytes"] <= host["disk_total_bytes"]
    assert host["processes_rss_bytes"] > 10_000_000, "this test process is the tree's root"
    assert abs(samples[-1]["time"] - time.time()) < 60


def test_records_through_every_signal_until_its_input_closes(start: Start, tmp_path: Path) -> None:
    stats = tmp_path / "gpu_stats.jsonl"
    monitor = start(tmp_path, "--interval", "0.02", "--until-stdin-closes")
    await_samples(stats, 1)
    for number in PREEMPTION_SIGNALS:
        monitor.send_signal(number)
        await_samples(stats, len(records_in(stats)) + 1)
    assert monitor.stdin is not None
    monitor.stdin.write(b"what is written there means nothing\n")
    monitor.stdin.flush()
    await_samples(stats, len(records_in(stats)) + 1)
    assert monitor.poll() is None

    monitor.communicate()

    assert monitor.returncode == 0
    assert records_in(stats)[-1]["event"] == "monitor_stopped"


def test_ends_when_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    stats = tmp_path / "gpu_stats.jsonl"
    code = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-m', 'latentwire.monitor', '--output-dir', sys.argv[1],\n"
        "    '--interval', '0.02', '--until-stdin-closes'], stdin=subprocess.PIPE)\n"
        "time.sleep(600)\n"
    )
    agent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    try:
        await_samples(stats, 1)
    finally:
        agent.kill()
        agent.wait()
    await_that(lambda: records_in(stats)[-1].get("event") == "monitor_stopped", "the orphan ends")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_by_hand_it_ends_on_a_signal(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    stats = tmp_path / "gpu_stats.jsonl"
    # A long interval: the signal must cut the wait short.
    monitor = start(tmp_path, "--interval", "3600", stderr=subprocess.PIPE)
    await_that(lambda: bool(records_in(stats)), "the header")
    monitor.send_signal(number)
    _, errors = monitor.communicate(timeout=PATIENCE_S)
    assert (monitor.returncode, errors) == (0, b"")
    assert records_in(stats)[-1]["event"] == "monitor_stopped"


def num_writes(pid: int) -> int:
    """Calls of ``write`` that a process has made, failed ones too."""
    counts = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(counts["syscw"])


def test_survives_a_full_disk(start: Start, mount_disk: Callable[[str], Path]) -> None:
    disk, page_bytes = mount_disk("64k"), 4096
    stats, ballast = disk / "gpu_stats.jsonl", disk / "ballast"
    ballast.write_bytes(bytes(15 * page_bytes))
    monitor = start(disk, "--interval", "0.01", "--until-stdin-closes")
    await_that(lambda: stats.exists() and stats.stat().st_size == page_bytes, "the last page is full")
    # The size shows before the write has failed at the next page: one more write, and this one was in vain.
    num_before = num_writes(monitor.pid)
    await_that(lambda: num_writes(monitor.pid) > num_before + 1, "it tries again")
    ballast.unlink()
    await_that(lambda: any(r.get("event") == "records_lost" for r in records_in(stats)), "it writes again")
    monitor.communicate()
    assert_recovered(monitor, stats, os.strerror(errno.ENOSPC))


def test_survives_writes_that_fail(start: Start, tmp_path: Path) -> None:
    """The same without root: the kernel cuts the file off in mid-line, then refuses, then allows it again."""
    stats, limit_bytes = tmp_path / "gpu_stats.jsonl", 3000
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limited = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit_bytes, hard))
    monitor = start(tmp_path, "--interval", "0.01", "--until-stdin-closes", preexec_fn=limited)
    await_that(lambda: stats.exists() and stats.stat().st_size == limit_bytes, "the limit is reached")
    resource.prlimit(monitor.pid, resource.RLIMIT_FSIZE, (hard, hard))
    await_that(lambda: any(r.get("event") == "records_lost" for r in records_in(stats)), "it writes again")
    monitor.communicate()
    assert_recovered(monitor, stats, os.strerror(errno.EFBIG))


def assert_recovered(monitor: subprocess.Popen[bytes], stats: Path, reason: str) -> None:
    records = records_in(stats)
    assert monitor.returncode == 0
    assert records[0]["event"] == "monitor_started"
    assert records[-1]["event"] == "monitor_stopped"
    losses = [r for r in records if r.get("event") == "records_lost"]
    assert len(losses) == 1
    assert losses[0]["num_records"] >= 1
    assert losses[0]["reason"].startswith((reason, "the disk took only a part"))
    # The disk may fill just at a line's end; else one line was cut off, and it spoils no other.
    assert summarise([stats])["num_skipped_lines"] in (0, 1)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--interval", "0"], "argument --interval: '0' is not a number of seconds above 0"),
        (["--interval", "nan"], "argument --interval: 'nan' is not a number of seconds above 0"),
        (["--gpus", "99"], "there is no GPU '99'; give indexes or UUIDs of this machine's GPUs: "),
        (["--output-dir", "/dev/null/x"], "cannot write to /dev/null/x: Not a directory"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_a_wrong_argument_is_one_clear_line(start: Start, tmp_path: Path, options: list[str], complaint: str) -> None:
    monitor = start(tmp_path, *options, stderr=subprocess.PIPE)
    _, errors = monitor.communicate(timeout=PATIENCE_S)
    assert monitor.returncode == 2
    assert errors.decode().startswith(f"python -m latentwire.monitor: {complaint}")
    assert errors.count(b"\n") == 1


def test_starting_imports_nothing_heavy() -> None:
    code = (
        "import sys, latentwire.monitor, latentwire.monitor.__main__\n"
        "print(sorted({'torch', 'numpy', 'pydantic', 'pynvml', 'psutil'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# ---- The file and the host -------------------------------------------------------------------------------------------


def test_a_file_that_ends_in_half_a_line_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "gpu_stats.jsonl"
    path.write_text('{"time":1,"event":"monitor_sta')
    stats = Journal(path, clock=lambda: 2.0)
    stats.event("monitor_started")
    stats.close()
    assert records_in(path) == [{"time": 2.0, "event": "monitor_started"}]


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        (
            "0::/slurm/job_7/step_0/task_0\n",
            {
                "slurm/job_7/step_0/task_0": ("memory.current", "11", "memory.max", "max"),
                "slurm/job_7/step_0": ("memory.current", "22", "memory.max", "500"),
                "slurm/job_7": ("memory.current", "33", "memory.max", "900"),
            },
            (22, 500),
        ),
        (
            "4:memory:/slurm/job_7\n0::/\n",
            {
                "memory/slurm/job_7": ("memory.usage_in_bytes", "44", "memory.limit_in_bytes", "800"),
                "memory": ("memory.usage_in_bytes", "99", "memory.limit_in_bytes", "9223372036854771712"),
            },
            (44, 800),
        ),
        ("0::/host/own/path\n", {"": ("memory.current", "55", "memory.max", "max")}, (55, None)),
        ("0::/\n", {}, (None, None)),
    ],
    ids=["v2: the step's limit binds", "v1", "inside a container", "no memory controller"],
)
def test_the_tightest_cgroup_limit_is_read(
    tmp_path: Path,
    membership: str,
    files: dict[str, tuple[str, str, str, str]],
    expected: tuple[int | None, int | None],
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(membership)
    for folder, (used, used_text, limit, limit_text) in files.items():
        level = tmp_path / "cgroup" / folder
        level.mkdir(parents=True, exist_ok=True)
        (level / used).write_text(used_text + "\n")
        (level / limit).write_text(limit_text + "\n")
    host = HostMonitor(tmp_path, proc=tmp_path / "proc", cgroups=tmp_path / "cgroup").sample()
    assert (host["cgroup_memory_used_bytes"], host["cgroup_memory_limit_bytes"]) == expected


def test_a_vanished_folder_and_a_dead_process_are_null(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    host = HostMonitor(tmp_path / "vanished", child.pid)
    alive = host.sample()
    child.communicate()
    assert isinstance(alive["processes_rss_bytes"], int)
    assert alive["disk_free_bytes"] is None
    await_that(lambda: host.sample()["processes_rss_bytes"] is None, "the process is missed")


# ---- The roll-up -----------------------------------------------------------------------------------------------------


def sample_line(time_s: float, power_w: float | None, **readings: object) -> str:
    gpu = {"index": 0, "uuid": "GPU-x", "name": "H200", "power_w": power_w, **readings}
    return json.dumps({"time": time_s, "host": {"cpu_percent": 50.0, "disk_free_bytes": 10**9 - time_s}, "gpus": [gpu]})


def header_line(time_s: float) -> str:
    return json.dumps({"time": time_s, "event": "monitor_started", "interval_s": 1.0, "hostname": "n0", "gpus": []})


def test_the_roll_up_adds_attempts_and_skips_garbage(tmp_path: Path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    busy = {"utilisation_percent": 90, "sm_active_percent": 80.0, "memory_used_bytes": 5 * GIB, "temperature_c": 70}
    first.write_text(
        "\n".join(
            [
                header_line(100),
                sample_line(101, 600.0, throttle_reasons=["sw_power_cap"], **busy),
                sample_line(102, 600.0, throttle_reasons=["sw_power_cap", "sync_boost"], **busy),
                '{"time":102.5,"host":{"cpu_per',
                '{"time":"soon","host":{},"gpus":[]}',
                '{"time":102.7,"host":7,"gpus":[3,{"uuid":4}]}',
                "[" * 100_000,
                "17",
                sample_line(1000, float("nan"), throttle_reasons=["sync_boost"], utilisation_percent=True),
                sample_line(1001, 300.0)[:-20],
            ]
        )
    )
    second.write_text("\n".join([header_line(5000), sample_line(5002, 300.0, utilisation_percent=30), ""]))

    summary: Any = summarise([first, second, tmp_path / "vanished.jsonl"])

    gpu = summary["gpus"]["GPU-x"]
    assert (gpu["index"], gpu["name"], gpu["num_samples"]) == (0, "H200", 4)
    assert gpu["covered_s"] == 1 + 1 + 1 + 2, "the gap of 898 s counts as one interval"
    assert (gpu["mean_utilisation_percent"], gpu["max_utilisation_percent"]) == (70.0, 90)
    assert (gpu["mean_sm_active_percent"], gpu["max_memory_used_bytes"], gpu["max_temperature_c"]) == (80, 5 * GIB, 70)
    assert (gpu["mean_power_w"], gpu["max_power_w"]) == (500.0, 600.0)
    assert gpu["energy_wh"] == pytest.approx((600 + 600 + 300 * 2) / 3600, abs=1e-4)
    assert gpu["throttled_s"] == {"sw_power_cap": 2.0, "sync_boost": 2.0}
    assert gpu["mean_tensor_active_percent"] is None
    host = summary["hosts"]["n0"]
    assert (host["num_samples"], host["max_cpu_percent"], host["min_disk_free_bytes"]) == (4, 50.0, 10**9 - 5002)
    assert summary["events"] == {"monitor_started": 2}
    assert summary["num_skipped_lines"] == 5
    assert summary["unreadable_files"] == [str(tmp_path / "vanished.jsonl")]
    json.dumps(summary, allow_nan=False)


def test_a_clock_set_back_covers_no_time(tmp_path: Path) -> None:
    path = tmp_path / "gpu_stats.jsonl"
    path.write_text("\n".join([header_line(100), sample_line(50, 100.0), sample_line(51, 100.0)]))
    summary: Any = summarise([path])
    assert summary["gpus"]["GPU-x"]["covered_s"] == 1.0
