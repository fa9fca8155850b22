"""The 8B + 7B pair at full size on a GPU, in bf16: preempted and killed, it keeps its bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentwire.checklist.disturb import DISTURBANCES
from latentwire.checklist.drill import drill
from latentwire.checklist.result import table
from latentwire.monitor.gpu import list_gpus

TOP = Path(__file__).parents[2]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not list_gpus(), reason="there is no GPU here")
def test_a_notice_and_a_kill_change_no_bit(tmp_path: Path) -> None:
    chosen = [each for each in DISTURBANCES if each.name in ("TERM in training", "SIGKILL")]
    result = drill(TOP / "configs/experiments/pair_full_random.yaml", tmp_path, chosen)
    print(table(result))
    assert result.passed
