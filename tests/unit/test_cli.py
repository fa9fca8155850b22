"""The command line, driven as a program, against run directories made through the public API of the run room."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from latentwire import __version__
from latentwire.checkpoint.layout import HostTensor, Snapshot
from latentwire.checkpoint.manager import CheckpointManager
from latentwire.config import Config, WorkloadSection
from latentwire.run.atomic import read_json, write_json
from latentwire.run.directory import Attempt, Run, create_run
from latentwire.run.journal import Journal

_HEAVY = ("torch", "submitit", "transformers", "pydantic", "yaml", "rich", "typer", "click")

_AGENT = """
import signal, sys
from pathlib import Path
from typing import Any
from latentwire.run.directory import Run
told = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT}
signal.pthread_sigmask(signal.SIG_BLOCK, told)
print(Run(Path(sys.argv[1])).claim_attempt("4711", sys.argv[2]).number, flush=True)
print(signal.sigwait(told).name, flush=True)
"""

Agents = Callable[..., "subprocess.Popen[str]"]


# ---- What the tests are made of --------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where the program is started: beside a folder ``runs``."""
    (tmp_path / "runs").mkdir()
    return tmp_path


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "latentwire", *arguments]


def _latentwire(home: Path, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environ = os.environ | ({"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"} if path else {})
    return subprocess.run(_command(*arguments), cwd=home, env=environ, capture_output=True, text=True, check=False)


def _printed(home: Path, *arguments: str) -> str:
    """What a command that must go well prints."""
    result = _latentwire(home, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def _complaint(home: Path, *arguments: str, code: int = 1) -> str:
    """What a command that must fail says on stderr."""
    result = _latentwire(home, *arguments)
    assert result.returncode == code
    assert "Traceback" not in result.stderr
    return result.stderr


def _make_run(home: Path, name: str = "toy") -> Run:
    return create_run(Config(name=name, workload=WorkloadSection(target="json:JSONDecoder")), home / "runs")


def _write_events(attempt: Attempt, writer: str, *events: tuple[float, str, dict[str, Any]]) -> None:
    clock = iter([time for time, _, _ in events])
    journal = Journal(attempt.path / f"events.{writer}.jsonl", clock=lambda: next(clock))
    for _, name, fields in events:
        journal.event(name, **fields)
    journal.close()


def _end(attempt: Attempt, outcome: str, time: float = 1e9) -> None:
    _write_events(attempt, "agent", (time, "attempt_ended", {"outcome": outcome, "step": 20}))


def _finished_run(home: Path) -> Run:
    """Two attempts: the first preempted at step 10, the second finished at step 20; an orchestrator saw both."""
    run = _make_run(home)
    journal = Journal(run.orchestrator_events, clock=lambda: 99.0)
    journal.event("submitted", job_id="4711")
    journal.close()
    for number, outcome in ((1, "preempted"), (2, "finished")):
        attempt = run.claim_attempt("4711", "local")
        start = 100.0 * number
        _write_events(attempt, "agent", (start, "attempt_started", {"total_steps": 20}))
        _write_events(attempt, "rank0", (start + 1, "save_committed", {"step": 10 * number, "why": "two words"}))
        metrics = Journal(attempt.path / "metrics.jsonl", clock=lambda: 1.0)
        metrics.record(step=10 * number, loss=4.5 - number, samples_per_s=100.0, step_s=0.1)
        metrics.close()
        _end(attempt, outcome, start + 2)
    return run


def _save(run: Run, *steps: int) -> None:
    manager = CheckpointManager(
        run.checkpoints, token=1, version="0", identity={"config": "ab"}, fence=lambda: None, event=lambda *a, **k: None
    )
    tensor = HostTensor("F32", (2, 3), memoryview(bytes(range(24))))
    counter = HostTensor("I64", (1,), memoryview(bytes(8)))
    for step in steps:
        tensors = {"model": {"w": tensor, "v": tensor}, "optimizer": {"count": counter}}
        manager.save(Snapshot(step, tensors, {"cursor": step}, {"eval/loss": 1.25}))
    manager.close()


@pytest.fixture
def agents() -> Iterator[Agents]:
    """Starts real processes that claim an attempt, and then print the name of the first signal that they get."""
    started: list[subprocess.Popen[str]] = []

    def start(run: Run, scheduler: str = "local") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _AGENT, str(run.path), scheduler]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert _read_line(started[-1]).strip().isdigit()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def scancel(tmp_path: Path) -> Path:
    """A folder with a ``scancel`` that writes its arguments beside itself."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "scancel"
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/said\n')
    program.chmod(0o755)
    return folder


def _read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def _append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def _on_terminal(home: Path, *arguments: str) -> str:
    """What a command writes onto a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    try:
        subprocess.run(_command(*arguments), cwd=home, stdout=theirs, check=True)
        return os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
        os.close(theirs)


# ---- The program -----------------------------------------------------------------------------------------------------


def test_version(home: Path) -> None:
    assert _printed(home, "--version") == f"latentwire {__version__}\n"


def test_help_names_every_command(home: Path) -> None:
    text = _printed(home, "--help")
    for command in ("status", "logs", "events", "config", "checkpoints", "preempt", "cancel", "drill", "checklist"):
        assert f"\n  {command} " in text


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("status", "--json --runs-dir"),
        ("checkpoints", "ls verify inspect diff export prune"),
        ("drill", "--json --keep"),
        ("checklist run", "--only --write"),
    ],
)
def test_help_of_a_command_names_its_options(home: Path, command: str, options: str) -> None:
    text = _printed(home, *command.split(), "--help")
    assert [option for option in options.split() if option not in text] == []


