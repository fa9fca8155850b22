"""Fixtures of the training tests: what several of them compare with, and what takes long and can run beside them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from running import BIN, INT, OFTEN_SAVED, make_run, run_agent, write_config

from latentwire.run.directory import Run


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The toy run that nobody disturbed."""
    run = make_run(tmp_path_factory.mktemp("calm"))
    assert run_agent(run) == "finished"
    return run


@pytest.fixture(scope="session", autouse=True)
def drill_program(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[subprocess.Popen[str] | None]:
    """``latentwire drill --json`` of the toy, begun before the first test where one asks for it: it takes a minute."""
    if not any("drill_program" in item.function.__code__.co_varnames for item in _functions(request.session)):
        yield None
        return
    folder = tmp_path_factory.mktemp("drill")
    # a network and pauses large enough for every window to be hit, and steps enough for windows that were missed
    workload = {"options": {"width": 1000, "pause_s": 0.01}}
    train = {"steps": 90, "num_micro_batches": 4, "eval_every": 8, "warmup_batches": 40}
    config = write_config(folder, "toy-drill", workload=workload, train=train, checkpoint=OFTEN_SAVED)
    process = subprocess.Popen(
        [BIN / "latentwire", "drill", "--json", "--config", config, "--runs-dir", "runs"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    if process.poll() is None:
        process.send_signal(INT)  # it ends what it started
    process.communicate()


def _functions(session: pytest.Session) -> list[pytest.Function]:
    return [item for item in session.items if isinstance(item, pytest.Function)]
