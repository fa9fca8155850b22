"""Where alerts are sent: a real server on loopback, real commands, and what fails of both."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from listening import Webhook

from latentwire.config import AlertsSection
from latentwire.monitor import sinks
from latentwire.monitor.alerts import Alert
from latentwire.monitor.sinks import Sinks
from latentwire.run.directory import Run

ALERT = Alert("disk_space", True, "the disk is full", 1.5, 5.0)
KEEP = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_bytes(sys.stdin.buffer.read())"


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "ANSWER_WITHIN_S", 0.3)
    monkeypatch.setattr(sinks, "COMMAND_WITHIN_S", 2.0)
    monkeypatch.setattr(sinks, "PAUSE_S", 0.01)


def deliver(run: Run, *alerts: Alert, environ: dict[str, str] | None = None, **settings: Any) -> list[tuple[str, str]]:
    """What is told of sinks that fail."""
    told: list[tuple[str, str]] = []
    opened = Sinks(AlertsSection(**settings), run, lambda *what: told.append(what), environ or {})
    for alert in alerts:
        opened.send(alert, 3)
    opened.close(60.0)
    return told


def test_a_webhook_and_a_command_get_the_same_json(run: Run, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    with Webhook().open() as webhook:
        assert deliver(run, ALERT, webhook=webhook.url, command=[sys.executable, "-c", KEEP, str(kept)]) == []
        (message,) = webhook.messages
    assert message == json.loads(kept.read_bytes())
    assert message.keys() == {
        "state", "alert", "text", "value", "threshold", "time", "run", "attempt", "host", "directory"
    }  # fmt: skip
    assert (message["state"], message["alert"], message["run"], message["attempt"]) == (
        "raised", "disk_space", run.name, 3
    )  # fmt: skip


def test_alerts_come_in_order_and_their_end_is_told(run: Run) -> None:
    with Webhook().open() as webhook:
        deliver(run, ALERT, Alert("disk_space", False, "again"), Alert("grace", True, "x"), webhook=webhook.url)
        assert [m["state"] for m in webhook.messages] == ["raised", "over", "raised"]


def test_a_url_may_stand_in_the_environment_and_is_never_told(run: Run) -> None:
    with Webhook(answer=404).open() as webhook:
        told = deliver(run, ALERT, ALERT, webhook="$HOOK", environ={"HOOK": webhook.url})
        assert told == [("webhook", "it answered with HTTP 404")]
        assert len(webhook.messages) == 2, "not tried again, but with the next alert"


@pytest.mark.parametrize("url", ["", "file:///etc/passwd", "ftp://x/y", "not a url"])
def test_a_variable_without_a_url_is_told_of_by_its_name(run: Run, url: str) -> None:
    told = deliver(run, ALERT, ALERT, webhook="$HOOK", environ={"HOOK": url})
    assert told == [("webhook", "the environment variable HOOK holds no http(s) URL in this process")]


@pytest.mark.parametrize(("answer", "num_tries"), [(500, 3), (429, 3), (403, 1), (302, 1), (307, 1)])
def test_what_may_pass_is_tried_again_and_a_redirect_is_not_followed(run: Run, answer: int, num_tries: int) -> None:
    with Webhook(answer).open() as webhook:
        assert deliver(run, ALERT, webhook=webhook.url) == [("webhook", f"it answered with HTTP {answer}")]
        assert webhook.paths == ["/a-secret-path"] * num_tries


def test_a_server_that_refuses_is_told_of_once(run: Run) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/a-secret-path"
        assert deliver(run, ALERT, ALERT, webhook=url) == [("webhook", "no connection: Connection refused")]


def test_a_server_that_never_answers_is_told_of_as_such(run: Run) -> None:
    with Webhook(answer=0).open() as webhook:
        assert deliver(run, ALERT, webhook=webhook.url) == [("webhook", "no answer within 0.3 s")]


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999/secret", "http://[secret/", "http://127.0.0.1:secret/"])
def test_a_url_that_is_none_is_not_repeated(run: Run, url: str) -> None:
    ((sink, reason),) = deliver(run, ALERT, webhook=url)
    assert sink == "webhook"
    assert "secret" not in reason


def test_a_server_that_hangs_keeps_nobody(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "ANSWER_WITHIN_S", 60.0)
    told: list[tuple[str, str]] = []
    with Webhook(answer=0).open() as webhook:
        opened = Sinks(AlertsSection(webhook=webhook.url), run, lambda *what: told.append(what))
        for _ in range(500):
            opened.send(ALERT, 1)  # would never return if it waited
        assert told == [("webhook", "100 messages wait already")]
        opened.close(0.0)
        assert len(told) == 1


def test_a_server_that_hangs_keeps_no_command(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "kept.json"
    command = [sys.executable, "-c", KEEP, str(kept)]
    monkeypatch.setattr(sinks, "ANSWER_WITHIN_S", 60.0)
    with Webhook(answer=0).open() as webhook:
        opened = Sinks(AlertsSection(webhook=webhook.url, command=command), run, lambda *_: None)
        opened.send(ALERT, 1)
        deadline = time.monotonic() + 30
        while not (kept.exists() and kept.read_bytes()) and time.monotonic() < deadline:
            time.sleep(0.01)
        opened.close(0.0)
    assert json.loads(kept.read_bytes())["alert"] == "disk_space"


def test_what_is_under_way_at_the_end_is_told_of(run: Run) -> None:
    told: list[tuple[str, str]] = []
    with Webhook(answer=0).open() as webhook:
        opened = Sinks(AlertsSection(webhook=webhook.url), run, lambda *what: told.append(what))
        opened.send(ALERT, 1)
        opened.close(0.0)
        assert told == [("webhook", "it had not answered when this process had to end")]
        threads = [thread for thread in threading.enumerate() if thread.name == "alerts"]
        assert threads
        assert all(thread.daemon for thread in threads)
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), "it goes when its last try is over"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["/nowhere/at-all"], "/nowhere/at-all: No such file or directory"),
        ([sys.executable, "-c", "raise SystemExit('nobody is at home')"], "it ended with 1: nobody is at home"),
        ([sys.executable, "-c", "import time; time.sleep(60)"], "it took more than 2 s and was killed"),
    ],
)
def test_a_command_that_fails_is_told_of_once(run: Run, command: list[str], reason: str) -> None:
    assert deliver(run, ALERT, ALERT, command=command) == [("command", reason)]


def test_a_command_that_reads_nothing_is_no_failure(run: Run) -> None:
    assert deliver(run, ALERT, command=["true"]) == []


def wait_until(is_so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)
    return is_so()


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def pid_in(path: Path) -> int:
    """Of the process that a command started."""
    assert wait_until(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text())


def starting(path: Path, then: str) -> list[str]:
    return ["sh", "-c", f'sleep 1000 & echo $! > "$0"; {then}', str(path)]


def test_a_command_that_takes_too_long_is_killed_with_all_that_it_started(run: Run, tmp_path: Path) -> None:
    command = starting(tmp_path / "pid", then="wait")
    assert deliver(run, ALERT, command=command) == [("command", "it took more than 2 s and was killed")]
    assert wait_until(lambda: is_gone(pid_in(tmp_path / "pid")))


def test_what_a_command_leaves_in_the_background_is_its_own_affair(run: Run, tmp_path: Path) -> None:
    assert deliver(run, ALERT, command=starting(tmp_path / "pid", then="exit 0")) == []
    left = pid_in(tmp_path / "pid")
    assert not is_gone(left)
    os.kill(left, signal.SIGKILL)


def test_a_command_does_not_outlive_the_end(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "COMMAND_WITHIN_S", 1000.0)
    told: list[tuple[str, str]] = []
    settings = AlertsSection(command=tuple(starting(tmp_path / "pid", then="wait")))
    opened = Sinks(settings, run, lambda *what: told.append(what))
    opened.send(ALERT, 1)
    started = pid_in(tmp_path / "pid")
    opened.close(0.0)
    assert wait_until(lambda: is_gone(started))
    assert told == [("command", "it had not answered when this process had to end")]


def test_without_a_sink_nothing_is_started(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread))
    assert deliver(run, ALERT) == []
    assert started == []
