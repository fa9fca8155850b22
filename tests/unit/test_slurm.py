"""What a job makes of Slurm's answers; each line is what Slurm 22.05 said to a job while it was being ended."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from latentwire.errors import SchedulerError
from latentwire.scheduler import slurm

ENDING = {
    "scancel": "JobState=COMPLETING Reason=None Restarts=0 ExitCode=0:15 PreemptTime=None",
    "time limit": "JobState=COMPLETING Reason=TimeLimit Restarts=0 ExitCode=0:15 PreemptTime=None",
    "preempted in a CANCEL partition": "JobState=COMPLETING Reason=None Restarts=0 ExitCode=0:15 "
    "PreemptTime=2026-11-22T05:56:51",
    "scontrol requeue": "JobState=COMPLETING Reason=None Restarts=1 ExitCode=0:0",
    "scontrol requeuehold": "JobState=COMPLETING Reason=job_requeued_in_held_state Restarts=1 ExitCode=0:0",
    "batch script killed": "JobState=COMPLETING Reason=JobLaunchFailure Restarts=0 ExitCode=0:15 PreemptTime=None",
    "batch script over": "JobState=COMPLETING Reason=None Restarts=0 ExitCode=0:0 PreemptTime=None",
    "scancel with a signal": "JobState=RUNNING Reason=None Restarts=0 ExitCode=0:0 PreemptTime=None",
}


def saying(*answers: str) -> slurm.Runner:
    """A Slurm that gives these answers, then the last for ever."""
    left = list(answers)

    def run(command: Sequence[str]) -> str:
        return left.pop(0) if len(left) > 1 else left[0]

    return run


@pytest.mark.parametrize("how", ENDING)
def test_only_a_plain_scancel_is_a_cancel(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "_EXIT_CODE_WITHIN_S", 0.0)
    assert slurm.was_cancelled("1", 0, saying(ENDING[how])) == (how == "scancel")


def test_a_restarted_job_that_is_cancelled_has_its_own_count_of_restarts() -> None:
    answer = ENDING["scancel"].replace("Restarts=0", "Restarts=2")
    assert slurm.was_cancelled("1", 2, saying(answer))
    assert not slurm.was_cancelled("1", 1, saying(answer))


def test_the_exit_code_of_a_cancelled_job_comes_late() -> None:
    early = ENDING["scancel"].replace("0:15", "0:0")
    assert slurm.was_cancelled("1", 0, saying(early, early, ENDING["scancel"]))


def test_no_answer_is_no_cancel() -> None:
    def run(command: Sequence[str]) -> str:
        raise SchedulerError("slurmctld is down")

    assert not slurm.was_cancelled("1", 0, run)
    assert not slurm.is_ending("1", run)
    assert slurm.end_time("1", run) is None


def test_a_job_that_is_being_ended_has_kill_wait_left() -> None:
    config = "KillOnBadExit           = 0\nKillWait                = 30 sec\nLaunchParameters        = (null)\n"
    answer = ENDING["scancel"] + " EndTime=2026-11-22T05:54:56"
    assert slurm.end_time("1", saying(answer, config), clock=lambda: 1000.0) == 1030.0
