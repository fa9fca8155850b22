"""Real runs that call for a person, and who hears of it; and real runs that are slow for a reason."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

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
    run_agent,
    wait_for,
    wait_for_event,
    write_config,
)

from latentwire.monitor.diagnose import diagnose
from latentwire.run.directory import Attempt, Run, open_run
from latentwire.run.journal import read_journal
from latentwire.run.status import run_status
from latentwire.run.telling import tell

NAMED = "LATENTWIRE_TEST_WEBHOOK"
IN_THE_SIXTH_STEP = 41
"""Visits of its rank: one in warm-up, eight in each step."""
KEEP = "import sys; open(sys.argv[1], 'ab').write(sys.stdin.buffer.read() + b'\\n')"


def alerts_of(run: Run, name: str, event: str = "alert") -> list[dict[str, Any]]:
    return [e for e in events(run.attempts()[-1], event, "agent") if e["alert"] == name]


def _last(webhook: Webhook, state: str) -> dict[str, Any] | None:
    """The last message on progress, if it says so."""
    messages = webhook.of("no_progress")
    return messages[-1] if messages and messages[-1]["state"] == state else None


def all_text(folder: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file() and path.suffix)


def verdicts(attempt: Attempt) -> list[str]:
    samples, steps = (read_journal(attempt.path / name) for name in ("gpu_stats.jsonl", "metrics.jsonl"))
    return [finding.verdict for finding in diagnose(samples, steps)]


def test_a_run_without_progress_is_told_of_and_so_is_its_going_on(tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    command = [sys.executable, "-c", KEEP, str(kept)]
    rules = {"no_progress_s": 6.0, "disk_free_percent": 100.0, "webhook": f"${NAMED}", "command": command}
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
        hold(run, "step", NEVER)
        assert agent.outcome() == "finished"
        assert set(webhook.paths) == {"/a-secret-path"}
        assert [json.loads(line) for line in kept.read_bytes().splitlines()] == webhook.messages
    assert events(agent.attempt, "alert_not_sent", "agent") == []
    assert "a-secret-path" not in all_text(run.path)


def test_a_loss_that_explodes_is_told_of_though_nobody_listens(tmp_path: Path) -> None:
    bad = [{"kind": "explode", "after_samples": 16 * step} for step in range(60, 66)]
    sections: dict[str, Any] = {
        "workload": {"options": {"troubles": bad}},
        "checkpoint": {"interval_s": None, "interval_steps": 1, "best_metric": None},
        "alerts": {"webhook": "$LATENTWIRE_NOT_SET", "command": ["/nowhere/at-all"]},
    }
    run = make_run(tmp_path, overrides=("train.steps=90",), **sections)
    with held(run, "step", after=8 * 68), agent_of(run) as agent:
        wait_for(lambda: alerts_of(run, "loss_spike") and alerts_of(run, "error_rate"), "both alerts")
        hold(run, "step", NEVER)
        assert agent.outcome() == "finished"
    told = {event["sink"]: event["error"] for event in events(agent.attempt, "alert_not_sent", "agent")}
    assert told.keys() == {"webhook", "command"}
    assert "LATENTWIRE_NOT_SET" in told["webhook"]
    assert len(events(agent.attempt, "alert_not_sent", "agent")) == 2, "once each, of two alerts"
    (spike,) = alerts_of(run, "loss_spike")
    assert spike["value"] > 8
    *_, last = read_journal(agent.attempt.path / "events.agent.jsonl")
    assert last["event"] == "attempt_ended"
    assert "idle in saves" in verdicts(agent.attempt), "it saves after every step of some milliseconds"


def test_a_preempted_run_that_stands_still_raises_nothing(tmp_path: Path) -> None:
    """Its checkpoint grows old beyond the limit, and would be told of, were it not for the notice."""
    run = make_run(tmp_path, alerts={"checkpoint_age_s": 5.0, "webhook": f"${NAMED}"})
    with (
        Webhook().open() as webhook,
        held(run, "step", IN_THE_SIXTH_STEP),
        agent_of(run, {NAMED: webhook.url}) as agent,
    ):
        wait_for_event(agent.attempt, "holding")
        agent.send(TERM)
        notice = wait_for_event(agent.attempt, "notice", "agent")
        wait_for(lambda: time.time() > notice["time"] + 9, "nothing to happen")
        hold(run, "step", NEVER)
        assert agent.outcome() == "preempted"
        assert webhook.messages == []
    assert events(agent.attempt, "alert", "agent") == events(agent.attempt, "alert_not_sent", "agent") == []


def test_a_server_that_hangs_keeps_no_attempt_from_its_end_and_slow_data_are_found(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "workload": {"options": {"sample_pause_s": 0.01}},
        "checkpoint": {"interval_steps": None},
        "alerts": {"disk_free_percent": 100.0, "webhook": f"${NAMED}"},
    }
    run = make_run(tmp_path, **sections)
    with Webhook(answer=0).open() as webhook:
        assert run_agent(run, {NAMED: webhook.url}) == "finished"
        assert webhook.of("disk_space")
    (attempt,) = run.attempts()
    (told,) = events(attempt, "alert_not_sent", "agent")
    assert told["sink"] == "webhook"
    assert verdicts(attempt) == ["data-bound"]


def test_the_orchestrator_tells_of_a_run_that_it_gives_up(tmp_path: Path) -> None:
    with Webhook().open() as webhook:
        config = write_config(
            tmp_path, "hopeless", workload={"options": {"no_data": True}}, alerts={"webhook": webhook.url}
        )
        ended = orchestrate(tmp_path, "--config", config)
        assert ended.returncode == 1
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
