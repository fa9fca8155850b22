"""Real runs that call for a person, and who hears of it; and real runs that are slow for a reason."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from listening import Webhook
from orchestrate_parts import orchestrate
from running import (
    NEVER,
    TERM,
    agent_of,
    events,
    held,
    hold,
    make_run,
    wait_for,
    wait_for_event,
    write_config,
)

from latentwire.monitor.alerts import Alerts
from latentwire.monitor.diagnose import diagnose
from latentwire.run.directory import Attempt, Run, open_run
from latentwire.run.journal import Journal, read_journal
from latentwire.run.status import run_status
from latentwire.run.telling import tell
from latentwire.train import alerting
from latentwire.train.alerting import AlertWatch

NAMED = "LATENTWIRE_TEST_WEBHOOK"
IN_THE_SIXTH_STEP = 41
"""Visits of its rank: one in warm-up, eight in each step."""
KEEP = "import sys; open(sys.argv[1], 'ab').write(sys.stdin.buffer.read())"


def alerts_of(run: Run, name: str, event: str = "alert") -> list[dict[str, Any]]:
    return [e for e in events(run.attempts()[-1], event, "agent") if e["alert"] == name]


def _last(webhook: Webhook, state: str) -> dict[str, Any] | None:
    """The last message on progress, if it says so."""
    messages = webhook.of("no_progress")
    return messages[-1] if messages and messages[-1]["state"] == state else None


def all_text(folder: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file() and path.suffix)


def verdicts(attempt: Attempt, until_step: int) -> set[str]:
    samples, steps = (read_journal(attempt.path / name) for name in ("gpu_stats.jsonl", "metrics.jsonl"))
    return {finding.verdict for finding in diagnose(samples, (s for s in steps if s.get("step", 0) <= until_step))}


def test_a_run_that_stands_still_is_told_of_but_not_after_a_notice(tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    command = [sys.executable, "-c", KEEP, str(kept)]
    rules = {"no_progress_s": 6.0, "disk_free_percent": 100.0, "for_s": 2.0, "webhook": f"${NAMED}", "command": command}
    run = make_run(tmp_path, alerts=rules)
    with (
        Webhook().open() as webhook,
        held(run, "step", IN_THE_SIXTH_STEP),
        agent_of(run, {NAMED: webhook.url}) as agent,
    ):
        wait_for_event(agent.attempt, "holding")
        raised = wait_for(lambda: _last(webhook, "raised"), "the message that it stands still")
        assert (raised["state"], raised["run"], raised["attempt"], raised["threshold"]) == ("raised", "toy", 1, 6.0)
        assert raised["value"] > 6
        assert raised["text"].startswith("no step for ")
        event = alerts_of(run, "no_progress")[-1]
        assert tell(event) == f"WARNING {raised['text']}"
        status = run_status(run)
        assert (status.state, raised["text"] in str(status.reason)) == ("RUNNING", True)
        assert "of the run's disk is free" in str(status.reason)

        hold(run, "step", IN_THE_SIXTH_STEP + 8)
        wait_for(lambda: _last(webhook, "over"), "the message that it is over")
        agent.send(TERM)
        wait_for_event(agent.attempt, "notice", "agent")
        hold(run, "step", NEVER)
        assert agent.outcome() == "preempted"
        assert _last(webhook, "over"), "to be preempted is no trouble"
        assert set(webhook.paths) == {"/a-secret-path"}
        assert [json.loads(line) for line in kept.read_bytes().splitlines()] == webhook.messages
    assert alerts_of(run, "no_progress")[-1] == event
    assert events(agent.attempt, "alert_not_sent", "agent") == []
    assert "a-secret-path" not in all_text(run.path)


def test_a_loss_that_explodes_is_told_of_though_nobody_answers(tmp_path: Path) -> None:
    """It also waits for its data and saves after every step, which is found in its figures."""
    bad = [{"kind": "explode", "after_samples": 16 * step} for step in range(60, 66)]
    sections: dict[str, Any] = {
        "workload": {"options": {"troubles": bad, "sample_pause_s": 0.001}},
        "checkpoint": {"interval_s": None, "interval_steps": 1, "best_metric": None},
        "alerts": {"webhook": f"${NAMED}", "command": ["/nowhere/at-all"]},
    }
    run = make_run(tmp_path, overrides=("train.steps=80",), **sections)
    with (
        Webhook(answer=0).open() as webhook,
        held(run, "step", after=8 * 68),
        agent_of(run, {NAMED: webhook.url}) as agent,
    ):
        wait_for(lambda: alerts_of(run, "loss_spike") and alerts_of(run, "error_rate"), "both alerts")
        hold(run, "step", NEVER)
        assert agent.outcome() == "finished"
        assert webhook.messages
    not_sent = events(agent.attempt, "alert_not_sent", "agent")
    assert sorted(event["sink"] for event in not_sent) == ["command", "webhook"], "once each, of two alerts"
    (spike,) = alerts_of(run, "loss_spike")
    assert spike["value"] > 8
    *_, last = read_journal(agent.attempt.path / "events.agent.jsonl")
    assert last["event"] == "attempt_ended"
    assert verdicts(agent.attempt, 60) - {"uneven steps"} == {"data-bound", "idle in saves"}, (
        "other tests run beside it"
    )


def test_the_orchestrator_tells_of_a_run_that_it_gives_up(tmp_path: Path) -> None:
    with Webhook().open() as webhook:
        config = write_config(
            tmp_path, "hopeless", workload={"options": {"no_data": True}}, alerts={"webhook": webhook.url}
        )
        ended = orchestrate(tmp_path, "--config", config)
        assert ended.returncode == 1
        assert "hopeless: FAILED" in ended.stdout[ended.stdout.rindex("given up") :], "its last words know it too"
        (message,) = webhook.messages
    run = open_run("hopeless", tmp_path / "runs")
    assert (message["alert"], message["state"], message["run"], message["attempt"]) == (
        "failed",
        "raised",
        "hopeless",
        1,
    )
    assert message["text"].startswith("given up: ")
    assert run_status(run).state == "FAILED"


def test_a_fault_in_the_watch_is_told_once_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    attempt = run.claim_attempt("1", "local")
    journal = Journal(attempt.path / "events.agent.jsonl")
    watch = AlertWatch(attempt, run.config(), journal, num_nodes=1)
    monkeypatch.setattr(Alerts, "look", lambda self: 1 / 0)
    monkeypatch.setattr(alerting, "LOOK_EVERY_S", 0.0)
    for _ in range(2):
        watch.look()
    assert [e["error"] for e in events(attempt, "alerts_failed", "agent")] == ["ZeroDivisionError: division by zero"]
    watch.close(at_once=True)
    journal.close()
