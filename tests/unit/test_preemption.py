"""Notices: real signals to real processes, and what the deadline makes of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentwire.preemption.deadline import MARGIN_S, Pace, deadline, step_fits
from latentwire.preemption.handler import EXIT_CODE, HANDLED, Notice, Preempted, PreemptionHandler, blocked

TERM, INT, USR1, USR2 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2


class Child:
    """A process of notice_child.py."""

    def __init__(self, save_signal: str) -> None:
        program = Path(__file__).with_name("notice_child.py")
        command = [sys.executable, str(program), save_signal]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._answer() == "hello"

    def do(self, order: str) -> Any:
        assert self.process.stdin is not None
        print(order, file=self.process.stdin, flush=True)
        return self._answer()

    def send(self, *signals: signal.Signals) -> Child:
        """Send signals one by one; each is delivered before the next, for the child answers in between."""
        for signum in signals:
            self.process.send_signal(signum)
            self.do("ping")
        return self

    def state(self) -> dict[str, Any]:
        answer = self.do("state")
        assert isinstance(answer, dict)
        return answer

    def signal_of_notice(self) -> str | None:
        notice = self.state()["notice"]
        return None if notice is None else notice["signal"]

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


Start = Callable[..., Child]


@pytest.fixture
def start() -> Iterator[Start]:
    children: list[Child] = []

    def start(save_signal: str = "USR1", install: bool = True) -> Child:
        children.append(Child(save_signal))
        if install:
            children[-1].do("install")
        return children[-1]

    yield start
    for child in children:
        child.process.kill()
        child.process.communicate()


# ---- What a signal means ---------------------------------------------------------------------------------------------


def test_nothing_came(start: Start) -> None:
    assert start().state() == {"notice": None, "save_asked": False, "leave_now": False}


@pytest.mark.parametrize("signum", [TERM, USR2, INT])
def test_a_notice_is_recorded_with_its_time(start: Start, signum: signal.Signals) -> None:
    child = start()
    before = time.monotonic(), time.time()
    state = child.send(signum).state()
    after = time.monotonic(), time.time()
    assert state["notice"]["signal"] == signum.name
    assert before[0] <= state["notice"]["monotonic_s"] <= after[0]
    assert before[1] <= state["notice"]["unix_s"] <= after[1]
    assert (state["save_asked"], state["leave_now"]) == (False, False)


def test_a_second_notice_changes_nothing(start: Start) -> None:
    child = start()
    first = child.send(TERM).state()
    assert child.send(TERM, USR2, INT).state() == first


def test_usr1_asks_for_one_save_and_is_no_notice(start: Start) -> None:
    child = start()
    assert child.send(USR1, USR1).state() == {"notice": None, "save_asked": True, "leave_now": False}
    assert child.state()["save_asked"] is False
    assert child.send(USR1).state()["save_asked"] is True


def test_int_twice_means_leave_now(start: Start) -> None:
    child = start()
    assert child.send(INT).state()["leave_now"] is False
    state = child.send(INT).state()
    assert state["leave_now"] is True
    assert state["notice"]["signal"] == "SIGINT"


def test_int_twice_after_a_notice_means_leave_now(start: Start) -> None:
    state = start().send(TERM, INT, INT).state()
    assert (state["notice"]["signal"], state["leave_now"]) == ("SIGTERM", True)


def test_the_save_signal_can_be_usr2(start: Start) -> None:
    child = start("USR2")
    assert child.send(USR2).state() == {"notice": None, "save_asked": True, "leave_now": False}
    assert child.send(USR1).state() == {"notice": None, "save_asked": False, "leave_now": False}
    assert child.send(TERM).signal_of_notice() == "SIGTERM"


def test_without_a_save_signal_usr1_means_nothing_and_kills_nobody(start: Start) -> None:
    child = start("none")
    assert child.send(USR1).state() == {"notice": None, "save_asked": False, "leave_now": False}
    assert child.send(USR2).signal_of_notice() == "SIGUSR2"


# ---- Where and when handlers stand -----------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [TERM, USR2, INT])
def test_a_signal_that_came_before_the_handlers_is_recorded(start: Start, signum: signal.Signals) -> None:
    with blocked():
        child = start(install=False)
    child.send(signum)
    assert child.signal_of_notice() is None
    child.do("install")
    assert child.signal_of_notice() == signum.name


def test_a_signal_sent_while_blocked_here_is_delivered_after() -> None:
    with PreemptionHandler() as handler:
        with blocked():
            signal.raise_signal(TERM)  # to this thread: another would take it, were it sent to the process
            assert handler.notice is None
        assert handler.notice is not None
        assert handler.notice.signal == "SIGTERM"


def test_what_was_bound_before_is_put_back() -> None:
    def old(*_: object) -> None: ...

    before = {signum: signal.getsignal(signum) for signum in HANDLED}
    signal.signal(USR2, old)
    try:
        with PreemptionHandler():
            assert all(signal.getsignal(signum) != before[signum] for signum in HANDLED)
        assert signal.getsignal(USR2) is old
        assert all(signal.getsignal(signum) == before[signum] for signum in HANDLED if signum != USR2)
    finally:
        signal.signal(USR2, before[USR2])


def test_after_uninstall_the_process_dies_as_any_other(start: Start) -> None:
    child = start()
    child.do("uninstall")
    child.process.send_signal(TERM)
    assert child.process.wait() == -TERM


@pytest.mark.parametrize("signum", [TERM, USR1, USR2])
def test_a_forked_child_does_not_take_the_notice(start: Start, signum: signal.Signals) -> None:
    child = start()
    forked = child.do("fork")
    os.kill(forked, signum)
    assert child.do(f"reap:{forked}") == -signum, "it ends as if nobody had bound the signal"
    assert child.state() == {"notice": None, "save_asked": False, "leave_now": False}


def test_workers_ignore_all_signals_but_the_kill(start: Start) -> None:
    child = start()
    worker = child.do("fork a worker")
    for signum in HANDLED:
        os.kill(worker, signum)
    os.kill(worker, signal.SIGKILL)
    assert child.do(f"reap:{worker}") == -signal.SIGKILL


def test_a_worker_born_while_signals_are_blocked_has_none_pending(start: Start) -> None:
    with blocked():
        child = start(install=False)
    worker = child.do("fork a worker")
    os.kill(worker, TERM)
    with contextlib.closing(open(f"/proc/{worker}/status", encoding="ascii")) as file:
        fields = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    masks = {name: int(fields[name], 16) for name in ("SigBlk", "SigIgn", "SigPnd", "ShdPnd")}
    handled = sum(1 << signum - 1 for signum in HANDLED)
    assert masks["SigIgn"] & handled == handled
    assert (masks["SigBlk"] | masks["SigPnd"] | masks["ShdPnd"]) & handled == 0
    os.kill(worker, signal.SIGKILL)


def test_preempted_exits_with_a_code_that_means_start_me_again() -> None:
    left = subprocess.run(
        [sys.executable, "-c", "from latentwire.preemption.handler import Preempted; raise Preempted(7)"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (left.returncode, left.stderr) == (EXIT_CODE, "")
    assert Preempted(7).step == 7
    assert not isinstance(Preempted(7), Exception), "an `except Exception` in somebody's loop must not swallow it"


# ---- Deadlines -------------------------------------------------------------------------------------------------------

NOTICE = Notice("SIGTERM", monotonic_s=1000.0, unix_s=5_000_000.0)


@pytest.mark.parametrize(
    ("environ", "end_time", "seconds"),
    [
        ({}, None, 120),
        ({"SLURM_JOB_END_TIME": "5000060"}, None, 60),
        ({"SLURM_JOB_END_TIME": "5009999"}, None, 120),
        ({}, 5_000_030.0, 30),
        ({}, 5_009_999.0, 120),
        ({"SLURM_JOB_END_TIME": "5000060"}, 5_000_030.0, 30),
        ({"SLURM_JOB_END_TIME": "5000020"}, 5_000_030.0, 20),
        ({"SLURM_JOB_END_TIME": "4999999"}, None, 120),
        ({"SLURM_JOB_END_TIME": "5000000"}, 4_000_000.0, 120),
        ({"SLURM_JOB_END_TIME": ""}, None, 120),
        ({"SLURM_JOB_END_TIME": "Unknown"}, None, 120),
        ({"SLURM_JOB_END_TIME": "-1"}, None, 120),
        ({"SLURM_JOB_END_TIME": "²"}, None, 120),
    ],
)
def test_the_deadline_is_the_earliest_end_that_is_still_to_come(
    environ: Mapping[str, str], end_time: float | None, seconds: float
) -> None:
    assert deadline(NOTICE, 120.0, environ, end_time) == NOTICE.monotonic_s + seconds


@given(st.floats(1e-6, 1e6))
def test_a_deadline_is_never_in_the_past(grace_s: float) -> None:
    assert deadline(NOTICE, grace_s, {}) >= NOTICE.monotonic_s


@pytest.mark.parametrize(
    ("durations", "p95"),
    [
        ([], 0.0),
        ([3.0], 3.0),
        ([2.0, 1.0], 2.0),
        (range(1, 21), 19.0),
        (range(100, 0, -1), 95.0),
        ([1000.0] * 50 + [1.0] * 100, 1.0),
        ([1.0] * 94 + [9.0] * 6, 9.0),
        ([1.0] * 95 + [9.0] * 5, 1.0),
    ],
)
def test_the_pace_is_the_95th_percentile_of_the_last_hundred(durations: list[float], p95: float) -> None:
    pace = Pace()
    for duration in durations:
        pace.add(float(duration))
    assert pace.p95 == p95


@pytest.mark.parametrize(
    ("now", "step_left_s", "save_s", "fits"),
    [
        (0.0, 10.0, 5.0, True),
        (0.0, 100 - 5.0 - MARGIN_S, 5.0, False),
        (0.0, 100 - 5.0 - MARGIN_S - 0.5, 5.0, True),
        (82.0, 10.0, 5.0, True),
        (84.0, 10.0, 5.0, False),
        (101.0, 0.0, 0.0, False),
    ],
)
def test_a_step_fits_only_with_its_save_and_a_margin(now: float, step_left_s: float, save_s: float, fits: bool) -> None:
    assert step_fits(now, 100.0, step_left_s, save_s) is fits
