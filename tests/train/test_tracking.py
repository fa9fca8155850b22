"""The one curve in an experiment tracker: each step once, whatever became of the attempts and of the tracker."""

from __future__ import annotations

import fcntl
import json
import math
import struct
import subprocess
import sys
import types
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from running import (
    KILL,
    OFTEN_SAVED,
    PATIENCE_S,
    AgentProcess,
    agent_of,
    events,
    held,
    make_run,
    trained_steps,
    wait_for,
    wait_for_event,
)

from latentwire.config import TRACKERS
from latentwire.errors import ConfigError, RunBusy
from latentwire.integrations.tracking import tracking
from latentwire.run.atomic import read_json
from latentwire.run.curve import merged_metrics
from latentwire.run.directory import Run
from latentwire.run.journal import Journal
from latentwire.train.trackers import Trackers

READ_BACK = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0}).Reload()
tags = found.Tags()["scalars"]
print(json.dumps({tag: [(e.step, e.value, e.wall_time) for e in found.Scalars(tag)] for tag in tags}))
"""


def in_tensorboard(run: Run) -> dict[str, list[Any]]:
    """What TensorBoard's own reader finds, in the order in which it does."""
    folder = run.path / "trackers" / "tensorboard" / run.name
    program = [sys.executable, "-W", "ignore", "-c", READ_BACK, str(folder)]
    return dict(json.loads(subprocess.run(program, check=True, capture_output=True, text=True).stdout))


def holds_the_curve(run: Run) -> None:
    found = in_tensorboard(run)
    records = list(merged_metrics(run))
    for key in ("loss", "lr", "grad_norm", "step_s", "eval/loss"):
        expected = [r for r in records if key in r]
        assert [step for step, _, _ in found[key]] == [r["step"] for r in expected], key
        if key != "step_s":  # what was redone took another time, and is not sent again
            values = [value for _, value, _ in found[key]]
            assert values == [single(r[key]) for r in expected], key


def single(value: float) -> float:
    """As TensorBoard keeps it."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def trackers_of(agent: AgentProcess) -> list[psutil.Process]:
    found = []
    for process in agent.tree():
        with suppress(psutil.Error):  # ended by now
            found += [process] if "track" in process.cmdline() else []
    return found


def test_each_step_is_in_tensorboard_once_after_kills_of_run_and_tracker(tmp_path: Path) -> None:
    run = make_run(tmp_path, checkpoint=OFTEN_SAVED, monitor={"trackers": ["tensorboard"]})
    cursor = run.path / "trackers" / "tensorboard.json"
    with held(run, "step", after=8 * 6), agent_of(run) as agent:  # stands in its sixth step; the third was saved
        wait_for_event(agent.attempt, "holding")
        lost = 2 * trained_steps(agent.attempt)[-1]["step"]
        wait_for(lambda: (read_json(cursor) or {}).get("next", 0) > lost, "the tracker to have sent what will be lost")
        for process in reversed(agent.tree()):
            process.send_signal(KILL)
    with agent_of(run) as agent:
        wait_for(lambda: trackers_of(agent), "the tracker")[0].send_signal(KILL)
        assert agent.outcome() == "finished", "training goes on without"
    assert 2 * trained_steps(run.attempts()[1])[0]["step"] <= lost, "steps that were sent were redone"
    (told,) = events(run.attempts()[-1], "tracker_ended", "agent")
    assert (told["tracker"], told["exit_code"]) == ("tensorboard", -KILL)
    assert in_tensorboard(run)["loss"][-1][0] < 20
    for is_first in (True, False):
        command = [sys.executable, "-m", "latentwire", "track", str(run.path), "--with", "tensorboard"]
        sent = subprocess.run(command, capture_output=True, text=True, check=True)
        assert sent.stderr == "", "redone steps had the same values"
        assert is_first == (int(sent.stdout.split()[0]) > 2), sent.stdout  # the last step is sent again, and replaced
    holds_the_curve(run)
    assert {r["attempt"] for r in merged_metrics(run)} == {1, 2}


def curve_of(run: Run, *losses: float, first: int) -> None:
    """An attempt that wrote these losses, from a step on."""
    journal = Journal(run.claim_attempt("1", "local").metrics_path)
    for step, loss in enumerate(losses, start=first):
        journal.record(step=step, loss=loss, step_s=1.0)
    journal.close()


class FakeWandb(types.ModuleType):
    """Stands for the package: takes what would go over the network."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.starts: list[dict[str, Any]] = []
        self.sent: list[tuple[int, dict[str, float]]] = []

    def init(self, **options: Any) -> Any:
        self.starts.append(options)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.sent.append((step, values))

    def finish(self) -> None:
        pass


