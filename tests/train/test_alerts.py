"""Real runs that call for a person, and who hears of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from listening import Webhook
from running import agent_of, events, held, make_run, wait_for

from latentwire.run.directory import Run
from latentwire.run.status import run_status
from latentwire.run.telling import tell

NAMED = "LATENTWIRE_TEST_WEBHOOK"


def alerts_of(run: Run, name: str, event: str = "alert") -> list[dict[str, Any]]:
    return [e for e in events(run.attempts()[-1], event, "agent") if e["alert"] == name]


def all_text(run: Run) -> str:
    files = [path for path in run.path.rglob("*") if path.suffix in (".jsonl", ".json", ".yaml", ".log")]
    return "".join(path.read_text(errors="replace") for path in files)


def test_a_run_without_progress_is_told_of_and_so_is_its_going_on(tmp_path: Path) -> None:
    run = make_run(tmp_path, alerts={"no_progress_s": 3.0, "webhook": f"${NAMED}"})
    with Webhook().open() as webhook, held(run, "step", after=40), agent_of(run, {NAMED: webhook.url}) as agent:
        (raised,) = wait_for(lambda: webhook.of("no_progress"), "the webhook")
        assert (raised["state"], raised["run"], raised["attempt"], raised["threshold"]) == ("raised", "toy", 1, 3.0)
        assert raised["value"] > 3
        assert raised["text"].startswith("no step for ")
        assert webhook.paths == ["/a-secret-path"]
        (event,) = alerts_of(run, "no_progress")
        assert tell(event) == f"WARNING {raised['text']}"
        assert (run_status(run).state, run_status(run).reason) == ("RUNNING", raised["text"])
        (run.path / "hold-step").write_text("41")
        over = wait_for(lambda: webhook.of("no_progress")[1:], "the second message")
        assert over[0]["state"] == "over"
        (run.path / "hold-step").write_text("1000000")
        assert agent.outcome() == "finished"
    assert "a-secret-path" not in all_text(run)
