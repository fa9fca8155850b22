"""A run that lost its checkpoints goes on from its mirror, on a real object server, with the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from object_server import CREDENTIALS, free_port, object_server, options
from running import KILL, agent_of, events, held, make_run, run_agent, wait_for_event

from latentwire.checklist.result import final_digests
from latentwire.run.directory import Run


def test_a_run_without_checkpoints_goes_on_from_its_mirror_with_the_same_bits(
    tmp_path: Path, calm: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    port = free_port()
    with object_server(port) as url:
        mirror = {"mirror": url, "mirror_options": options(port)}
        run = make_run(tmp_path, checkpoint={"interval_s": None, "interval_steps": 4, **mirror})
        with held(run, "step", after=8 * 10), agent_of(run) as agent:
            wait_for_event(agent.attempt, "mirror_committed")
            agent.send(KILL)
            assert agent.outcome() == ""
        shutil.rmtree(run.checkpoints)
        assert run_agent(run) == "finished"
    first, second = run.attempts()
    (back,) = events(second, "mirror_restored")
    assert back["step"] in [event["step"] for event in events(first, "mirror_committed")]
    assert events(second, "restored")[0]["step"] == back["step"] > 0
    assert events(second, "mirror_committed")[-1]["step"] == 20  # the end waits for the last copy
    assert final_digests(run) == final_digests(calm)