def send_all(run: Run, name: str) -> None:
    with tracking(run, name) as tracker:
        while tracker.send_new():
            pass


def test_a_restart_goes_on_in_the_same_run_of_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = make_run(tmp_path, monitor={"tracker_options": {"wandb": {"project": "wires", "mode": "offline"}}})
    curve_of(run, 3.0, math.nan, first=1)
    send_all(run, "wandb")
    curve_of(run, math.nan, 1.0, first=2)
    send_all(run, "wandb")
    assert [step for step, _ in wandb.sent] == [1, 2, 3]
    assert math.isnan(wandb.sent[1][1]["loss"])
    assert not caplog.records
    curve_of(run, 1.5, 0.5, first=3)
    send_all(run, "wandb")
    assert [(step, values["loss"]) for step, values in wandb.sent[2:]] == [(3, 1.0), (4, 0.5)]
    (warning,) = caplog.messages
    assert warning.endswith("step 3: 1.5 in attempt 3, 1.0 was sent")
    first, *others = wandb.starts
    assert all(start == first for start in others)
    assert (first["project"], first["name"], first["resume"], first["mode"]) == ("wires", "toy", "allow", "offline")
    assert first["config"]["seed"] == 3


def test_one_process_at_a_time_sends_a_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    run = make_run(tmp_path)
    with tracking(run, "wandb"), pytest.raises(RunBusy, match="it sends the curve already"):
        send_all(run, "wandb")


def test_whoever_waits_begins_when_the_other_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = make_run(tmp_path)
    curve_of(run, 2.0, first=1)
    other = ExitStack()
    other.enter_context(tracking(run, "wandb"))

    def wait_longer() -> bool:
        other.close()
        return False

    with tracking(run, "wandb", wait_longer) as tracker:
        assert len(wandb.starts) == 2
        assert tracker.send_new()


def test_a_service_is_told_what_decides_the_result_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    alerts = {"webhook": "https://hooks.example/a-secret-path", "command": ["notify", "--secret"]}
    send_all(make_run(tmp_path, alerts=alerts), "wandb")
    (start,) = wandb.starts
    assert start["config"].keys() == {"name", "seed", "workload", "train", "elastic"}
    assert start["config"]["elastic"] == {"exact": True}, "and nothing else of it"
    assert "secret" not in str(start)


def test_a_number_that_no_float_can_hold_upsets_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = make_run(tmp_path)
    journal = Journal(run.claim_attempt("1", "local").metrics_path)
    journal.record(step=1, loss=2.0, foreign=10**400, step_s=1.0)
    journal.close()
    send_all(run, "wandb")
    assert [(step, values["loss"]) for step, values in wandb.sent] == [(1, 2.0)]


def test_a_package_that_is_not_installed_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dvclive needs the package dvclive: pip install dvclive"):
        send_all(make_run(tmp_path), "dvclive")


def has_open(path: Path) -> bool:
    return any(str(path) in (f.path for f in child.open_files()) for child in psutil.Process().children())


def test_trackers_that_fail_or_hang_are_told_of_and_ended(tmp_path: Path) -> None:
    """The first waits for that of an attempt before, which still sends the rest, before it fails."""
    of_others = psutil.Process().children()
    attempt = make_run(tmp_path).claim_attempt("1", "local")
    journal = Journal(attempt.path / "events.agent.jsonl")
    failing = Trackers(attempt, ["dvclive"], journal)
    lock = attempt.run.path / "trackers" / "dvclive.lock"
    lock.parent.mkdir()
    with lock.open("w") as of_the_attempt_before:
        fcntl.flock(of_the_attempt_before, fcntl.LOCK_EX)
        failing.start()
        wait_for(lambda: has_open(lock), "the tracker to wait")
    wait_for(lambda: failing.look() or events(attempt, "tracker_ended", "agent"), "the event")
    failing.look()
    failing.end(1.0, lambda: False)
    assert [e["exit_code"] for e in events(attempt, "tracker_ended", "agent")] == [1]
    assert "dvclive needs the package dvclive" in (attempt.path / "tracker.log").read_text()
    slow = Trackers(attempt, ["tensorboard"], journal)
    slow.start()
    slow.end(PATIENCE_S, lambda: True)
    assert [e["tracker"] for e in events(attempt, "tracker_cut_short", "agent")] == ["tensorboard"]
    assert psutil.Process().children() == of_others
    journal.close()


def test_the_names_in_the_config_are_those_of_accelerate() -> None:
    assert set(TRACKERS) == set(LOGGER_TYPE_TO_CLASS)
