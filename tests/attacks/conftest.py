"""What the attacks share: a folder of two good checkpoints, and readers with little memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_parts import commit, open_manager

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def two_good_ones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "checkpoints"
    manager = open_manager(folder)
    commit(manager, 1, 2)
    manager.close()
    return folder


@pytest.fixture
def folder(two_good_ones: Path, tmp_path: Path) -> Path:
    """Checkpoints of the steps 1 and 2; the attacks are on the newer."""
    return shutil.copytree(two_good_ones, tmp_path / "checkpoints")


@pytest.fixture(scope="session")
def restore() -> Iterator[Callable[[Path], dict[str, Any]]]:
    """What comes of a restore in a process of its own; see reading_server.py."""
    search = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent / "unit")])
    server = subprocess.Popen(
        [sys.executable, HERE / "reading_server.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": search, "MALLOC_ARENA_MAX": "1"},  # arenas take address space, not memory
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def ask(folder: Path) -> dict[str, Any]:
        print(folder, file=server.stdin, flush=True)
        answer = json.loads(server.stdout.readline())
        assert isinstance(answer, dict)
        return answer

    yield ask
    server.stdin.close()
    server.wait()
    server.stdout.close()
