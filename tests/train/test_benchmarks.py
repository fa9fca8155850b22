"""The benchmark of checkpoints runs, and its tables leave no way out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "checkpoint.py"
WAYS = [
    "torch.save", "torch.save + sha256", "safetensors save_file", "dcp.save", "dcp.async_save", "accelerate save_state",
    "latentwire",
]  # fmt: skip
LOADED = ["torch.save", "safetensors save_file", "dcp.save", "latentwire"]


def test_every_way_and_every_limit_is_in_the_tables(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [sys.executable, BENCHMARK, "--size-gb", "0.02", "--rounds", "1", "--folder", tmp_path / "disk"]
    done = subprocess.run([*command, "--json", result], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    saves, loads = done.stdout.split("| way | load")
    assert re.findall(r"^\| (?!way)([a-z][^|]*?) \| [\d.]+ \| [\d.]+ \|", saves, re.MULTILINE) == WAYS
    assert len(re.findall(r"^\| \*limit:\* [^|]+ \| - \| [\d.]+ \|", saves, re.MULTILINE)) == 5
    assert re.findall(r"^\| (?!way)([a-z][^|]*?) \| [\d.]+ \|", loads, re.MULTILINE) == LOADED
    ways = json.loads(result.read_text())["ways"]
    assert list(ways) == WAYS
    assert all(way["saves"] and way["error"] is None for way in ways.values())
    assert not (tmp_path / "disk").exists(), "it takes its files away"
