"""Leader and follower of one attempt, each started as Slurm starts its task on a node. No Slurm answers here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from running import KILL, NEVER, PATIENCE_S, TERM, agent_of, events, hold, make_run, wait_for, wait_for_event

from latentwire.run.atomic import read_json
from latentwire.run.budget import next_move, verdict_of
from latentwire.run.directory import Attempt, Run

IN_THE_SECOND_STEP = 6
"""Visits of one rank of two: one in warm-up, four in each step."""
_TASK = "import sys; from latentwire.scheduler.job import TrainingJob; print(TrainingJob(sys.argv[1], 'slurm')())"


class Task:
    """What srun starts on one of two nodes."""

    def __init__(self, run: Run, node: int, restart: int) -> None:
        slurm = {"JOB_ID": 77, "RESTART_COUNT": restart, "NODEID": node, "STEP_NUM_NODES": 2, "GPUS_ON_NODE": 1}
        environ = {f"SLURM_{key}": str(value) for key, value in slurm.items()}
        environ |= {"SLURMD_NODENAME": f"n{node}", "PATH": "/nowhere", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _TASK, str(run.path)],
            env={**os.environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )

    def outcome(self) -> str:
        """Wait for the end; what the job returned, or nothing if it did not return."""
        printed, _ = self.process.communicate(timeout=PATIENCE_S)
        return str(printed).strip()


@contextmanager
def standing_on_two_nodes(run: Run, restart: int) -> Iterator[tuple[Task, Task, Attempt]]:
    """Leader, follower, and their attempt, whose two ranks stand still in the second step."""
    number = run.newest_number() + 1
    hold(run, "step", IN_THE_SECOND_STEP)
    tasks = [Task(run, node, restart) for node in (0, 1)]
    try:
        attempt = Attempt(run, number)
        for rank in ("rank0", "rank1"):
            wait_for_event(attempt, "holding", rank)
        yield tasks[0], tasks[1], attempt
    finally:
        for task in tasks:
            task.process.kill()
            task.process.communicate()


def _run(folder: Path, **sections: Any) -> Run:
    return make_run(folder, workload={"options": {"counts": False}}, **sections)


def test_what_happens_to_one_node_happens_to_the_attempt(tmp_path: Path) -> None:
    run = _run(tmp_path)
    with standing_on_two_nodes(run, restart=0) as (leader, follower, attempt):
        follower.process.send_signal(TERM)
        wait_for_event(attempt, "notice", "node1")
        hold(run, "step", NEVER)
        assert leader.outcome() == "preempted"
        assert follower.outcome() == "", "it does not return: submitit would write down that the job is done"
        assert follower.process.returncode == 0
        assert events(attempt, "notice", "agent") == []
        assert verdict_of(attempt).step == events(attempt, "left")[0]["step"] > 0
        assert read_json(attempt.path / "environment.node1.json")["host"] == "n1"
        assert attempt.record()["gpus"] == 2, "one on each node, which nobody sees"
    with standing_on_two_nodes(run, restart=1) as (leader, follower, attempt):
        follower.process.send_signal(KILL)
        follower.process.wait()
        hold(run, "step", NEVER)
        assert leader.outcome() == "lost"
        verdict = verdict_of(attempt)
        assert verdict.outcome == "lost"
        assert "node 1 ended without a word" in str(verdict.error)
        assert next_move(run, run.config().retry).again


def test_a_superseded_agent_starts_nothing_more(tmp_path: Path) -> None:
    """Else it and the agent of the newer attempt, each on its node, would fence each other for ever."""
    run = _run(tmp_path)
    hold(run, "step", IN_THE_SECOND_STEP)
    with agent_of(run) as agent:
        wait_for_event(agent.attempt, "holding")
        (rank,) = wait_for(lambda: _ranks(agent.pid), "the rank")
        newer = run.claim_attempt("another job", "local")
        rank.kill()
        assert agent.outcome() == "fenced"
        assert run.newest_number() == newer.number


def _ranks(agent_pid: int) -> list[psutil.Process]:
    children = psutil.Process(agent_pid).children()
    return [child for child in children if "latentwire.train.worker" in child.cmdline()]
