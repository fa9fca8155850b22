"""The dashboard and the report as a person has them: a real server, a real browser, a run that goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path

from cli_parts import finished_run
from playwright.sync_api import Browser, Route
from running import (
    KILL,
    SLOW_ENOUGH,
    agent_of,
    events,
    make_run,
    run_agent,
    wait_for,
    wait_for_event,
    wait_for_steps,
)
from serving_parts import TOKEN, Serve, Tab

from latentwire.run.directory import Run
from latentwire.views.report import write_report

CHARTS = "[...document.querySelectorAll('.js-plotly-plot')].length"
LOSS = "document.querySelectorAll('.js-plotly-plot')[1]"
POINTS = f"{LOSS}.data[0].x"
PICTURE = f"{LOSS}.querySelector('.main-svg')"
"""A chart that is drawn anew has another one; the element around it stays."""
DIALOG = "document.activeElement.closest('dialog')"
ONLY_WHEN_ASKED = {"interval_s": None, "interval_steps": None, "best_metric": None}
MARK = "<img src=x onerror=window.hit=1><script>window.hit=1</script>"


def test_a_live_run_is_watched_preempted_and_watched_again(browser: Browser, serve: Serve, tmp_path: Path) -> None:
    run = make_run(tmp_path, train={"steps": 200}, **SLOW_ENOUGH)
    tab = Tab(browser)
    server = serve("--allow-actions", token=TOKEN)
    with agent_of(run) as agent:
        tab.open(f"{server.address}#token={TOKEN}")
        tab.wait_for_text("RUNNING")
        assert "token" not in tab.page.url
        tab.page.get_by_role("link", name="toy").click()
        tab.wait_for_text("training")
        wait_for_steps(agent.attempt, 3)
        wait_for(lambda: tab.page.evaluate(f"{CHARTS} >= 4 && {POINTS}.length > 3"), "charts")
        drawn = tab.page.evaluate(f"{PICTURE}.dataset.seen = 'first'")
        before = tab.page.evaluate(f"{POINTS}.length")
        wait_for(lambda: tab.page.evaluate(f"{POINTS}.length") > before, "a chart that grows")
        tab.page.get_by_role("button", name="Preempt").click()
        tab.page.get_by_role("dialog").get_by_role("button", name="Preempt").click()
        tab.wait_for_text("sent SIGTERM to the agent of attempt 1")
        assert agent.outcome() == "preempted"
    tab.wait_for_text("PREEMPTED")
    tab.wait_for_text("attempt ended: preempted")
    tab.wait_for_text("verified")
    with agent_of(run) as agent:
        wait_for_steps(agent.attempt, 2)
        tab.wait_for_text("2 attempts, a dotted line where each began")
        steps = wait_for(
            lambda: (found := tab.page.evaluate(POINTS)) and found[-1] > before + 5 and found, "the second attempt"
        )
        assert steps == list(range(1, steps[-1] + 1))
        assert tab.page.evaluate(f"{PICTURE}.dataset.seen") == drawn
        agent.send(KILL)
    tab.close()


def test_a_save_is_asked_for_by_keyboard_alone(browser: Browser, serve: Serve, tmp_path: Path) -> None:
    run = make_run(tmp_path, train={"steps": 200}, checkpoint=ONLY_WHEN_ASKED, **SLOW_ENOUGH)
    tab = Tab(browser)
    server = serve("--allow-actions", token=TOKEN)
    with agent_of(run) as agent:
        wait_for_steps(agent.attempt, 1)
        tab.open(f"{server.address}runs/toy#token={TOKEN}")
        tab.wait_for_text("training")
        tab.reach("Save now")
        for answer in ("Escape", "Enter"):
            assert (tab.focused(), tab.page.evaluate(f"{DIALOG} === null")) == ("Save now", True)
            tab.page.keyboard.press("Enter")
            wait_for(lambda: tab.page.evaluate(f"{DIALOG} !== null"), "a question")
            assert "Let toy save now and go on?" in tab.text()
            assert tab.focused() == "Save now"
            tab.page.keyboard.press(answer)
            wait_for(lambda: tab.page.evaluate("document.querySelector('dialog') === null"), "an answer taken")
        tab.wait_for_text("asked the agent of attempt 1")
        committed = wait_for_event(agent.attempt, "save_committed")
        tab.wait_for_text("verified")
        wait_for_steps(agent.attempt, committed["step"] + 2)
        agent.send(KILL)
    assert [event["reason"] for event in events(agent.attempt, "save_staged")] == ["asked"]
    assert [address for address in tab.asked if address.endswith("/save")] == [f"{server.address}api/runs/toy/save"]
    assert [step.name for step in run.checkpoints.glob("step-*")] == [f"step-{committed['step']:08}"]
    tab.close()


def test_a_wrong_token_is_told_from_none_and_a_run_that_is_over_has_no_buttons(
    browser: Browser, serve: Serve, tmp_path: Path
) -> None:
    run = finished_run(tmp_path)
    run.path.rename(tmp_path / run.path.name)  # the dashboard's folder
    tab = Tab(browser)
    tab.open(f"{serve('--allow-actions', token=TOKEN).address}runs/{run.name}")
    for given, why in (("a-wrong-one", "wants the token that it"), (TOKEN, "That is not the token that this")):
        tab.wait_for_text(why)
        tab.page.get_by_label("Token").fill(given)
        tab.page.get_by_role("button", name="Open").click()
    tab.wait_for_text("DONE")
    for name in ("Save now", "Preempt", "Cancel run"):
        button = tab.page.get_by_role("button", name=name)
        assert (button.is_disabled(), button.get_attribute("title")) == (True, "The run is DONE.")
    assert len(tab.errors) == 2
    assert all("401" in error for error in tab.errors), "a browser's console names each refusal"
    tab.errors.clear()
    tab.close()


def hostile(runs_dir: Path) -> Run:
    """A run in whose files everything that is shown is a trap, and that is being written to."""
    run = make_run(runs_dir, name="trap")
    attempt = run.claim_attempt(MARK, "local")
    record = json.loads((attempt.path / "attempt.json").read_text())
    record["agent"]["host"] = MARK
    (attempt.path / "attempt.json").write_text(json.dumps(record))
    future = time.time() + 500
    told = [
        {"time": future, "event": "save_failed", "step": MARK, "error": MARK + "</script>"},
        {"time": future, "event": "training_started", "step": 0, "total_steps": 9},
        {"time": future, "event": "attempt_ended", "outcome": MARK, "cause": MARK, "error": MARK},
    ]
    (attempt.path / "events.agent.jsonl").write_text("".join(json.dumps(event) + "\n" for event in told) + '{"time": 1')
    lines = [
        {"time": future, "step": step, "loss": loss, "step_s": 1.0}
        for step, loss in enumerate([2.0, "NaN", 1.0], start=1)
    ]
    attempt.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    gpus = [{"index": MARK, "uuid": "a", "utilisation_percent": 7}]
    stats = [{"time": time.time() + i, "gpus": gpus} for i in range(5)]
    (attempt.path / "gpu_stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in stats))
    (attempt.path / "stdout.log").write_text(
        f"{MARK}\x1b[31m red\n\udcff".encode("utf-8", "surrogateescape").decode("latin1")
    )
    bad = run.checkpoints / "step-00000001"
    bad.mkdir(parents=True)
    (bad / "manifest.json").write_text(MARK)
    return run


def test_nothing_from_a_file_becomes_part_of_the_page(browser: Browser, serve: Serve, tmp_path: Path) -> None:
    run = hostile(tmp_path)
    tab = Tab(browser, height=3000)
    tab.open(serve().address)
    tab.wait_for_text("trap")
    tab.page.get_by_role("link", name="trap").click()
    tab.wait_for_text("1 steps with a loss that is no number")
    tab.wait_for_text(f"save of step {MARK} failed")
    wait_for(lambda: tab.page.evaluate(f"{CHARTS} >= 3"), "charts")
    assert tab.page.evaluate("window.hit") is None
    assert tab.page.evaluate("document.querySelectorAll('img').length") == 0
    attempt = run.attempts()[-1].path
    with (attempt / "metrics.jsonl").open("a") as file:
        file.write('ss": 5, "step_s": 1.0}\n{"time": 1, "step": 5, "loss": 0.5, "step_s": 1.0}\n')
    tab.wait_for_text("5 steps")
    report = tmp_path / "report.html"
    write_report(run, report)
    tab.asked.clear()
    tab.open(report.as_uri())
    tab.wait_for_text(f"save of step {MARK} failed")
    wait_for(lambda: tab.page.evaluate(f"{CHARTS} >= 3"), "charts of the report")
    assert tab.page.evaluate("window.hit") is None
    assert tab.asked == [report.as_uri()]
    run.path.rename(tmp_path / "gone")
    tab.close()


def test_a_vanished_run_and_a_server_that_comes_back(browser: Browser, serve: Serve, tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name=name) for name in ("one", "two")]
    tab = Tab(browser)
    tab.open(serve().address)
    tab.wait_for_text("two")
    runs[1].path.rename(tmp_path / "elsewhere")
    wait_for(lambda: "two" not in tab.text(), "the fleet without it")
    assert "one" in tab.text()
    tab.close()


def test_the_curve_is_there_before_plotly_is(browser: Browser, serve: Serve, tmp_path: Path) -> None:
    run = make_run(tmp_path, train={"steps": 8})
    assert run_agent(run) == "finished"
    tab, held = Tab(browser), list[Route]()
    tab.page.route("**/plotly.min.js*", lambda route: held.append(route))
    tab.open(f"{serve().address}runs/toy")
    wait_for(lambda: tab.page.evaluate("document.querySelectorAll('.sketch path').length") >= 2, "lines")
    assert tab.page.evaluate(CHARTS) == 0
    assert tab.page.evaluate("document.querySelector('.sketch path').getBBox().width") > 900, "over the whole chart"
    wait_for(lambda: held, "the browser to ask for plotly")
    for route in held:
        route.continue_()
    wait_for(lambda: tab.page.evaluate(CHARTS) >= 4, "charts")
    assert tab.page.evaluate("document.querySelectorAll('.js-plotly-plot .sketch').length") == 0
    tab.close()


def test_phone_and_keyboard_in_light_and_dark(browser: Browser, serve: Serve, tmp_path: Path) -> None:
    run = make_run(tmp_path, train={"steps": 8})
    assert run_agent(run) == "finished"
    server = serve()
    for scheme in ("light", "dark"):
        tab = Tab(browser, width=390, height=800, scheme=scheme)
        for path, text in (("", "DONE"), ("runs/toy", "8 steps")):
            tab.open(server.address + path)
            tab.wait_for_text(text)
            assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
            tab.page.keyboard.press("Tab")
            assert tab.focused() == "Skip to the content"
            tab.page.keyboard.press("Enter")
            assert tab.page.evaluate("document.activeElement.id") == "main"
            ground = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (int(ground.split("(")[1].split(",")[0]) < 60) == (scheme == "dark")
        labels = tab.page.evaluate("[...document.querySelectorAll('[role=img]')].map((e) => e.ariaLabel)")
        assert all(labels)
        assert any(label.startswith("Loss. 8 steps; first") for label in labels)
        tab.close()
