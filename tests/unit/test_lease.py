"""Who a process is, and who looks after a run."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from run_parts import ELSEWHERE, NOW, Start, first_line, go_on

from latentwire.errors import RunBusy
from latentwire.run.atomic import write_json
from latentwire.run.directory import Run
from latentwire.run.lease import STALE_AFTER_S, Lease
from latentwire.run.process import ProcessIdentity


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
