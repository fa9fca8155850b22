"""A run that is looked at again and again tells the same as one that is read afresh."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from cli_parts import append, make_run, write_events
from fleet_parts import claim_at, lose, preempt, running, train, write_own

from latentwire.run.directory import Run
from latentwire.run.goodput import ledger_of
from latentwire.run.seen import SeenRun
from latentwire.run.status import is_running, run_status, status_of


def agree(seen: SeenRun, run: Run) -> bool:
    """Whether what was seen gives the status and the ledger that all files, read again, give."""
    now = time.time()
    alive = is_running(run, now)
    same_status = status_of(seen, now) == run_status(run, now)
    return same_status and ledger_of(seen, now, alive) == ledger_of(run, now, alive)


def test_what_is_read_on_is_what_is_read_afresh(home: Path) -> None:
    run, now = make_run(home), time.time() - 1000
    seen = SeenRun(run)
    changes = []

    def look() -> None:
        changes.append(seen.look())
        assert agree(seen, run)
        assert not seen.look(), "nothing was written since"

    write_own(run, (now, "submitted", {"job_id": "1", "scheduler": "slurm"}))
    look()
    first = run.claim_attempt("1", "slurm")
    claim_at(first, now + 1)
    look()
    at = train(first, now + 1, 0, 40)
    look()
    preempt(first, at, 40)
    look()
    write_events(first, "agent", (at + 3, "requeue", {"done": True}))
    look()
    assert status_of(seen, now).state == "REQUEUED"
    second = run.claim_attempt("1", "slurm", restart=1)
    claim_at(second, at + 10)
    lose(second)
    look()
    train(second, at + 10, 20, 30)
    look()
    assert ledger_of(seen, at + 40, alive=False).seconds_of("redoing") > 0
    run.mark_cancelled(user="ada")
    look()
    assert changes == [True] * len(changes)


def test_half_a_line_is_seen_once_it_is_whole(home: Path) -> None:
    run = make_run(home)
    attempt = run.claim_attempt("1", "local")
    write_events(attempt, "agent", (time.time(), "attempt_started", {"total_steps": 100}))
    seen = SeenRun(run)
    append(attempt.metrics_path, '{"time": 5, "step": 7, "loss": 1.5, "st')
    append(attempt.path / "events.rank0.jsonl", '{"time": 5, "event": "save_comm')
    seen.look()
    assert status_of(seen, time.time()).step == 0
    append(attempt.metrics_path, 'ep_s": 1.0}\n')
    append(attempt.path / "events.rank0.jsonl", 'itted", "step": 6}\n')
    assert seen.look()
    assert (status_of(seen, time.time()).step, status_of(seen, time.time()).committed_step) == (7, 6)


def test_what_vanishes_is_seen_no_more(home: Path) -> None:
    run = running(home)
    seen = SeenRun(run)
    shutil.rmtree(run.path / "attempts" / "0003")
    assert seen.look()
    assert agree(seen, run)
    shutil.rmtree(run.path)
    assert seen.look()
    assert status_of(seen, time.time()).state == "PENDING"


def test_a_run_that_is_made_again_under_its_name_is_another(home: Path) -> None:
    run, now = make_run(home), time.time() - 1000
    write_own(run, (now, "submitted", {"job_id": "1", "scheduler": "slurm"}))
    for number in (1, 2):
        attempt = run.claim_attempt(str(number), "slurm")
        preempt(attempt, train(attempt, now + 100 * number, 0, 40), 40)
    seen = SeenRun(run)
    shutil.rmtree(run.path)
    assert make_run(home) == run
    write_own(run, (now, "submitted", {"job_id": "7", "scheduler": "slurm"}))
    for number in (1, 2):  # so many again: nothing is missing
        attempt = run.claim_attempt(f"7{number}", "slurm")
        train(attempt, now + 300 * number, 0, 20)
    assert seen.look()
    assert [event["job_id"] for event in seen.own_events()] == ["7"]
    assert [attempt.record()["job_id"] for attempt in seen.attempts()] == ["71", "72"]
    assert [attempt.ended() for attempt in seen.attempts()] == [None, None]
    assert agree(seen, run)
    assert not seen.look()


def test_an_attempt_that_is_claimed_again_under_its_number_is_another(home: Path) -> None:
    run, now = make_run(home), time.time() - 1000
    for number in (1, 2):
        attempt = run.claim_attempt(str(number), "slurm")
        preempt(attempt, train(attempt, now + 100 * number, 0, 40), 40)
    seen = SeenRun(run)
    shutil.rmtree(run.path / "attempts")
    for number in (1, 2):
        train(run.claim_attempt(f"7{number}", "slurm"), now + 300 * number, 0, 20)
    assert seen.look()
    assert [attempt.record()["job_id"] for attempt in seen.attempts()] == ["71", "72"]
    assert agree(seen, run)
