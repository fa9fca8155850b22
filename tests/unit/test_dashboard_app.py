"""The dashboard without a browser and without a port: its streams, its actions, and what Prometheus is told."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from cli_parts import Agents, make_run, read_line
from starlette.responses import StreamingResponse

from latentwire.config import Config, PreemptionSection, WorkloadSection
from latentwire.dashboard.app import Dashboard
from latentwire.dashboard.live import Live
from latentwire.run.directory import Run, create_run

App = Callable[..., Any]


async def call(app: App, path: str = "/", method: str = "GET") -> tuple[int, bytes]:
    """Status and body of an answer, as a server asks for it."""
    sent: list[Mapping[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Mapping[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": []}
    await app({**scope, "query_string": b"", "root_path": "", "asgi": {"spec_version": "2.3"}}, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


def ask(app: App, path: str, method: str = "GET") -> tuple[int, str]:
    status, body = asyncio.run(call(app, path, method))
    return status, body.decode()


# --- streams ----------------------------------------------------------------------------------------------------------


class Counter:
    """A source that counts its readings, and how many threads are in it at most."""

    def __init__(self) -> None:
        self.num_reads = 0
        self.most_inside = 0
        self.is_read, self.is_read_by_two = threading.Event(), threading.Event()
        self._inside = 0
        self._lock = threading.Lock()

    def read(self) -> dict[str, Any]:
        """The first one waits for a second thread, which must not come."""
        with self._lock:
            self._inside += 1
            self.num_reads += 1
            number = self.num_reads
            self.most_inside = max(self.most_inside, self._inside)
            if self._inside > 1:
                self.is_read_by_two.set()
        self.is_read.set()
        if number == 1:
            self.is_read_by_two.wait(0.5)
        with self._lock:
            self._inside -= 1
        return {}  # a looker that was forgotten would fill up and be sent away if anything changed

    def snapshot(self) -> dict[str, Any]:
        return {"number": self.num_reads}


async def leave_in_mid_read(live: Live, source: Counter) -> None:
    """Ask for the stream, and hang up while its first message is being read."""

    async def receive() -> dict[str, Any]:
        await asyncio.to_thread(source.is_read.wait)
        return {"type": "http.disconnect"}

    async def send(message: Mapping[str, Any]) -> None:
        assert not message.get("body")

    await StreamingResponse(live.stream())({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)


def content(message: bytes) -> Any:
    return json.loads(message.removeprefix(b"data: "))["n"]


async def next_of(stream: AsyncIterator[bytes]) -> Any:
    return content(await asyncio.wait_for(anext(stream), 60))


def test_who_leaves_in_mid_read_leaves_no_second_thread_and_no_reading_behind() -> None:
    source = Counter()

    async def reload() -> None:
        live = Live(source, "n", 0.001, {})
        await leave_in_mid_read(live, source)
        stream = live.stream()
        await next_of(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        async with asyncio.timeout(60):
            while len(asyncio.all_tasks()) > 1:  # reading ends once nobody looks
                await asyncio.sleep(0.001)

    asyncio.run(reload())
    assert source.most_inside == 1


class Failing:
    """A source whose second and third reading fail in a way that nobody thought of."""

    def __init__(self) -> None:
        self.num_reads = 0

    def read(self) -> dict[str, Any]:
        self.num_reads += 1
        if self.num_reads in (2, 3):
            raise ZeroDivisionError("whatever a file held")
        return self.snapshot()

    def snapshot(self) -> dict[str, Any]:
        return {"number": self.num_reads}


def test_a_reading_that_fails_is_told_once_and_followed_by_others(caplog: pytest.LogCaptureFixture) -> None:
    async def look() -> list[Any]:
        stream = Live(Failing(), "n", 0.001, {}).stream()
        return [await next_of(stream), await next_of(stream)]

    assert asyncio.run(look()) == [{"number": 1}, {"number": 4}]
    (told,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert told.getMessage() == "n cannot be read now"
    assert told.exc_info


# --- actions ----------------------------------------------------------------------------------------------------------


def with_save_signal(home: Path, name: str) -> tuple[Run, App]:
    config = Config(
        name="toy",
        workload=WorkloadSection(target="json:JSONDecoder"),
        preemption=PreemptionSection.model_validate({"save_signal": name}),
    )
    return create_run(config, home), Dashboard(home, allow_actions=True).app()


@pytest.mark.parametrize("name", ["USR1", "USR2"])
def test_save_sends_the_signal_that_the_run_takes_for_it(tmp_path: Path, agents: Agents, name: str) -> None:
    run, app = with_save_signal(tmp_path, name)
    agent = agents(run)
    status, said = ask(app, "/api/runs/toy/save", "POST")
    assert status == 200
    assert said.startswith(f"asked the agent of attempt 1 of toy (pid {agent.pid} on ")
    assert said.endswith(") to save and go on")
    assert read_line(agent) == f"SIG{name}\n"


def test_a_run_that_takes_no_signal_for_it_is_not_asked_to_save(tmp_path: Path, agents: Agents) -> None:
    run, app = with_save_signal(tmp_path, "none")
    agent = agents(run)
    status, said = ask(app, "/api/runs/toy/save", "POST")
    assert status == 409
    assert said.startswith("toy cannot be asked to save: its config has preemption.save_signal: none.")
    assert ask(app, "/api/runs/toy/preempt", "POST")[0] == 200
    assert read_line(agent) == "SIGTERM\n", "the first that it got"


def test_what_does_not_run_has_nothing_to_save(tmp_path: Path) -> None:
    app = with_save_signal(tmp_path, "USR1")[1]
    said = "toy is not running, so there is nothing to save: it is PENDING (not started yet)"
    assert ask(app, "/api/runs/toy/save", "POST") == (409, said)


# --- Prometheus -------------------------------------------------------------------------------------------------------


def test_a_run_that_cannot_be_read_is_left_out_of_metrics_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_run(tmp_path, "sound")
    attempt = make_run(tmp_path, "broken").claim_attempt("1", "local")
    attempt.metrics_path.mkdir()
    app = Dashboard(tmp_path / "runs", allow_actions=False).app()
    for _ in range(2):
        status, page = ask(app, "/metrics")
        assert status == 200
        assert 'run="sound"' in page
        assert 'run="broken"' not in page
    (told,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert told.getMessage() == f"{attempt.run.path} cannot be read and is left out of /metrics"
    attempt.metrics_path.rmdir()
    assert 'run="broken"' in ask(app, "/metrics")[1]


def test_a_name_that_is_no_unicode_keeps_no_run_from_prometheus(tmp_path: Path) -> None:
    attempt = make_run(tmp_path).claim_attempt("1", "local")
    attempt.metrics_path.write_text('{"time": 1, "step": 1, "loss": 2.0, "step_s": 1.0, "half \\ud800": 5.0}\n')
    status, page = ask(Dashboard(tmp_path / "runs", allow_actions=False).app(), "/metrics")
    assert status == 200
    assert 'name="half ?"} 5.0' in page
