"""Commits checkpoints with a mirror and dies on the way.

``python mirror_child.py FOLDER URL OPTIONS`` says ``half`` where all files of the second copy are there but its
manifest, and waits to be killed. With ``--each`` it forks a process for every file that is put in place or taken
away, under FOLDER/<n> and URL/<n>, which kills itself right before.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint_parts import commit, open_manager

from latentwire.checkpoint.mirror import Mirror


def train(folder: Path, url: str, options: dict[str, Any], fence: Callable[[], None], keep: int) -> None:
    """Two steps, the first copied before the second."""

    def tell(name: str, **fields: Any) -> None:
        if name == "mirror_failed":
            raise AssertionError(fields)

    mirror = Mirror(url, "toy", token=1, fence=fence, event=tell, options=options, keep=keep)
    manager = open_manager(folder, mirror=mirror)
    for step in (1, 2):
        commit(manager, step)
        mirror.wait(600)
    manager.close()


def stand_still_before_the_second_manifest() -> Callable[[], None]:
    looks = itertools.count(1)

    def fence() -> None:
        if next(looks) == 4:  # before and after the files of each copy
            print("half", flush=True)
            threading.Event().wait()

    return fence


def die_at(point: int, url: str) -> None:
    """Kill this process before it puts that file in its place, or takes something away."""
    counter = itertools.count(1)

    def trap(real: Callable[..., None]) -> Callable[..., None]:
        def trapped(path: Any, *rest: Any, **options: Any) -> None:
            if str(path).startswith(url.removeprefix("file://")) and next(counter) == point:
                os.kill(os.getpid(), signal.SIGKILL)
            real(path, *rest, **options)

        return trapped

    os.replace, os.remove, shutil.rmtree = trap(os.replace), trap(os.remove), trap(shutil.rmtree)  # type: ignore


def die_at_each(folder: Path, url: str) -> None:
    for point in itertools.count(1):
        pid = os.fork()
        if pid == 0:
            Path(f"{url.removeprefix('file://')}/{point}").mkdir()
            die_at(point, url)
            train(folder / str(point), f"{url}/{point}", {}, lambda: None, keep=1)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        print(point, os.waitstatus_to_exitcode(status), flush=True)
        if not os.WIFSIGNALED(status):
            return


if __name__ == "__main__":
    if sys.argv[1] == "--each":
        die_at_each(Path(sys.argv[2]), sys.argv[3])
    else:
        train(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), stand_still_before_the_second_manifest(), 2)
