"""The second home: what is copied, when it is visible, what comes back. On a folder, and on a real S3 server."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from checkpoint_parts import (
    BEST_STEP,
    METRIC,
    Events,
    assert_holds,
    assert_sound,
    commit,
    committed_steps,
    open_manager,
    rewrite_manifest,
    snapshot,
)
from object_server import CREDENTIALS, free_port, object_server, options

from latentwire.checkpoint import layout, reader
from latentwire.checkpoint.layout import step_name
from latentwire.checkpoint.manager import CheckpointManager
from latentwire.checkpoint.mirror import Mirror
from latentwire.config import parse_config
from latentwire.errors import CheckpointMismatch, ConfigError, Fenced, MirrorError, NoUsableCheckpoint

PATIENCE_S = 240.0


@dataclasses.dataclass
class Home:
    """A place for mirrors, looked at with fsspec alone."""

    url: str
    options: dict[str, Any]

    def mirror(self, token: int = 1, event: Callable[..., Any] = lambda name, **fields: None, **changes: Any) -> Mirror:
        settings: dict[str, Any] = {"fence": lambda: None, "keep": 2, "best_metric": METRIC, "options": self.options}
        return Mirror(self.url, "toy", token=token, event=event, **{**settings, **changes})

    def client(self) -> tuple[Any, str]:
        client, root = fsspec.core.url_to_fs(f"{self.url}/toy", **self.options, use_listings_cache=False)
        return client, root

    def visible(self) -> list[str]:
        """Folders that have a manifest."""
        client, root = self.client()
        return sorted(path.split("/")[-2] for path in client.find(root) if path.endswith(f"/{layout.MANIFEST}"))

    def fetch(self, folder: str, target: Path) -> Path:
        """A copy as it lies there, under the name that a checkpoint has."""
        client, root = self.client()
        path = target / folder.split(".")[0]
        path.mkdir(parents=True)
        for file in client.find(f"{root}/{folder}"):
            client.get_file(file, path / file.split("/")[-1])
        return path

    def change(self, file: str, change: Callable[[bytes], bytes | None]) -> None:
        """Put other bytes in the place of a file, or none."""
        client, root = self.client()
        data = change(client.cat_file(f"{root}/{file}"))
        client.rm_file(f"{root}/{file}")
        if data is not None:
            client.pipe_file(f"{root}/{file}", data)


@pytest.fixture(scope="module")
def served() -> Iterator[Home]:
    """A real S3 server."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        port = free_port()
        with object_server(port) as url:
            yield Home(url, options(port))


@pytest.fixture
def folder_home(tmp_path: Path) -> Home:
    """Another disk."""
    (tmp_path / "disk").mkdir()
    return Home(f"file://{tmp_path / 'disk'}", {})


