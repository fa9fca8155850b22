"""The README's two commands on a fresh clone with a fresh environment."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_make_run_on_a_fresh_clone(tmp_path: Path) -> None:
    clone = tmp_path / "latentwire"
    subprocess.run(["git", "clone", "--quiet", TOP, clone], check=True)
    done = subprocess.run(["make", "run"], cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(figure) for figure in re.findall(r"eval/loss ([\d.]+)", done.stdout)]
    assert losses[-1] < losses[0] < 7
    assert "latentwire drill" in done.stdout.splitlines()[-1]
    status = subprocess.run([clone / ".venv/bin/latentwire", "status"], cwd=clone, capture_output=True, text=True)
    assert "DONE" in status.stdout
