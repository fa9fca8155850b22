"""A run on disk: journals, attempts, leases, processes, budgets and the status that is folded from them."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from latentwire.config import Config, RetrySection, parse_config
from latentwire.errors import Fenced, RunBusy, RunConflict, RunError, RunNotFound
from latentwire.run.atomic import read_json, write_json, write_text
from latentwire.run.budget import next_move, num_halvings, verdict_of
from latentwire.run.directory import Attempt, Run, create_run, list_runs, open_run
from latentwire.run.journal import Follower, Journal, last_record, read_journal
from latentwire.run.lease import STALE_AFTER_S, Lease
from latentwire.run.process import ProcessIdentity
from latentwire.run.rollup import merged_metrics, summarise_metrics
from latentwire.run.status import HEARTBEAT_S, STALLED_S, run_status

NOW = 1_000_000.0
RETRY = RetrySection(oom=2, network=3, network_backoff_s=5.0, other=1, lost=2)


def config(name: str = "test", **sections: Any) -> Config:
    return parse_config({"name": name, "workload": {"target": "json:JSONDecoder"}, **sections}, "here")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    journal = Journal(path, clock=lambda: NOW)
    yield journal
    journal.close()


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts Python programs that talk on their standard input and output; ends what still runs."""
    started: list[subprocess.Popen[str]] = []

    def start(program: str, environ: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        command, env, pipe = [sys.executable, "-c", program], {**os.environ, **(environ or {})}, subprocess.PIPE
        started.append(subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.fixture(scope="module")
def dead() -> ProcessIdentity:
    """A process of this host that has ended."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = ProcessIdentity.of(process.pid)
    process.communicate()
    return identity


ELSEWHERE = ProcessIdentity("another-host", 1, 1.0)


# ---- Files that are whole or absent ----------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_and_leaves_nothing_beside(tmp_path: Path) -> None:
    for value in ({"a": 1}, [1, 2], "π", None):
        write_json(tmp_path / "x.json", value)
        assert read_json(tmp_path / "x.json") == value
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_failed_write_leaves_the_old_file(small_disk: Path) -> None:
    write_text(small_disk / "x", "old")
    with pytest.raises(OSError, match="No space left"):
        write_text(small_disk / "x", "new" * (1 << 20))
    assert (small_disk / "x").read_text() == "old"
    assert os.listdir(small_disk) == ["x"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"\0" * 100])
def test_json_that_is_none_reads_as_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    assert read_json(tmp_path / "x") is None
    assert read_json(tmp_path / "missing") is None
    assert read_json(tmp_path / "x" / "below a file") is None


# ---- Journals --------------------------------------------------------------------------------------------------------


def test_a_journal_reads_back_in_order(journal: Journal, path: Path) -> None:
    journal.event("one", step=1, text="π\n", nothing=None)
    journal.record(step=2, loss=0.5)
    assert list(read_journal(path)) == [
        {"time": NOW, "event": "one", "step": 1, "text": "π\n", "nothing": None},
        {"time": NOW, "step": 2, "loss": 0.5},
    ]
    assert last_record(path, "loss") == {"time": NOW, "step": 2, "loss": 0.5}
    assert last_record(path, "event") == {"time": NOW, "event": "one", "step": 1, "text": "π\n", "nothing": None}
    assert last_record(path, "never") is None


def test_numbers_that_json_does_not_know_are_words(journal: Journal, path: Path) -> None:
    journal.record(a=float("nan"), b=[float("inf"), {"c": -float("inf")}], d=(1, 2))
    [record] = read_journal(path)
    assert record == {"time": NOW, "a": "nan", "b": ["inf", {"c": "-inf"}], "d": [1, 2]}


def test_a_value_that_is_not_json_does_not_stop_the_journal(journal: Journal, path: Path) -> None:
    journal.event("odd", path=Path("/x"), error=ValueError("why"), key={1: {2}})
    journal.event("next")
    assert [record["event"] for record in read_journal(path)] == ["odd", "next"]
    assert next(read_journal(path))["path"] == "/x"


def test_a_missing_journal_is_empty(path: Path) -> None:
    assert list(read_journal(path)) == []
    assert last_record(path) is None
    assert Follower(path).read() == []


@pytest.mark.parametrize("foreign", [b"{", b"\0" * 50, b"\xff\xfe", b"[1, 2]", b"7", b'{"a": 1}}', b"", b"[" * 100_000])
def test_foreign_lines_are_skipped(path: Path, foreign: bytes) -> None:
    path.write_bytes(b'{"time": 1}\n' + foreign + b'\n{"time": 2}\n')
    assert [record["time"] for record in read_journal(path)] == [1, 2]
    assert [record["time"] for record in Follower(path).read()] == [1, 2]
    assert last_record(path) == {"time": 2}


def test_the_last_record_is_found_at_the_end_of_a_large_file(path: Path) -> None:
    path.write_bytes(b'{"time": 1, "text": "' + b"x" * 200_000 + b'"}\n{"time": 2}\n{"tim')
    assert last_record(path) == {"time": 2}


def test_a_writer_killed_in_mid_line_costs_that_line(path: Path, start: Start) -> None:
    program = f"""
import os, signal
from pathlib import Path
from latentwire.run.journal import Journal
journal = Journal(Path({str(path)!r}))
journal.event("whole")
write = os.write
def die(descriptor, data):
    write(descriptor, data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
os.write = die
journal.event("torn")
"""
    assert start(program).wait() == -signal.SIGKILL
    assert not path.read_bytes().endswith(b"\n")
    follower = Follower(path)
    assert [record["event"] for record in follower.read()] == ["whole"]

    successor = Journal(path)
    successor.event("after")
    successor.close()
    assert [record["event"] for record in read_journal(path)] == ["whole", "after"]
    assert [record["event"] for record in follower.read()] == ["after"]


def test_a_follower_waits_for_the_end_of_a_line(path: Path) -> None:
    follower = Follower(path)
    with open(path, "ab", buffering=0) as file:
        file.write(b'{"a": 1}\n{"a"')
        assert follower.read() == [{"a": 1}]
        assert follower.read() == []
        file.write(b": 2}")
        assert follower.read() == []
        file.write(b"\n")
        assert follower.read() == [{"a": 2}]


def test_a_full_disk_delays_events_and_drops_records_and_says_so(small_disk: Path) -> None:
    path = small_disk / "events.jsonl"
    journal = Journal(path, clock=lambda: NOW)
    journal.event("before")
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    for step in range(200):
        journal.event("during", step=step)
        journal.record(step=step)
    assert len(list(read_journal(path))) < 200
    filler.unlink()
    journal.record(step=200)
    journal.event("after")
    journal.close()
    events = [record for record in read_journal(path) if "event" in record]
    assert [e["step"] for e in events if e["event"] == "during"] == list(range(200))
    assert [e["event"] for e in events if e["event"] != "during"] == ["before", "records_lost", "after"]
    records = [record for record in read_journal(path) if "event" not in record]
    [loss] = [event for event in events if event["event"] == "records_lost"]
    assert loss["num_records"] + len(records) == 201
    assert "No space left" in loss["reason"] or "part of a line" in loss["reason"]


# ---- Attempts --------------------------------------------------------------------------------------------------------


def test_eight_processes_that_claim_at_once_get_eight_numbers(run: Run, start: Start) -> None:
    program = f"""
from pathlib import Path
from latentwire.run.directory import Run
import psutil
print("ready", flush=True)
input()
for _ in range(5):
    print(Run(Path({str(run.path)!r})).claim_attempt("1", "local").number, flush=True)
"""
    processes = [start(program) for _ in range(8)]
    assert [first_line(process) for process in processes] == ["ready"] * 8
    for process in processes:
        go_on(process)
    numbers = [[int(line) for line in process.communicate()[0].split()] for process in processes]
    assert sorted(n for each in numbers for n in each) == list(range(1, 41))
    assert all(each == sorted(each) for each in numbers), "a later claim has a higher number"
    assert [attempt.number for attempt in run.attempts()] == list(range(1, 41))
    for number, process in zip(numbers, processes, strict=True):
        agent = Attempt(run, number[0]).agent()
        assert agent is not None
        assert agent.pid == process.pid
    assert {entry for entry in os.listdir(run.path / "attempts") if entry.startswith(".")} == set()


def test_an_attempt_is_fenced_by_the_next(run: Run) -> None:
    first = run.claim_attempt("1", "local")
    first.assert_newest()
    assert first.is_newest()
    second = run.claim_attempt("2", "local")
    assert not first.is_newest()
    with pytest.raises(Fenced, match="attempt 1 of test was superseded by attempt 2"):
        first.assert_newest()
    second.assert_newest()


def test_an_agent_that_was_superseded_claims_no_more(run: Run) -> None:
    mine = run.claim_attempt("1", "slurm")
    mine = run.claim_attempt("1", "slurm", after=mine)
    theirs = run.claim_attempt("1", "slurm", restart=1)
    with pytest.raises(Fenced, match="attempt 3"):
        run.claim_attempt("1", "slurm", after=mine)
    assert run.attempts() == [Attempt(run, 1), mine, theirs]
    assert theirs.record()["restart"] == 1
    assert sorted(path.name for path in theirs.path.parent.iterdir()) == ["0001", "0002", "0003"]


def test_numbers_go_on_past_four_digits(run: Run) -> None:
    (run.path / "attempts" / "9999").mkdir(parents=True)
    assert run.claim_attempt("1", "local").path.name == "10000"
    assert run.newest_number() == 10000


def test_other_entries_are_no_attempts(run: Run) -> None:
    for name in (".claim-abc", "12", "notes", "0001.bak"):
        (run.path / "attempts" / name).mkdir(parents=True)
    assert run.attempts() == []
    assert run.newest_number() == 0


def test_a_checkpoint_under_two_marks_is_deadly(run: Run) -> None:
    attempts = [run.claim_attempt(str(number), "local") for number in range(4)]
    assert run.deadly_checkpoints() == set()
    attempts[0].mark_restoring("step-00000005")
    attempts[1].mark_restoring("step-00000004")
    assert run.deadly_checkpoints() == set()
    attempts[2].mark_restoring("step-00000005")
    assert attempts[2].restoring() == "step-00000005"
    assert run.deadly_checkpoints() == {"step-00000005"}
    attempts[2].unmark_restoring()
    attempts[2].unmark_restoring()
    assert attempts[2].restoring() is None
    assert run.deadly_checkpoints() == set()


def test_events_of_all_writers_are_merged_by_time(run: Run) -> None:
    attempt = run.claim_attempt("1", "local")
    for writer, times in (("agent", (1, 4)), ("rank0", (2, 3))):
        lines = [json.dumps({"time": t, "event": f"e{t}"}) for t in times]
        (attempt.path / f"events.{writer}.jsonl").write_text("\n".join(lines) + "\n")
    assert [(e["event"], e["writer"]) for e in attempt.events()] == [
        ("e1", "agent"), ("e2", "rank0"), ("e3", "rank0"), ("e4", "agent"),
    ]  # fmt: skip


# ---- Directories of runs ---------------------------------------------------------------------------------------------


def test_a_run_is_made_once_and_found_again(tmp_path: Path) -> None:
    run = create_run(config(), tmp_path)
    assert run.config() == config()
    assert create_run(config(), tmp_path) == run
    for name in ("test", "experiment_test", str(run.path)):
        assert open_run(name, tmp_path) == run
    assert list_runs(tmp_path) == [run]
    assert list_runs(tmp_path / "missing") == []


def test_a_run_of_another_config_is_refused_with_the_difference(tmp_path: Path) -> None:
    run = create_run(config(), tmp_path)
    before = (run.path / "config.yaml").read_bytes()
    with pytest.raises(RunConflict) as caught:
        create_run(config(seed=3, train={"steps": 7000}, retry={"oom": 1}), tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[1:3] == ["  seed: 0 -> 3", "  train.steps: 1000 -> 7000"]
    assert str(run.path) in lines[0]
    assert "name=test-2" in lines[3]
    assert len(lines) == 4
    assert (run.path / "config.yaml").read_bytes() == before


def test_settings_of_operation_may_change_between_attempts(tmp_path: Path) -> None:
    create_run(config(), tmp_path)
    assert create_run(config(retry={"oom": 1}), tmp_path).config().retry.oom == 1


def test_an_unknown_run_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(RunNotFound, match=r"no run 'x'.*none yet"):
        open_run("x", tmp_path)
    create_run(config("one"), tmp_path)
    create_run(config("two"), tmp_path)
    with pytest.raises(RunNotFound, match="it has: one, two"):
        open_run("x", tmp_path)


@pytest.mark.parametrize("content", [b"a: [", b"\xff", b"name: 2001-99-99"])
def test_a_damaged_config_says_what_to_do(tmp_path: Path, content: bytes) -> None:
    run = create_run(config(), tmp_path)
    (run.path / "config.yaml").write_bytes(content)
    with pytest.raises(RunError, match="submit the run's config again"):
        run.config()


# ---- Processes -------------------------------------------------------------------------------------------------------


def test_a_process_is_known_until_it_ends(start: Start) -> None:
    process = start("input()")
    identity = ProcessIdentity.of(process.pid)
    assert identity == ProcessIdentity.from_json(json.loads(json.dumps(dataclasses.asdict(identity))))
    assert identity.is_alive() is True
    assert identity.send(signal.SIGTERM) is True
    assert os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT) is not None
    assert identity.is_alive() is False, "a zombie is dead"
    assert process.wait() == -signal.SIGTERM
    assert identity.is_alive() is False
    assert identity.send(signal.SIGTERM) is False
    with pytest.raises(ProcessLookupError, match=str(process.pid)):
        ProcessIdentity.of(process.pid)


def test_a_process_that_only_has_the_pid_is_another(start: Start) -> None:
    process = start("input()")
    earlier = dataclasses.replace(ProcessIdentity.of(process.pid), started=ProcessIdentity.of(process.pid).started - 60)
    assert earlier.is_alive() is False
    assert earlier.send(signal.SIGKILL) is False
    assert process.poll() is None


def test_nobody_can_tell_of_another_host() -> None:
    assert ELSEWHERE.is_alive() is None
    assert ELSEWHERE.send(signal.SIGKILL) is False


def test_a_process_is_known_by_the_name_that_slurm_gives_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    me = ProcessIdentity.of()
    assert (me.host, me.is_alive()) == ("n1", True)
    monkeypatch.setenv("SLURMD_NODENAME", "n0")
    assert me.is_alive() is None


@pytest.mark.parametrize("value", [None, 7, [], {}, {"host": "a", "pid": "x", "started": 1}, {"host": "a", "pid": 1}])
def test_what_is_no_identity_is_none(value: Any) -> None:
    assert ProcessIdentity.from_json(value) is None


# ---- Leases ----------------------------------------------------------------------------------------------------------

LEASE_PROGRAM = """
import sys
from pathlib import Path
from latentwire.errors import RunBusy
from latentwire.run.lease import Lease
lease = Lease(Path({path!r}))
print("ready", flush=True)
input()
try:
    lease.acquire()
    print("mine", flush=True)
except RunBusy as busy:
    print(busy, flush=True)
input()
"""


def hold(path: Path, holder: ProcessIdentity, renewed: float) -> None:
    write_json(path, {"holder": dataclasses.asdict(holder), "renewed": renewed})


def test_a_living_holder_is_not_robbed(run: Run, start: Start) -> None:
    holder = start(LEASE_PROGRAM.format(path=str(run.lease_path)))
    assert first_line(holder) == "ready"
    go_on(holder)
    assert first_line(holder) == "mine"
    lease = Lease(run.lease_path)
    with pytest.raises(RunBusy, match=f"pid {holder.pid} .*kill -TERM {holder.pid}"):
        lease.acquire()
    lease.release()
    assert run.lease_path.exists(), "only the holder gives it back"

    holder.kill()
    holder.communicate()
    assert lease.holder() is None
    lease.acquire()
    assert lease.holder() == ProcessIdentity.of()
    lease.acquire()
    lease.release()
    assert lease.holder() is None


def test_of_those_who_take_it_at_once_exactly_one_gets_it(run: Run, start: Start, dead: ProcessIdentity) -> None:
    hold(run.lease_path, dead, NOW)
    processes = [start(LEASE_PROGRAM.format(path=str(run.lease_path))) for _ in range(6)]
    assert [first_line(process) for process in processes] == ["ready"] * 6
    for process in processes:
        go_on(process)
    answers = [first_line(process) for process in processes]
    assert answers.count("mine") == 1
    winner = processes[answers.index("mine")]
    assert all(f"pid {winner.pid}" in answer for answer in answers if answer != "mine")


def test_a_holder_elsewhere_is_judged_by_its_last_renewal(run: Run) -> None:
    hold(run.lease_path, ELSEWHERE, renewed=NOW)
    with pytest.raises(RunBusy, match="another-host"):
        Lease(run.lease_path, clock=lambda: NOW + STALE_AFTER_S - 1).acquire()
    Lease(run.lease_path, clock=lambda: NOW + STALE_AFTER_S + 1).acquire()


def test_a_holder_that_slept_too_long_does_not_take_the_lease_back(run: Run) -> None:
    lease = Lease(run.lease_path, clock=lambda: NOW)
    lease.acquire()
    lease.renew()
    hold(run.lease_path, ELSEWHERE, renewed=NOW)
    with pytest.raises(RunBusy, match=r"taken over .*another-host"):
        lease.renew()
    assert lease.holder() == ELSEWHERE


BATCH_STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "ENVIRONMENT": "BATCH"}
"""What sbatch and srun tell the orchestrator of slurm/preemptible_orchestrator.slurm."""
SALLOC_SHELL = {"SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    ("environ", "other", "refusal"),
    [
        (SALLOC_SHELL, SALLOC_SHELL, "kill -TERM {pid} there"),
        (BATCH_STEP, BATCH_STEP, "scancel 7"),
        (BATCH_STEP, {}, "scancel 7"),
        (BATCH_STEP | {"SLURM_RESTART_COUNT": "1"}, BATCH_STEP, "scancel 7"),
        (BATCH_STEP, BATCH_STEP | {"SLURM_RESTART_COUNT": "1"}, None),
        (BATCH_STEP | {"SLURM_RESTART_COUNT": "1"}, BATCH_STEP | {"SLURM_RESTART_COUNT": "2"}, None),
        (BATCH_STEP, BATCH_STEP | {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}, "scancel 7"),
    ],
    ids=[
        "two in one allocation",
        "two in one job",
        "from outside of its job",
        "a job that was requeued since",
        "itself before a requeue",
        "itself before another",
        "another job",
    ],
)
def test_a_holder_in_a_slurm_job_is_gone_once_that_job_was_started_again(
    run: Run, start: Start, environ: dict[str, str], other: dict[str, str], refusal: str | None
) -> None:
    program = LEASE_PROGRAM.format(path=str(run.lease_path))
    first, second = start(program, environ), start(program, other)
    answers = []
    for process in (first, second):
        assert first_line(process) == "ready"
        go_on(process)
        answers.append(first_line(process))
    assert answers[0] == "mine"
    if refusal is None:
        assert answers[1] == "mine"
    else:
        assert f"with pid {first.pid} on " in answers[1]
        assert f"({refusal.format(pid=first.pid)})" in answers[1]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"holder": 7}'])
def test_a_damaged_lease_is_nobodys(run: Run, content: str) -> None:
    run.lease_path.write_text(content)
    Lease(run.lease_path).acquire()


def test_a_file_system_without_locks_will_do(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    Lease(run.lease_path).acquire()
    assert Lease(run.lease_path).holder() == ProcessIdentity.of()


# ---- Budgets ---------------------------------------------------------------------------------------------------------


def end_attempt(run: Run, outcome: str | None, cause: str | None = None, committed: int | None = None) -> Attempt:
    """An attempt that ended so, and perhaps committed a step; ``None``: lost without a word."""
    attempt = run.claim_attempt("1", "local")
    if committed is not None:
        tell(attempt, "rank0", "save_committed", step=committed)
    if outcome is not None:
        words = {"cause": cause, "error": f"why {attempt.number}"} if outcome == "failed" else {}
        tell(attempt, "agent", "attempt_ended", outcome=outcome, **words)
    return attempt


def tell(attempt: Attempt, writer: str, event: str, time: float = NOW, **fields: Any) -> None:
    journal = Journal(attempt.path / f"events.{writer}.jsonl", clock=lambda: time)
    journal.event(event, **fields)
    journal.close()


def test_a_run_that_was_never_started_is_started(run: Run) -> None:
    assert next_move(run, RETRY).again


@pytest.mark.parametrize(
    ("cause", "outcome", "allowed"),
    [("oom", "failed", 2), ("network", "failed", 3), ("other", "failed", 1), ("never heard of", "failed", 1),
     (None, "failed", 1), ("killed", "failed", 2), (None, None, 2), ("user", "failed", 0)],
)  # fmt: skip
def test_each_cause_has_its_budget(run: Run, cause: str | None, outcome: str | None, allowed: int) -> None:
    for _ in range(allowed):
        end_attempt(run, outcome, cause)
        assert next_move(run, RETRY).again
    end_attempt(run, outcome, cause)
    move = next_move(run, RETRY)
    assert not move.again
    assert move.reason


@pytest.mark.parametrize("outcome", ["finished", "interrupted", "cancelled", "fenced"])
def test_what_ended_on_purpose_is_not_started_again(run: Run, outcome: str) -> None:
    end_attempt(run, outcome)
    assert not next_move(run, RETRY).again


def test_preemptions_never_count(run: Run) -> None:
    for _ in range(30):
        end_attempt(run, "preempted")
        assert next_move(run, RETRY) == dataclasses.replace(next_move(run, RETRY), again=True, pause_s=0.0)
    end_attempt(run, "failed", "other")
    assert next_move(run, RETRY).again


def test_a_step_gained_sets_the_counts_to_zero(run: Run) -> None:
    end_attempt(run, "failed", "other")
    end_attempt(run, "failed", "other", committed=5)
    assert next_move(run, RETRY).again, "the second counts as the first"
    end_attempt(run, "failed", "other", committed=5)
    assert not next_move(run, RETRY).again, "the same step again is no gain"


def test_causes_are_counted_apart(run: Run) -> None:
    for cause in ("oom", "network", "other", "oom", "network"):
        end_attempt(run, "failed", cause)
        assert next_move(run, RETRY).again
    end_attempt(run, "failed", "other")
    assert not next_move(run, RETRY).again


def test_the_pause_after_network_failures_doubles_to_five_minutes(run: Run) -> None:
    patient = RetrySection(network=100)
    pauses = []
    for _ in range(9):
        end_attempt(run, "failed", "network")
        pauses.append(next_move(run, patient).pause_s)
    assert pauses == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    end_attempt(run, "failed", "oom")
    assert next_move(run, patient).pause_s == 0


def test_every_time_out_of_memory_halves_the_micro_batch(run: Run) -> None:
    end_attempt(run, "failed", "oom", committed=1)
    end_attempt(run, "preempted")
    end_attempt(run, "failed", "oom", committed=2)
    assert num_halvings(run) == 2


def test_an_attempt_without_a_word_is_lost(run: Run) -> None:
    assert verdict_of(end_attempt(run, None)).outcome == "lost"
    assert verdict_of(end_attempt(run, "failed", "oom")).cause == "oom"


# ---- Status ----------------------------------------------------------------------------------------------------------


def with_agent(attempt: Attempt, agent: ProcessIdentity) -> Attempt:
    write_json(attempt.path / "attempt.json", attempt.record() | {"agent": dataclasses.asdict(agent), "claimed": NOW})
    return attempt


def state_of(run: Run, now: float = NOW) -> tuple[str, str | None]:
    status = run_status(run, now)
    return status.state, status.reason


def test_pending(run: Run) -> None:
    assert state_of(run) == ("PENDING", "not started yet")
    assert run_status(run).job_id is None
    write_line(run.orchestrator_events, {"time": NOW, "event": "submitted", "job_id": 77})
    assert run_status(run).job_id == "77"


def write_line(path: Path, record: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def test_running_with_all_that_is_known(run: Run) -> None:
    attempt = run.claim_attempt("42", "local")
    tell(attempt, "agent", "attempt_started", total_steps=100)
    tell(attempt, "rank0", "restored", step=8)
    tell(attempt, "rank0", "training_started")
    tell(attempt, "rank0", "save_committed", step=10)
    tell(attempt, "rank0", "save_verified", NOW + 1, step=10)
    for step in (9, 10):
        line = {"time": NOW + step, "step": step, "loss": 1 / step, "samples_per_s": 64.0, "step_s": 0.5}
        write_line(attempt.path / "metrics.jsonl", line)
    write_line(attempt.path / "metrics.jsonl", {"time": NOW + 11, "step": 10, "eval/loss": 0.3})
    status = run_status(run, NOW + 12)
    assert (status.state, status.reason, status.phase) == ("RUNNING", None, "training")
    assert (status.attempt, status.job_id) == (1, "42")
    assert (status.step, status.total_steps, status.loss) == (10, 100, 0.1)
    assert (status.samples_per_s, status.eta_s) == (64.0, 45.0)
    assert (status.committed_step, status.verified_at) == (10, NOW + 1)
    assert status.weights_sha256 is None
    assert json.loads(status.to_json({}))["name"] == "test"


def test_phases_follow_the_events(run: Run) -> None:
    attempt = run.claim_attempt("1", "local")
    phases = []
    for second, event in enumerate(
        ("attempt_started", "placed", "workload_built", "warmup_started", "training_started", "evaluation_started",
         "evaluation_finished", "notice")
    ):  # fmt: skip
        tell(attempt, "rank0", event, NOW + second)
        phases.append(run_status(run, NOW).phase)
    assert phases == [
        "starting", "building", "restoring", "warming up", "training", "evaluating", "training", "draining",
    ]  # fmt: skip


def test_stalled(run: Run) -> None:
    attempt = run.claim_attempt("1", "local")
    tell(attempt, "agent", "attempt_started", total_steps=100)
    assert state_of(run, NOW + STALLED_S - 1) == ("RUNNING", None)
    assert state_of(run, NOW + STALLED_S + 1) == ("STALLED", f"no step for {STALLED_S + 1:.0f} s")


def test_the_newest_forecast_of_a_running_attempt_stands(run: Run) -> None:
    def foretold() -> tuple[float | None, float | None, str | None, str | None]:
        status = run_status(run, NOW)
        return status.notice_needs_s, status.grace_s, status.warning, status.advice

    short = {"needs_s": 25.0, "grace_s": 20.0, "warning": "a notice saves nothing", "advice": "save sooner"}
    attempt = run.claim_attempt("1", "slurm")
    tell(attempt, "agent", "attempt_started")
    assert foretold() == (None, None, None, None)
    tell(attempt, "agent", "forecast", **short)
    assert foretold() == (25.0, 20.0, "a notice saves nothing", "save sooner")
    assert state_of(run) == ("RUNNING", None), "a warning is no trouble"
    tell(attempt, "rank0", "forecast", NOW + 1, needs_s=5.0, grace_s=20.0)
    assert foretold() == (5.0, 20.0, None, None)
    tell(attempt, "rank0", "forecast", NOW + 2, **short)
    tell(attempt, "agent", "attempt_ended", NOW + 3, outcome="preempted")
    assert foretold() == (None, None, None, None), "of a run that is not running"
    tell(run.claim_attempt("1", "slurm"), "agent", "attempt_started", NOW + 4)
    assert foretold() == (None, None, None, None), "the next attempt makes its own"


@pytest.mark.parametrize(
    ("outcome", "state"),
    [("finished", "DONE"), ("preempted", "PREEMPTED"), ("interrupted", "STOPPED"), ("cancelled", "CANCELLED"),
     ("failed", "RETRYING")],
)  # fmt: skip
def test_ended(run: Run, outcome: str, state: str) -> None:
    end_attempt(run, outcome, "other")
    assert run_status(run).state == state
    assert run_status(run).phase is None


def test_the_reason_of_a_failure_is_its_error(run: Run) -> None:
    end_attempt(run, "failed", "other")
    assert state_of(run) == ("RETRYING", "why 1")


def test_lost(run: Run, dead: ProcessIdentity) -> None:
    with_agent(run.claim_attempt("1", "local"), dead)
    status = run_status(run, NOW)
    assert (status.state, status.num_lost) == ("LOST", 1)
    assert "without a word" in str(status.reason)


def test_an_attempt_elsewhere_lives_while_its_monitor_writes(run: Run) -> None:
    attempt = with_agent(run.claim_attempt("1", "slurm"), ELSEWHERE)
    assert run_status(run, NOW + HEARTBEAT_S - 1).state == "RUNNING"
    assert run_status(run, NOW + HEARTBEAT_S + 1).state == "LOST"
    write_line(attempt.path / "gpu_stats.jsonl", {})
    os.utime(attempt.path / "gpu_stats.jsonl", (NOW + 500, NOW + 500))
    assert run_status(run, NOW + 500 + HEARTBEAT_S - 1).state == "RUNNING"
    assert run_status(run, NOW + 500 + HEARTBEAT_S + 1).state == "LOST"


def test_cancelled_by_hand(run: Run, dead: ProcessIdentity) -> None:
    write_json(run.cancel_path, {})
    assert state_of(run) == ("CANCELLED", "cancelled by hand")
    with_agent(run.claim_attempt("1", "local"), dead)
    assert state_of(run) == ("CANCELLED", "cancelled by hand")
    end_attempt(run, "finished")
    assert state_of(run) == ("DONE", None), "what is done is done"


def test_given_up_until_it_is_submitted_again(run: Run) -> None:
    end_attempt(run, "failed", "network")
    write_line(run.orchestrator_events, {"time": NOW, "event": "given_up", "reason": "4 times network"})
    assert state_of(run) == ("FAILED", "4 times network")
    write_line(run.orchestrator_events, {"time": NOW, "event": "submitted", "job_id": "2"})
    assert state_of(run) == ("RETRYING", "why 1")


def test_attempts_are_counted_by_how_they_ended(run: Run, dead: ProcessIdentity) -> None:
    for outcome in ("preempted", "preempted", "failed"):
        end_attempt(run, outcome, committed=3)
    with_agent(run.claim_attempt("9", "local"), dead)
    last = end_attempt(run, "finished")
    tell(last, "rank0", "training_finished", step=20, weights_sha256="ab")
    tell(last, "rank1", "training_finished", step=20, weights_sha256=None)
    status = run_status(run)
    assert (status.state, status.attempt, status.num_preemptions, status.num_lost) == ("DONE", 5, 2, 1)
    assert (status.step, status.weights_sha256, status.committed_step) == (20, "ab", 3)


def test_half_written_files_do_not_upset_the_status(run: Run) -> None:
    attempt = run.claim_attempt("1", "local")
    tell(attempt, "agent", "attempt_started", total_steps=10)
    for name in ("events.rank0.jsonl", "events.agent.jsonl", "metrics.jsonl"):
        with open(attempt.path / name, "ab") as file:
            file.write(b'{"time": 5, "event": "resto')
    run.orchestrator_events.write_text('{"time"')
    assert run_status(run, NOW).state == "RUNNING"
    (attempt.path / "attempt.json").write_text("{")
    assert run_status(run, NOW).state == "LOST"


# ---- Roll-ups --------------------------------------------------------------------------------------------------------


def test_steps_that_were_redone_stand_as_the_later_attempt_had_them(run: Run) -> None:
    for losses in ({1: 9.0, 2: 8.0, 3: 7.0}, {3: 6.0, 4: 5.0}):
        attempt = run.claim_attempt("1", "local")
        for step, loss in losses.items():
            write_line(attempt.path / "metrics.jsonl", {"step": step, "loss": loss, "step_s": 0.5})
        write_line(attempt.path / "metrics.jsonl", {"step": 3, "eval/loss": losses[3] / 2})
    curve = [(r["step"], r["loss"], r["attempt"]) for r in merged_metrics(run) if "loss" in r]
    assert curve == [(1, 9.0, 1), (2, 8.0, 1), (3, 6.0, 2), (4, 5.0, 2)]
    summary = summarise_metrics(run)
    assert (summary["attempts"], summary["steps"], summary["step_s_total"]) == (2, 4, 2.0)
    assert summary["best_evaluation"]["eval/loss"] == 3.0
    assert summarise_metrics(Run(run.path / "nothing")) == {"attempts": 0, "steps": 0}


@pytest.mark.parametrize(
    "line", ['{"step": null, "loss": 1}', '{"step": "x", "loss": []}', '{"event": "restored", "step": {}}']
)
def test_lines_of_another_type_do_not_upset_the_status(run: Run, line: str) -> None:
    attempt = run.claim_attempt("1", "local")
    for name in ("metrics.jsonl", "events.rank0.jsonl", "events.agent.jsonl"):
        (attempt.path / name).write_text(line + "\n", encoding="utf-8")
    assert run_status(run).step == 0
