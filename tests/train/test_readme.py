"""The README's own loop survives preemption with the same bits, and its commands run."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from running import BIN, KILL, PATIENCE_S, TERM, events, make_run, run_agent, wait_for, wait_for_event, wait_for_steps

import latentwire
from latentwire.checklist.drill import final_digests
from latentwire.run.atomic import write_text
from latentwire.run.budget import verdict_of
from latentwire.run.directory import Attempt, Run, list_runs

TOP = Path(__file__).parents[2]
README, WATCHING = TOP / "README.md", TOP / "docs/watching.md"


def blocks(mark: str, language: str, path: Path = README) -> list[str]:
    """The fenced blocks of a page that follow the comment ``<!-- mark -->``."""
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"<!-- {mark} -->\n+```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


_STAND = """
import itertools
import time
from pathlib import Path

_visits = itertools.count(1)


def here():
    visit = next(_visits)
    while _is_held(visit):
        time.sleep(0.005)


def _is_held(visit):
    try:
        return visit > int(Path("hold").read_text())
    except FileNotFoundError:
        return False
"""


class Script:
    """The README's loop as a user's script, in a folder of its own.

    It stands still after so many steps as a file ``hold`` there says: as it is it is done before a signal can meet it.
    """

    def __init__(self, folder: Path) -> None:
        (source,) = blocks("own-loop", "python")
        last_line = "session.log(loss=loss)\n"
        assert source.endswith(last_line)
        source += " " * 8 + "__import__('stand').here()\n"
        folder.mkdir()
        self.folder = folder
        (folder / "stand.py").write_text(_STAND, encoding="utf-8")
        (folder / "my_loop.py").write_text(source, encoding="utf-8")

    def start(self) -> subprocess.Popen[str]:
        """Start it, as typed in a shell."""
        return subprocess.Popen(
            [sys.executable, "my_loop.py"], cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def finish(self) -> None:
        """Run it to its end."""
        process = self.start()
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, stdout, stderr) == (0, "", "")

    def disturb(self, *signals: signal.Signals) -> tuple[int, str]:
        """Start it, send the last signal in a step after all others had their effect; exit code and what it printed."""
        hold = self.folder / "hold"
        write_text(hold, "5")
        process = self.start()
        try:
            attempt = wait_for(lambda: (self._attempts() or [None])[0], "the attempt")
            wait_for_steps(attempt, 5)
            if signal.SIGUSR1 in signals:
                process.send_signal(signal.SIGUSR1)
                write_text(hold, "10")
                wait_for_event(attempt, "save_committed")
            process.send_signal(signals[-1])
            hold.unlink()
            stdout, stderr = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
        return process.returncode, stdout + stderr

    def disturb_and_finish(self, *signals: signal.Signals) -> tuple[int, str]:
        """Both."""
        ended = self.disturb(*signals)
        self.finish()
        return ended

    def _attempts(self) -> list[Attempt]:
        return [attempt for run in list_runs(self.folder / "runs") for attempt in run.attempts()]

    @property
    def run(self) -> Run:
        """The run that it made."""
        (run,) = list_runs(self.folder / "runs")
        return run


@dataclasses.dataclass(frozen=True)
class Ended:
    """A loop that was disturbed and started again: its run, and how the first start ended."""

    run: Run
    exit_code: int
    printed: str


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """The loop undisturbed, with a notice, and killed, side by side."""
    folder = tmp_path_factory.mktemp("readme")
    kinds: dict[str, tuple[signal.Signals, ...]] = {"notice": (TERM,), "kill": (signal.SIGUSR1, KILL)}
    calm, scripts = Script(folder / "calm"), {kind: Script(folder / kind) for kind in kinds}
    with ThreadPoolExecutor(3) as pool:
        disturbed = {kind: pool.submit(scripts[kind].disturb_and_finish, *kinds[kind]) for kind in kinds}
        pool.submit(calm.finish).result()
        ended = {kind: Ended(scripts[kind].run, *future.result()) for kind, future in disturbed.items()}
    return ended | {"calm": Ended(calm.run, 0, "")}


def test_the_own_loop_loses_nothing_by_a_notice(loops: dict[str, Ended]) -> None:
    loop = loops["notice"]
    assert (loop.exit_code, loop.printed) == (75, "")
    first, second = loop.run.attempts()
    assert [verdict_of(a).outcome for a in (first, second)] == ["preempted", "finished"]
    step = verdict_of(first).step
    assert step is not None
    assert step >= 5
    assert events(second, "restored")[0]["step"] == step
    assert final_digests(loop.run) == final_digests(loops["calm"].run)


def test_the_own_loop_goes_on_after_a_kill(loops: dict[str, Ended]) -> None:
    loop = loops["kill"]
    assert (loop.exit_code, loop.printed) == (-KILL, "")
    first, second = loop.run.attempts()
    assert verdict_of(first).outcome == "lost"
    assert events(second, "restored")[0]["step"] == events(first, "save_committed")[-1]["step"] >= 5
    assert final_digests(loop.run) == final_digests(loops["calm"].run)


def test_the_commands_run(tmp_path: Path) -> None:
    """In the order in which they stand, with the configs of the repository and a run of the quickstart's name."""
    found = [*blocks("tested", "sh"), *blocks("tested", "sh", WATCHING)]
    commands = [line for block in found for line in block.splitlines() if line.strip()]
    assert commands
    shutil.copytree(TOP / "configs", tmp_path / "configs")
    assert run_agent(make_run(tmp_path / "runs", "quickstart")) == "finished"
    environ = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    for command in commands:
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
        assert done.stdout, command
        assert not done.stderr, command


def test_the_stream_of_tokens_goes_on_at_an_offset(tmp_path: Path) -> None:
    (source,) = blocks("tokens", "python")
    known: dict[str, type] = {}
    exec(source, {"latentwire": latentwire}, known)
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n{"text": "three"}\n')
    tokens = known["Tokens"]([tmp_path / "a.jsonl"], str.split)
    (shard,) = tokens.shards
    whole = list(tokens.read(shard, 0))
    assert [words for words, _ in whole] == [["one", "two"], ["three"]]
    assert list(tokens.read(shard, whole[0][1])) == whole[1:]


def test_the_loop_for_several_gpus_has_the_bits_of_one_rank(tmp_path: Path) -> None:
    (source,) = blocks("gpus-loop", "python")
    (tmp_path / "gpus_loop.py").write_text(source, encoding="utf-8")
    digests = []
    for num_ranks in (1, 3):
        run = make_run(
            tmp_path / str(num_ranks),
            workload={"target": f"{tmp_path / 'gpus_loop.py'}:train"},
            elastic={"num_ranks": num_ranks},
        )
        assert run_agent(run) == "finished"
        digests.append(final_digests(run))
    assert digests[0]["model"] == digests[1]["model"]
    assert digests[0]["optimizer"] == digests[1]["optimizer"]