@pytest.fixture(params=["file", "s3"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Home:
    """Each of the two, empty."""
    if request.param == "file":
        return request.getfixturevalue("folder_home")
    served: Home = request.getfixturevalue("served")
    return Home(f"{served.url}/{tmp_path.name}", served.options)


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: SIGKILL leaves what the kernel has, so that a disk shows nothing more."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def copied(manager: CheckpointManager, *steps: int) -> None:
    """Commit and mirror these steps one after the other."""
    for step in steps:
        commit(manager, step)
        assert manager.wait_for_mirror(PATIENCE_S)


def _expect(event: threading.Event) -> None:
    assert event.wait(PATIENCE_S)


# ---- Copying ---------------------------------------------------------------------------------------------------------


def test_the_newest_and_the_best_are_there_whole(home: Home, tmp_path: Path) -> None:
    told = Events()
    copied(open_manager(tmp_path / "c", mirror=home.mirror(event=told)), 1, 2, 3, 4, 5)
    assert home.visible() == [f"{step_name(step)}.attempt-0001" for step in (BEST_STEP, 4, 5)]
    for folder in home.visible():
        assert_sound(home.fetch(folder, tmp_path / "there"))
    done = told.named("mirror_committed")
    assert [event["step"] for event in done] == [1, 2, 3, 4, 5]
    assert all(event["bytes"] > 0 and event["seconds"] > 0 for event in done)
    assert [event["step"] for event in told.named("mirror_started")] == [1, 2, 3, 4, 5]


def test_saves_do_not_wait_and_only_the_newest_that_waits_is_copied(folder_home: Home, tmp_path: Path) -> None:
    go_on = threading.Event()
    mirror = folder_home.mirror(fence=lambda: _expect(go_on))
    manager = open_manager(tmp_path / "c", mirror=mirror, keep=1, best_metric=None)
    commit(manager, 1, 2, 3, 4)
    assert committed_steps(manager) == [1, 4]  # 1 is being read: it stays until its copy is done
    go_on.set()
    assert manager.wait_for_mirror(PATIENCE_S)
    assert folder_home.visible() == ["step-00000001.attempt-0001", "step-00000004.attempt-0001"]
    commit(manager, 5)
    assert committed_steps(manager) == [5]


def test_to_leave_waits_for_no_copy_and_the_next_attempt_makes_it(folder_home: Home, tmp_path: Path) -> None:
    told, never, begun = Events(), threading.Event(), threading.Event()

    def fence() -> None:
        begun.set()
        _expect(never)

    manager = open_manager(tmp_path / "c", mirror=folder_home.mirror(event=told, fence=fence))
    commit(manager, 1)
    assert begun.wait(PATIENCE_S)
    manager.close()
    assert told.named("mirror_called_off")
    never.set()
    second = open_manager(tmp_path / "c", token=2, mirror=folder_home.mirror(token=2))
    assert_holds(second.restore(), snapshot(1))
    assert second.wait_for_mirror(PATIENCE_S)
    assert folder_home.visible() == ["step-00000001.attempt-0002"]


def test_what_is_measured_after_the_copy_counts_there_too(folder_home: Home, tmp_path: Path) -> None:
    manager = open_manager(tmp_path / "c", mirror=folder_home.mirror(keep=1))
    copied(manager, 1)
    manager.add_metrics(1, {METRIC: 0.01})
    assert manager.wait_for_mirror(PATIENCE_S)
    copied(manager, 2, 3)
    assert folder_home.visible() == ["step-00000001.attempt-0001", "step-00000003.attempt-0001"]


def test_a_checkpoint_that_rots_here_is_not_copied(folder_home: Home, tmp_path: Path) -> None:
    told = Events()
    commit(open_manager(tmp_path / "c"), 1)
    weights = next((tmp_path / "c" / step_name(1)).glob("optimizer*"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    mirror = folder_home.mirror(event=told)
    mirror.push(tmp_path / "c" / step_name(1))
    assert mirror.wait(PATIENCE_S)
    assert folder_home.visible() == []
    assert str(weights) in told.named("mirror_failed")[0]["error"]


# ---- Kills, a server that is down, attempts that were given up -------------------------------------------------------


def test_killed_before_any_file_is_in_place_nothing_half_is_visible(in_memory: Path) -> None:
    program, disk, here = Path(__file__).with_name("mirror_child.py"), in_memory / "disk", in_memory / "c"
    disk.mkdir()
    here.mkdir()
    order = [sys.executable, str(program), "--each", str(here), f"file://{disk}"]
    kills = [line.split() for line in subprocess.check_output(order, text=True).splitlines()]
    assert len(kills) > 15
    assert [code for _, code in kills] == ["-9"] * (len(kills) - 1) + ["0"]
    for point, _ in kills:
        home = Home(f"file://{disk / point}", {})
        for folder in home.visible():
            reader.verify(home.fetch(folder, in_memory / "there" / point))
        manager = open_manager(here / point, token=2, mirror=home.mirror(token=2))
        manager.sweep()
        loaded = manager.restore()
        copied(manager, 1 if loaded is None else loaded.manifest.step + 1)
        remains = {path.name for path in (disk / point / "toy").iterdir()} - set(home.visible())
        assert remains == set()  # the next attempt takes away what the dead one left
    print(f"{len(kills) - 1} kills")


def test_killed_before_the_manifest_the_copy_is_invisible(home: Home, tmp_path: Path) -> None:
    order = [str(Path(__file__).with_name("mirror_child.py")), str(tmp_path / "c"), home.url, json.dumps(home.options)]
    with subprocess.Popen([sys.executable, *order], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "half\n"
        child.kill()
    assert home.visible() == ["step-00000001.attempt-0001"]
    shutil.rmtree(tmp_path / "c")
    second = open_manager(tmp_path / "c", token=2, mirror=home.mirror(token=2))
    assert_holds(second.restore(), snapshot(1))


def test_a_server_that_is_down_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    port, told = free_port(), Events()
    home = Home("s3://bucket/mirrors", options(port))
    manager = open_manager(tmp_path / "c", mirror=home.mirror(event=told))
    copied(manager, 1)
    (failed,) = told.named("mirror_failed")
    assert "s3://bucket/mirrors/toy" in failed["error"]
    assert "the next checkpoint is the retry" in failed["cure"]
    with object_server(port):
        copied(manager, 2)
        assert home.visible() == ["step-00000002.attempt-0001"]
    assert committed_steps(manager) == [1, 2]


def test_an_attempt_that_was_given_up_spoils_nothing(folder_home: Home, tmp_path: Path) -> None:
    told, looks, held, go_on = Events(), iter(range(100)), threading.Event(), threading.Event()

    def fence() -> None:
        if next(looks) == 1:  # right before its manifest
            held.set()
            _expect(go_on)
            raise Fenced("superseded")

    stale = open_manager(tmp_path / "stale", mirror=folder_home.mirror(event=told, fence=fence))
    commit(stale, 1)
    assert held.wait(PATIENCE_S)
    newer = open_manager(tmp_path / "newer", token=2, mirror=folder_home.mirror(token=2))
    copied(newer, 1, 2)
    go_on.set()
    assert stale.wait_for_mirror(PATIENCE_S)
    assert told.named("mirror_stopped")
    assert folder_home.visible() == ["step-00000001.attempt-0002", "step-00000002.attempt-0002"]
    for folder in folder_home.visible():
        assert_sound(folder_home.fetch(folder, tmp_path / "there"))


# ---- Bringing back ---------------------------------------------------------------------------------------------------


def test_brought_back_when_the_copies_here_are_gone(home: Home, tmp_path: Path) -> None:
    copied(open_manager(tmp_path / "c", mirror=home.mirror()), 1, 2, 3)
    shutil.rmtree(tmp_path / "c")
    told = Events()
    manager = open_manager(tmp_path / "c", token=2, event=told, mirror=home.mirror(token=2, event=told))
    assert_holds(manager.restore(), snapshot(3))
    assert_sound(tmp_path / "c" / step_name(3))
    (event,) = told.named("mirror_restored")
    assert (event["step"], event["origin"]) == (3, f"{home.url}/toy/step-00000003.attempt-0001")
    assert manager.wait_for_mirror(PATIENCE_S)
    assert not told.named("mirror_started")  # it is there already
    copied(manager, 4)
    assert "step-00000004.attempt-0002" in home.visible()


def test_what_is_corrupt_there_is_passed_over(folder_home: Home, tmp_path: Path) -> None:
    copied(open_manager(tmp_path / "c", mirror=folder_home.mirror(keep=3)), 1, 2, 3)
    shutil.rmtree(tmp_path / "c")
    folder_home.change("step-00000003.attempt-0001/model-00001-of-00002.safetensors", lambda data: data[:-1] + b"!")
    folder_home.change("step-00000002.attempt-0001/state.json", lambda data: None)
    told = Events()
    manager = open_manager(tmp_path / "c", token=2, mirror=folder_home.mirror(token=2, event=told))
    assert_holds(manager.restore(), snapshot(1))
    reasons = [event["reason"] for event in told.named("mirror_skipped")]
    assert ["model-00001-of" in reasons[0], "state.json" in reasons[1]] == [True, True]
    assert [path.name for path in (tmp_path / "c").iterdir()] == [step_name(1)]


def _leads_out(tree: dict[str, Any]) -> None:
    tree["files"]["../../out"] = tree["files"][layout.STATE]


def _claims_less(tree: dict[str, Any]) -> None:
    tree["files"][layout.STATE]["bytes"] -= 1


def _is_of_another_step(tree: dict[str, Any]) -> None:
    tree["step"] += 1


@pytest.mark.parametrize("harm", [_leads_out, _claims_less, _is_of_another_step])
def test_what_means_harm_there_is_passed_over(folder_home: Home, tmp_path: Path, harm: Callable[..., None]) -> None:
    copied(open_manager(tmp_path / "c", mirror=folder_home.mirror()), 1, 2)
    shutil.rmtree(tmp_path / "c")
    rewrite_manifest(tmp_path / "disk" / "toy" / "step-00000002.attempt-0001", harm)
    before = sorted(tmp_path.iterdir())
    manager = open_manager(tmp_path / "c", token=2, mirror=folder_home.mirror(token=2))
    assert_holds(manager.restore(), snapshot(1))
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "c"])


def test_the_mirror_comes_in_where_no_checkpoint_here_can_be_used(folder_home: Home, tmp_path: Path) -> None:
    copied(open_manager(tmp_path / "c", mirror=folder_home.mirror()), 1, 2)
    for state in (tmp_path / "c").glob("step-*/state.json"):
        state.unlink()
    manager = open_manager(tmp_path / "c", token=2, mirror=folder_home.mirror(token=2))
    assert_holds(manager.restore(), snapshot(2))


def test_a_mirror_without_a_usable_copy_is_named(folder_home: Home, tmp_path: Path) -> None:
    copied(open_manager(tmp_path / "c", mirror=folder_home.mirror()), 1)
    (tmp_path / "c" / step_name(1) / layout.STATE).unlink()
    folder_home.change("step-00000001.attempt-0001/state.json", lambda data: None)
    manager = open_manager(tmp_path / "c", token=2, mirror=folder_home.mirror(token=2))
    with pytest.raises(NoUsableCheckpoint, match=f"with its mirror {folder_home.url}/toy"):
        manager.restore()


def test_a_run_does_not_begin_while_its_mirror_cannot_be_asked(folder_home: Home, tmp_path: Path) -> None:
    (tmp_path / "disk").rmdir()
    manager = open_manager(tmp_path / "c", mirror=folder_home.mirror())
    with pytest.raises(MirrorError, match="make it, or mount the disk") as caught:
        manager.restore()
    assert isinstance(caught.value, ConnectionError)  # so that the agent tries again, as with any network failure


def test_the_copies_of_another_run_are_neither_used_nor_deleted(folder_home: Home, tmp_path: Path) -> None:
    copied(open_manager(tmp_path / "c", mirror=folder_home.mirror()), 1, 2, 3)
    manager = open_manager(tmp_path / "d", mirror=folder_home.mirror(token=2))
    manager.identity["config"] = "d" * 64
    with pytest.raises(CheckpointMismatch, match="give this run another name"):
        manager.restore()
    before = folder_home.visible()
    copied(manager, 4, 5, 6)
    assert set(before) < set(folder_home.visible())


# ---- Config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"mirror": "/mnt/disk"}, "checkpoint.mirror"),
        ({"mirror": "file://relative"}, "checkpoint.mirror"),
        ({"mirror": "ftp://host/folder"}, "checkpoint.mirror"),
        ({"mirror_options": {"secret": "x"}}, "give credentials in the environment"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"name": "a", "workload": {"target": "script"}, "checkpoint": section}, "here")


def test_a_client_that_is_not_installed_is_named(folder_home: Home) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'latentwire\[gs\]'"):
        dataclasses.replace(folder_home, url="gs://bucket").mirror()
