"""``latentwire watch``, on a real pseudo-terminal."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from cli_parts import complaint, killed_in_mid_line, make_run, program, write_events
from fleet_parts import fleet, running
from terminal_parts import Terminal

from latentwire.run.directory import open_run


def test_the_fleet_is_drawn_anew_as_it_changes(home: Path) -> None:
    fleet(home)
    with Terminal(home, "watch") as terminal:
        drawn = terminal.wait_for("12 runs in", "\nstopped", "stalled: no step for")
        assert "preempted" in drawn
        shutil.rmtree(home / "runs" / "experiment_stalled")
        assert "stalled" not in terminal.wait_for("11 runs in", "\nstopped").rpartition("11 runs in")[2]
        terminal.resize(60, 10)
        terminal.wait_for("and 1 RETRYING, 1 PENDING, 1 CANCELLED, 1 DONE, 1 STOPPED")
        hostile = make_run(home, "hostile").claim_attempt("1", "local")
        ended = {"outcome": "failed", "error": "\x1b]0;owned\x07\x1b[2J"}
        write_events(hostile, "agent", (time.time(), "attempt_ended", ended))
        terminal.resize(160, 30)
        drawn = terminal.wait_for("\\x1b]0;owned")
        assert "\x1b]0;" not in drawn
        assert "\x1b[2J\n" not in drawn
        terminal.press("q")
        assert terminal.end() == 0


def test_one_run_is_drawn_while_its_writer_is_killed_in_mid_line(home: Path) -> None:
    run = running(home)
    attempt = run.attempts()[-1]
    with Terminal(home, "watch", "running") as terminal:
        drawn = terminal.wait_for("step 380 committed in 0.4 s", "NVIDIA H200")
        for words in ("RUNNING", "training", "400 of 1000", "last 200 steps", "goodput", "61.0 GB of 143.0 GB"):
            assert words in drawn
        whole, half = (
            json.dumps({"time": time.time(), "step": step, "loss": 1.25, "samples_per_s": 7.5, "step_s": 1.0})
            for step in (401, 402)
        )
        killed_in_mid_line(attempt.metrics_path, f"{whole}\n{half[:40]}")
        terminal.wait_for("401 of 1000", "7.5")
        write_events(attempt, "rank0", (time.time(), "save_failed", {"step": 400, "error": "disk full\x1b[2J"}))
        terminal.wait_for("ALARM save of step 400 failed, trying again: disk full\\x1b[2J")
        shutil.rmtree(run.path)
        terminal.wait_for("has vanished")
        again = running(home)
        terminal.wait_for("400 of 1000")
        assert again == open_run("running", home / "runs")
        terminal.press("\x03")
        assert terminal.end() == 130


def test_a_term_leaves_the_terminal_as_it_was(home: Path) -> None:
    with Terminal(home, "watch") as terminal:
        terminal.wait_for("0 runs in")
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.end() == 128 + signal.SIGTERM


def test_without_a_terminal_the_cure_is_told(home: Path) -> None:
    make_run(home)
    assert "this is none: use `latentwire status toy`" in complaint(home, "watch", "toy")
    assert "there is no run 'else'" in complaint(home, "watch", "else")
    ours, theirs = os.openpty()
    result = subprocess.run(program("watch"), cwd=home, stdin=subprocess.DEVNULL, stdout=theirs, capture_output=False,
                            stderr=subprocess.PIPE, check=False)  # fmt: skip
    assert (result.returncode, b"use `latentwire status`" in result.stderr) == (1, True)
    os.close(ours)
    os.close(theirs)
