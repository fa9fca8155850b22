"""What Slurm's answers mean, recorded from Slurm 22.05, and which rung of the ladder follows."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import pytest
import stamina
from hypothesis import given
from hypothesis import strategies as st

from latentwire.config import Config, parse_config
from latentwire.errors import SchedulerError
from latentwire.scheduler.jobs import Job
from latentwire.scheduler.ladder import best_rung, next_rung
from latentwire.scheduler.queue import JobState, ask, run_command
from latentwire.scheduler.submission import is_permanent

SQUEUE = """\
1|CANCELLED|None|2026-11-22T05:53:47|2026-11-22T05:53:46|0|gres:gpu:4|abc|
2_0|PENDING|JobArrayTaskLimit|N/A|N/A|1|gres:gpu:4|(null)|
2_1|PENDING|(Nodes required for job are DOWN, DRAINED)|2026-11-22T06:08:47|2026-11-22T05:54:07|2|gres:gpu:h100:2|def|
3|COMPLETING|None|2026-11-22T05:54:07|2026-11-22T05:54:07|0|N/A|def|
"""


def job(job_id: str) -> Job:
    """One of Slurm's."""
    return Job(1, job_id, "slurm", 0.0, None)


def unix_s(text: str) -> float:
    """Slurm writes local times."""
    return datetime.datetime.fromisoformat(text).timestamp()


def squeue(command: Sequence[str]) -> str:
    """The recording."""
    assert command[0] == "squeue"
    return SQUEUE


def no_accounting(command: Sequence[str]) -> str:
    """As on a site without it."""
    raise SchedulerError("sacct: Slurm accounting storage is disabled")


def test_squeue_is_understood() -> None:
    queue = ask([job("1"), job("2_0"), job("2_1"), job("3")], runner=squeue, accounting=no_accounting)
    assert queue.was_cancelled(job("1"))
    assert [queue.is_live(job(each)) for each in ("1", "2_0", "2_1", "3")] == [False, True, True, True]
    assert queue.state_of(job("2_1")) == JobState(
        state="PENDING",
        reason="(Nodes required for job are DOWN, DRAINED)",
        start=unix_s("2026-11-22T06:08:47"),
        eligible=unix_s("2026-11-22T05:54:07"),
        restarts=2,
        gpus_per_node=2,
        comment="def",
    )
    assert queue.ids_with("def") == ["2_1", "3"]
    assert queue.ids_with("") == []


def test_what_slurm_has_forgotten_has_ended_and_the_accounting_knows_how() -> None:
    assert not ask([job("77")], runner=squeue, accounting=no_accounting).is_live(job("77"))
    queue = ask([job("77"), job("1")], runner=squeue, accounting=lambda command: "77|CANCELLED by 1000\n")
    assert queue.was_cancelled(job("77"))
    assert ask([job("77")], runner=squeue, accounting=lambda command: "77|RUNNING\n").is_live(job("77"))


def test_a_slurm_that_does_not_answer_is_no_answer() -> None:
    with pytest.raises(SchedulerError):
        ask([job("1")], runner=no_accounting)


def test_slurm_is_not_asked_without_need() -> None:
    assert ask([], runner=no_accounting).ids_with("abc") == []
    assert ask([], unknown_ones=True, runner=squeue).ids_with("abc") == ["1"], "a person cancelled it"


def test_a_command_is_tried_three_times() -> None:
    with stamina.set_testing(True, attempts=3), pytest.raises(SchedulerError, match="exit 1"):
        run_command(["false"])
    assert run_command(["echo", "yes"]) == "yes\n"


@pytest.mark.parametrize(
    ("said", "permanent"),
    [
        ("sbatch: error: invalid partition specified: nowhere", True),
        (
            "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
            True,
        ),
        ("sbatch: error: Batch job submission failed: Requested node configuration is not available", True),
        ("sbatch: unrecognized option '--nonsense'", True),
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)", False),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", False),
        ("sbatch: error: QOSMaxSubmitJobPerUserLimit", False),
    ],
)
def test_only_a_refusal_that_would_stand_is_permanent(said: str, permanent: bool) -> None:
    assert is_permanent(SchedulerError(said)) == permanent


# --- the ladder -------------------------------------------------------------------------------------------------------


def config(gpus: object = (4, 2, 1), nodes: int = 1, patience_s: float = 100.0) -> Config:
    """A config with that ladder."""
    scheduler = {"gpus": gpus, "nodes": nodes}
    tree = {
        "name": "a",
        "workload": {"target": "script"},
        "scheduler": scheduler,
        "elastic": {"patience_s": patience_s},
    }
    return parse_config(tree, "here")


def waiting(gpus_per_node: int, eligible: float | None = 1000.0, reason: str = "Resources") -> JobState:
    """A pending job."""
    return JobState("PENDING", reason, eligible=eligible, gpus_per_node=gpus_per_node)


@pytest.mark.parametrize(
    ("state", "decided", "now", "rung"),
    [
        (waiting(4), None, 1099.0, None),
        (waiting(4), None, 1100.0, 2),
        (waiting(2), None, 1100.0, 1),
        (waiting(1), None, 9999.0, None),
        (waiting(4), 1050.0, 1100.0, None),
        (waiting(4), 1050.0, 1150.0, 2),
        (waiting(3), None, 1100.0, 2),
        (waiting(4, eligible=None), None, 9999.0, None),
        (waiting(4, eligible=5000.0), None, 2000.0, None),
        (waiting(4, reason="BeginTime"), None, 9999.0, None),
        (waiting(4, reason="JobHeldUser"), None, 9999.0, None),
        (waiting(4, reason="Dependency"), None, 9999.0, None),
        (waiting(4, reason="Priority"), None, 9999.0, 2),
        (JobState("RUNNING", eligible=1000.0, gpus_per_node=4), None, 9999.0, None),
    ],
)
def test_the_next_rung(state: JobState, decided: float | None, now: float, rung: int | None) -> None:
    assert next_rung(config(), state, decided, now) == rung


def test_rungs_are_gpus_over_all_nodes() -> None:
    assert next_rung(config((4, 2), nodes=2), waiting(2), None, 1100.0) == 2


@given(st.dictionaries(st.sampled_from([4, 2, 1]), st.none() | st.floats(0, 1000), min_size=3))
def test_the_best_rung_is_the_most_that_can_start_soon_else_the_first(wait: dict[int, float | None]) -> None:
    now = datetime.datetime.now().timestamp()

    def start_of(_: Config, rung: int) -> float | None:
        seconds = wait[rung]
        return None if seconds is None else now + seconds

    rung = best_rung(config(), start_of)
    soon = [each for each in (4, 2, 1) if (wait[each] or 0) <= 99 and wait[each] is not None]
    known = {each: seconds for each, seconds in wait.items() if seconds is not None}
    if soon:
        assert rung == max(soon)
    elif not known:
        assert rung == 4
    elif min(known.values()) > 101:
        assert known[rung] == min(known.values())
