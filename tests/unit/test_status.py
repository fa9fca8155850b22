"""The status that is folded from a run's files, and the roll-ups over its attempts."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from run_parts import ELSEWHERE, NOW, end_attempt, tell

from latentwire.run.atomic import write_json
from latentwire.run.curve import merged_metrics
from latentwire.run.directory import Attempt, Run
from latentwire.run.process import ProcessIdentity
from latentwire.run.rollup import summarise_metrics
from latentwire.run.status import HEARTBEAT_S, STALLED_S, run_status


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
        write_line(attempt.metrics_path, line)
    write_line(attempt.metrics_path, {"time": NOW + 11, "step": 10, "eval/loss": 0.3})
    status = run_status(run, NOW + 12)
    assert (status.state, status.reason, status.phase) == ("RUNNING", None, "training")
    assert (status.attempt, status.job_id) == (1, "42")
    assert (status.step, status.total_steps, status.loss) == (10, 100, 0.1)
    assert (status.samples_per_s, status.eta_s) == (64.0, 90.0), "a second a step, by the times of the last"
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


def test_a_loop_of_ones_own_knows_its_steps_better_than_the_config(run: Run) -> None:
    attempt = run.claim_attempt("1", "local")
    tell(attempt, "agent", "attempt_started", total_steps=100)
    assert run_status(run).total_steps == 100
    tell(attempt, "rank0", "training_started", step=0, total_steps=600)
    tell(run.claim_attempt("2", "local"), "agent", "attempt_started", NOW + 50, total_steps=100)
    assert run_status(run).total_steps == 600, "also while the next attempt starts"


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


def test_a_rank_that_is_waited_for_is_named_until_it_comes(run: Run) -> None:
    hang = {"ranks": [1], "at": ["save"], "waiting": [0, 2], "waited_s": 121.4}
    reason = "rank 1 (save) did not come for 121 s, awaited by ranks 0, 2"
    attempt = run.claim_attempt("1", "slurm")
    tell(attempt, "agent", "attempt_started")
    tell(attempt, "agent", "hang", **hang)
    assert state_of(run) == ("RUNNING", reason)
    assert state_of(run, NOW + STALLED_S + 1) == ("STALLED", reason)
    tell(attempt, "agent", "hang_over", NOW + 1, **hang)
    assert state_of(run) == ("RUNNING", None)


@pytest.mark.parametrize(
    ("outcome", "state"),
    [("finished", "DONE"), ("preempted", "PREEMPTED"), ("interrupted", "STOPPED"), ("cancelled", "CANCELLED"),
     ("failed", "RETRYING")],
)  # fmt: skip
def test_ended(run: Run, outcome: str, state: str) -> None:
    write_line(run.orchestrator_events, {"time": NOW - 9, "event": "submitted", "job_id": "1"})
    end_attempt(run, outcome, "other")
    assert run_status(run).state == state
    assert run_status(run).phase is None


def test_the_reason_of_a_failure_is_its_error(run: Run) -> None:
    end_attempt(run, "failed", "other")
    assert state_of(run) == ("FAILED", "why 1"), "nobody tries again what was no job of ours"


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


def test_checkpoints_that_are_gone_are_told(run: Run) -> None:
    end_attempt(run, "preempted", committed=8)
    assert state_of(run) == ("PREEMPTED", f"step 8 was committed, and {run.checkpoints} holds no checkpoint any more")
    (run.checkpoints / "step-00000008").mkdir(parents=True)
    assert "committed" not in str(state_of(run)[1])


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
    write_line(run.orchestrator_events, {"time": NOW, "event": "resumed", "after_attempt": 1})
    assert state_of(run) == ("RETRYING", "why 1")
    write_line(run.orchestrator_events, {"time": NOW, "event": "submitted", "job_id": "2"})
    assert state_of(run) == ("REQUEUED", "retrying, waits as job 2")


def test_a_job_that_requeued_itself_waits(run: Run) -> None:
    attempt = end_attempt(run, "preempted")
    tell(attempt, "agent", "requeue", done=False, reason="refused")
    assert state_of(run) == ("PREEMPTED", None)
    tell(attempt, "agent", "requeue", done=True)
    assert state_of(run) == ("REQUEUED", "preempted, waits as job 1")


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
            write_line(attempt.metrics_path, {"step": step, "loss": loss, "step_s": 0.5})
        write_line(attempt.metrics_path, {"step": 3, "eval/loss": losses[3] / 2})
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


def test_the_alerts_of_a_running_attempt_are_its_reason_until_they_are_over(run: Run) -> None:
    attempt = with_agent(run.claim_attempt("1", "local"), ProcessIdentity.of())
    tell(attempt, "agent", "attempt_started", NOW)
    tell(attempt, "agent", "alert", NOW, alert="temperature", text="the GPU is hot")
    tell(attempt, "agent", "alert", NOW, alert="disk_space", text="the disk is full")
    assert state_of(run) == ("RUNNING", "the GPU is hot; the disk is full")
    tell(attempt, "agent", "alert_over", NOW + 1, alert="temperature", text="the GPU is cool")
    assert state_of(run) == ("RUNNING", "the disk is full")
    tell(attempt, "agent", "alert", NOW + 1, alert="grace", text="a notice saves nothing")
    assert state_of(run) == ("RUNNING", "the disk is full"), "the forecast says that in its own place"
    tell(attempt, "agent", "attempt_ended", NOW + 2, outcome="preempted")
    assert state_of(run)[0] == "PREEMPTED"
    tell(with_agent(run.claim_attempt("2", "local"), ProcessIdentity.of()), "agent", "attempt_started", NOW + 3)
    assert state_of(run) == ("RUNNING", None)
