"""The one curve in an experiment tracker: each step once, whatever became of the attempts and of the tracker."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from running import (
    KILL,
    OFTEN_SAVED,
    SLOW_ENOUGH,
    agent_of,
    events,
    make_run,
    trained_steps,
    wait_for,
)

from latentwire.run.atomic import read_json
from latentwire.run.curve import merged_metrics
from latentwire.run.directory import Run

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
    import struct

    return float(struct.unpack("f", struct.pack("f", value))[0])


def test_each_step_is_in_tensorboard_once_after_kills_of_run_and_tracker(tmp_path: Path) -> None:
    run = make_run(tmp_path, checkpoint=OFTEN_SAVED, monitor={"trackers": ["tensorboard"]}, **SLOW_ENOUGH)
    cursor = run.path / "trackers" / "tensorboard.json"
    with agent_of(run) as agent:  # killed with all below it, between two commits, after the tracker has sent a part
        wait_for(lambda: (read_json(cursor) or {}).get("next"), "the tracker")
        wait_for(lambda: len(trained_steps(agent.attempt)) % 3 == 2, "a step that is not saved")
        for process in reversed(agent.tree()):
            process.send_signal(KILL)
    with agent_of(run) as agent:
        tracker = wait_for(lambda: [p for p in agent.tree() if "track" in p.cmdline()], "the tracker")[0]
        tracker.send_signal(KILL)
        assert agent.outcome() == "finished", "training goes on without"
    (told,) = events(run.attempts()[-1], "tracker_ended", "agent")
    assert (told["tracker"], told["exit_code"]) == ("tensorboard", -KILL)
    assert in_tensorboard(run)["loss"][-1][0] < 20
    for _ in range(2):  # the second time there is nothing left to send
        command = [sys.executable, "-m", "latentwire", "track", str(run.path), "--with", "tensorboard"]
        sent = subprocess.run(command, capture_output=True, text=True, check=True)
        assert sent.stderr == "", "redone steps had the same values"
        holds_the_curve(run)
    assert {r["attempt"] for r in merged_metrics(run)} == {1, 2}