@pytest.mark.parametrize("words", ["status --bogus", "logs", "nonsense", "preempt toy --signal X"])
def test_wrong_usage_exits_with_2(home: Path, words: str) -> None:
    assert "usage:" in _complaint(home, *words.split(), code=2).lower()


@pytest.mark.parametrize("command", ["status", "logs", "events", "preempt", "cancel"])
def test_unknown_run_names_those_that_there_are(home: Path, command: str) -> None:
    _make_run(home, "apple")
    _make_run(home, "pear")
    complaint = _complaint(home, command, "plum")
    assert complaint.startswith("latentwire: there is no run 'plum'")
    assert "apple, pear" in complaint


def test_drill_hands_its_config_on(home: Path) -> None:
    assert "absent.yaml" in _complaint(home, "drill", "--config", "absent.yaml")


def test_drill_under_slurm_says_what_it_lacks(home: Path) -> None:
    (home / "toy.yaml").write_text("name: toy\nworkload: {target: 'json:JSONDecoder'}\n")
    words = ["drill", "--config", "toy.yaml"]
    assert "give --partition P" in _complaint(home, *words, "--cluster", "slurm")
    assert "add --cluster slurm" in _complaint(home, *words, "--partition", "preempt")
    environ = os.environ | {"PATH": str(home)}
    command = _command(*words, "--cluster", "slurm", "--partition", "preempt")
    result = subprocess.run(command, cwd=home, env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "no sbatch on PATH: log in to the cluster" in result.stderr
    assert list((home / "runs").iterdir()) == []


def test_unreadable_folder_is_one_line(home: Path) -> None:
    run = _make_run(home)
    (run.path / "attempts").mkdir()
    (run.path / "attempts" / "0001").mkdir()
    (run.path / "attempts" / "0001" / "stdout.log").mkdir()
    complaint = _complaint(home, "logs", "toy")
    assert complaint.startswith("latentwire: ")
    assert "Is a directory" in complaint


@pytest.mark.parametrize("num_events", [1, 5000], ids=["less than a pipe holds", "more than a pipe holds"])
def test_reader_that_leaves_early_ends_it_quietly(home: Path, num_events: int) -> None:
    attempt = _make_run(home).claim_attempt("1", "local")
    _write_events(attempt, "rank0", *[(float(i), "something", {"i": i}) for i in range(num_events)])
    ours, theirs = os.pipe()
    os.close(ours)
    result = subprocess.run(_command("events", "toy"), cwd=home, stdout=theirs, stderr=subprocess.PIPE, check=False)
    os.close(theirs)
    assert result.stderr == b""


# ---- status ----------------------------------------------------------------------------------------------------------


def test_status_imports_nothing_heavy(home: Path) -> None:
    _finished_run(home)
    command = [sys.executable, "-X", "importtime", "-m", "latentwire", "status"]
    result = subprocess.run(command, cwd=home, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "latentwire" in imported
    assert imported.isdisjoint(_HEAVY)


def test_status_of_the_fleet(home: Path, agents: Agents) -> None:
    _finished_run(home)
    agents(_make_run(home, "alive"))
    _make_run(home, "waiting")
    header, alive, toy, waiting = (line.split() for line in _printed(home, "status").splitlines())
    assert header[:5] == ["run", "state", "attempt", "preempted", "step"]
    assert alive[:3] == ["alive", "RUNNING", "1"]
    assert toy[:6] == ["toy", "DONE", "2", "1", "20/20", "2.5"]
    assert waiting[:3] == ["waiting", "PENDING", "0"]


def test_status_of_one_run_tells_of_its_attempts(home: Path) -> None:
    _finished_run(home)
    text = _printed(home, "status", "toy")
    assert "20 of 20" in text
    assert [line.split()[0] for line in text.splitlines()[-2:]] == ["1", "2"]
    assert "preempted" in text
    assert "finished" in text


def test_status_as_json(home: Path) -> None:
    _finished_run(home)
    _make_run(home, "waiting")
    fleet = json.loads(_printed(home, "status", "--json"))
    assert [each["state"] for each in fleet] == ["DONE", "PENDING"]
    one = json.loads(_printed(home, "status", "toy", "--json"))
    assert one == fleet[0]


def test_status_without_runs(home: Path) -> None:
    assert _printed(home, "status") == f"no runs in {home / 'runs'}\n"
    assert json.loads(_printed(home, "status", "--json", "--runs-dir", "elsewhere")) == []


def test_status_takes_another_runs_folder_and_a_path(home: Path) -> None:
    run = _finished_run(home)
    os.rename(home / "runs", home / "others")
    assert "toy" in _printed(home, "status", "--runs-dir", "others")
    assert "DONE" in _printed(home, "status", f"others/{run.path.name}")


def test_status_obeys_nothing_and_is_cut_on_a_terminal(home: Path) -> None:
    attempt = _make_run(home).claim_attempt("1", "local")
    ended = {"outcome": "failed", "error": "\x1b]0;owned\x07\nand more"}
    _write_events(attempt, "agent", (1.0, "attempt_ended", ended))
    assert _printed(home, "status").splitlines()[1].endswith("\\x1b]0;owned\\x07\\nand more")
    header, line = _on_terminal(home, "status").splitlines()
    assert len(header) == 80
    assert line.removeprefix("\x1b[31m").removesuffix("\x1b[0m").endswith("…")
    assert "\x1b]" not in line


# ---- logs and events -------------------------------------------------------------------------------------------------


def test_logs_of_the_newest_attempt_or_another(home: Path) -> None:
    run = _finished_run(home)
    for attempt in run.attempts():
        (attempt.path / "stdout.log").write_text(f"out {attempt.number}\n")
        (attempt.path / "stderr.log").write_text(f"err {attempt.number}\n")
    assert _printed(home, "logs", "toy") == "out 2\n"
    assert _printed(home, "logs", "toy", "--attempt", "1", "--stderr") == "err 1\n"
    assert "has no attempt 7; it has: 1, 2" in _complaint(home, "logs", "toy", "--attempt", "7")


def test_logs_before_the_first_attempt_says_so(home: Path) -> None:
    _make_run(home)
    assert "has not been started yet" in _complaint(home, "logs", "toy")


@pytest.mark.parametrize("end", ["\n", ""], ids=["closed", "half a line at the end"])
@pytest.mark.parametrize("num_lines", [0, 1, 3, 9000, 20000])
def test_logs_last_lines(home: Path, num_lines: int, end: str) -> None:
    attempt = _make_run(home).claim_attempt("1", "local")
    lines = [f"line number {i}" for i in range(10000)]
    (attempt.path / "stdout.log").write_text("\n".join(lines) + end)
    wanted = lines[-num_lines:] if num_lines else []
    assert _printed(home, "logs", "toy", "--lines", str(num_lines)).splitlines() == wanted


def test_logs_are_raw_in_a_pipe_and_escaped_on_a_terminal(home: Path) -> None:
    attempt = _make_run(home).claim_attempt("1", "local")
    (attempt.path / "stdout.log").write_text("\x1b[2Jcleared? é\n")
    assert _printed(home, "logs", "toy") == "\x1b[2Jcleared? é\n"
    assert _on_terminal(home, "logs", "toy") == "\\x1b[2Jcleared? é\r\n"


def test_logs_follow_into_the_next_attempt_until_the_run_is_finished(home: Path) -> None:
    run = _make_run(home)
    with subprocess.Popen(_command("logs", "toy", "-f"), cwd=home, stdout=subprocess.PIPE, text=True) as follower:
        first = run.claim_attempt("1", "local")
        _append(first.path / "stdout.log", "one\n")
        assert _read_line(follower) == "one\n"
        _append(first.path / "stdout.log", "two\n")
        assert _read_line(follower) == "two\n"
        _end(first, "preempted")
        second = run.claim_attempt("2", "local")
        _append(second.path / "stdout.log", "three\n")
        assert _read_line(follower) == "three\n"
        _append(second.path / "stdout.log", "four\n")
        _end(second, "finished")
        assert follower.communicate()[0] == "four\n"
    assert follower.returncode == 0


def test_interrupted_follow_ends_quietly_with_130(home: Path) -> None:
    attempt = _make_run(home).claim_attempt("1", "local")
    _write_events(attempt, "agent", (1.0, "attempt_started", {}))
    with subprocess.Popen(
        _command("events", "toy", "--follow"), cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as follower:
        assert "attempt_started" in _read_line(follower)
        follower.send_signal(signal.SIGINT)
        assert follower.communicate() == ("", "")
    assert follower.returncode == 130


def test_events_are_merged_in_order(home: Path) -> None:
    _finished_run(home)
    lines = _printed(home, "events", "toy").splitlines()
    assert [line.split()[2:5] for line in lines] == [
        ["-", "orchestrator", "submitted"],
        ["1", "agent", "attempt_started"],
        ["1", "rank0", "save_committed"],
        ["1", "agent", "attempt_ended"],
        ["2", "agent", "attempt_started"],
        ["2", "rank0", "save_committed"],
        ["2", "agent", "attempt_ended"],
    ]
    assert lines[2].endswith('step=10 why="two words"')


def test_events_of_one_attempt_as_json(home: Path) -> None:
    _finished_run(home)
    records = [json.loads(line) for line in _printed(home, "events", "toy", "--attempt", "2", "--json").splitlines()]
    assert {record["attempt"] for record in records} == {2}
    assert [record["writer"] for record in records] == ["agent", "rank0", "agent"]
    assert "has no attempt 3" in _complaint(home, "events", "toy", "--attempt", "3")


def test_events_obey_nothing_and_survive_foreign_lines(home: Path) -> None:
    attempt = _make_run(home).claim_attempt("1", "local")
    odd = {"time": "yesterday", "event": "\x1b[31m\nodd", "\x9bkey": ["\x07"]}
    (attempt.path / "events.rank0.jsonl").write_text(f'half a li\n[1]\n{json.dumps(odd)}\n{{"time": 2}}\n')
    lines = _printed(home, "events", "toy").splitlines()
    assert len(lines) == 2
    assert "\\x1b[31m\\nodd" in lines[0]
    assert all(line.isprintable() for line in lines)


def test_events_follow_sees_a_writer_that_joins(home: Path) -> None:
    run = _make_run(home)
    attempt = run.claim_attempt("1", "local")
    _write_events(attempt, "agent", (1.0, "attempt_started", {}))
    with subprocess.Popen(_command("events", "toy", "-f"), cwd=home, stdout=subprocess.PIPE, text=True) as follower:
        assert "attempt_started" in _read_line(follower)
        _write_events(attempt, "rank0", (2.0, "restored", {"step": 0}))
        assert "rank0" in _read_line(follower)
        _end(attempt, "cancelled")
        assert "attempt_ended" in follower.communicate()[0]
    assert follower.returncode == 0


# ---- config ----------------------------------------------------------------------------------------------------------


def test_config_show_resolves_bases_and_overrides(home: Path) -> None:
    import yaml

    (home / "base.yaml").write_text("name: toy\nworkload: {target: 'json:JSONDecoder'}\nseed: 1\n")
    (home / "mine.yaml").write_text("base: base.yaml\nseed: 2\n")
    tree = yaml.safe_load(_printed(home, "config", "show", "mine.yaml", "train.steps=777"))
    assert (tree["seed"], tree["train"]["steps"], tree["retry"]["oom"]) == (2, 777, 5)
    assert "unknown key; did you mean train.steps" in _complaint(home, "config", "show", "mine.yaml", "train.stepz=7")
    assert "there is no config absent.yaml" in _complaint(home, "config", "show", "absent.yaml")


def test_config_show_of_a_run(home: Path) -> None:
    run = _make_run(home)
    assert _printed(home, "config", "show", "toy") == (run.path / "config.yaml").read_text()
    assert "its config is fixed" in _complaint(home, "config", "show", "toy", "seed=3")
    assert "nor is there a file 'absent'" in _complaint(home, "config", "show", "absent")


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_checkpoints_ls(home: Path) -> None:
    run = _make_run(home)
    assert _printed(home, "checkpoints", "ls", "toy") == "toy has no checkpoint yet\n"
    _save(run, 10, 20)
    (run.checkpoints / "step-00000020" / "manifest.json").write_text("{}")
    (run.checkpoints / "quarantine" / "step-00000005.attempt-0001-1").mkdir(parents=True)
    _, first, second, quarantined = _printed(home, "checkpoints", "ls", "toy").splitlines()
    assert first.split()[:2] == ["step-00000010", "verified"]
    assert first.endswith("eval/loss=1.25")
    assert second.split()[:2] == ["step-00000020", "BAD"]
    assert quarantined.endswith("step-00000005.attempt-0001-1")


def test_checkpoints_verify_names_the_file_and_changes_nothing(home: Path) -> None:
    run = _make_run(home)
    _save(run, 10, 20)
    assert len(_printed(home, "checkpoints", "verify", "toy").splitlines()) == 2
    bad = run.checkpoints / "step-00000020" / "model.safetensors"
    data = bytearray(bad.read_bytes())
    data[-1] ^= 1
    bad.write_bytes(data)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    result = _latentwire(home, "checkpoints", "verify", "toy")
    assert result.returncode == 1
    assert result.stdout.startswith("step-00000010: ")
    assert result.stderr.startswith(f"latentwire: {bad} has SHA-256")
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before
    assert "step-00000010" in _printed(home, "checkpoints", "verify", "toy", "10")
    assert "has no checkpoint of step 7; it has: 10, 20" in _complaint(home, "checkpoints", "verify", "toy", "7")


def test_checkpoints_inspect_counts_the_tensors(home: Path) -> None:
    run = _make_run(home)
    assert "has no checkpoint yet" in _complaint(home, "checkpoints", "inspect", "toy")
    _save(run, 10, 20)
    text = _printed(home, "checkpoints", "inspect", "toy")
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert rows["step"] == ["20"]
    assert rows["identity.config"] == ["ab"]
    assert rows["model"][:3] == ["2", "2", "F32"]
    assert rows["optimizer"][:3] == ["1", "1", "I64"]
    manifest = read_json(run.checkpoints / "step-00000020" / "manifest.json")
    assert rows["model"][-1] == manifest["files"]["model.safetensors"]["sha256"]
    assert "10" in _printed(home, "checkpoints", "inspect", "toy", "10").splitlines()[0]


@pytest.mark.parametrize("damage", ["truncated", "emptied", "removed", "linked"])
def test_checkpoints_inspect_of_a_damaged_file_is_one_line(home: Path, damage: str) -> None:
    run = _make_run(home)
    _save(run, 10)
    path = run.checkpoints / "step-00000010" / "model.safetensors"
    data = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(data[:-1])
    elif damage == "emptied":
        path.touch()
    elif damage == "linked":
        path.symlink_to("optimizer.safetensors")
    complaint = _complaint(home, "checkpoints", "inspect", "toy")
    assert complaint.startswith("latentwire: ")
    assert "model.safetensors" in complaint


# ---- preempt and cancel ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["TERM", "USR1", "USR2", "INT"])
def test_preempt_delivers_the_signal(home: Path, agents: Agents, name: str) -> None:
    run = _make_run(home)
    agent = agents(run)
    text = _printed(home, "preempt", "toy", "--signal", name)
    assert text.startswith(f"sent SIG{name} to the agent of attempt 1 of toy (pid {agent.pid} on ")
    assert _read_line(agent) == f"SIG{name}\n"
    assert not run.cancel_path.exists()


def test_preempt_kill_leaves_no_time(home: Path, agents: Agents) -> None:
    agent = agents(_make_run(home))
    _printed(home, "preempt", "toy", "--signal", "kill")
    assert agent.wait() == -signal.SIGKILL
    assert "is not running" in _complaint(home, "preempt", "toy")


def test_preempt_of_a_run_that_is_not_running(home: Path) -> None:
    _finished_run(home)
    _make_run(home, "waiting")
    assert "toy is not running, so there is nothing to preempt: it is DONE" in _complaint(home, "preempt", "toy")
    assert "it is PENDING" in _complaint(home, "preempt", "waiting")


def test_preempt_never_hits_a_stranger_with_the_same_pid(home: Path, agents: Agents) -> None:
    run = _make_run(home)
    agent = agents(run)
    path = run.attempts()[0].path / "attempt.json"
    record = read_json(path)
    record["agent"]["started"] -= 1000.0
    write_json(path, record)
    assert "is not running" in _complaint(home, "preempt", "toy", "--signal", "KILL")
    assert agent.poll() is None


@pytest.mark.parametrize(("signum", "target"), [("USR2", "4711"), ("KILL", "4711.0")])
def test_preempt_through_slurm(home: Path, agents: Agents, scancel: Path, signum: str, target: str) -> None:
    agents(_make_run(home), "slurm")
    result = _latentwire(home, "preempt", "toy", "--signal", signum, path=scancel)
    assert result.stdout.startswith(f"sent SIG{signum} to Slurm job 4711, attempt 1 of toy")
    assert (scancel / "said").read_text() == f"-s {signum} {target}\n", "SIGKILL to a whole job would cancel it"


def test_cancel_writes_the_mark_and_tells_the_agent(home: Path, agents: Agents) -> None:
    run = _make_run(home)
    agent = agents(run)
    text = _printed(home, "cancel", "toy")
    assert "it saves and leaves" in text
    assert "python -m latentwire.orchestrate --resume toy" in text
    assert _read_line(agent) == "SIGTERM\n"
    mark = read_json(run.cancel_path)
    assert mark["host"]
    assert mark["user"]
    assert mark["time"] > 0


def test_cancel_of_what_has_not_started_or_is_finished(home: Path) -> None:
    waiting = _make_run(home, "waiting")
    assert "waiting is not running" in _printed(home, "cancel", "waiting")
    assert "CANCELLED" in _printed(home, "status", "waiting")
    finished = _finished_run(home)
    assert "is finished: there is nothing to cancel" in _complaint(home, "cancel", "toy")
    assert waiting.cancel_path.exists()
    assert not finished.cancel_path.exists()


def test_cancel_takes_a_slurm_job_out_of_the_queue(home: Path, scancel: Path) -> None:
    run = _make_run(home)
    (run.path / "jobs").mkdir()
    write_json(run.path / "jobs" / "0001.json", {"job_id": "77", "scheduler": "slurm", "submitted": 1.0})
    result = _latentwire(home, "cancel", "toy", path=scancel)
    assert result.stdout.startswith("cancelled Slurm job 77 of toy")
    assert (scancel / "said").read_text() == "77\n"
    assert run.cancel_path.exists()


def test_cancel_says_what_scancel_said(home: Path, agents: Agents, scancel: Path) -> None:
    run = _make_run(home)
    agents(run, "slurm")
    (scancel / "scancel").write_text("#!/bin/sh\necho 'scancel: error: no controller' >&2\nexit 1\n")
    result = _latentwire(home, "cancel", "toy", path=scancel)
    assert result.returncode == 1
    assert result.stderr.startswith("latentwire: scancel 4711: scancel: error: no controller; the cancel itself is on")
    assert run.cancel_path.exists()
    status = _latentwire(home, "status").stdout
    assert "RUNNING" in status
    assert "cancelled: ends at its next stop" in status
