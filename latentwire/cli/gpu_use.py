"""How busy the GPUs of a running attempt are, from the end of what its monitors wrote. Light: see ``cli.main``."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from latentwire.monitor.stats import read_stats
from latentwire.run.figures import number
from latentwire.run.journal import last_record, time_of

if TYPE_CHECKING:
    from latentwire.run.directory import Attempt

NUM_CELLS = 8
CELL_S = 15.0


def gpu_use(attempt: Attempt) -> list[float | None]:
    """Mean utilisation in percent over all GPUs, of each 15 s of the last two minutes; empty where there is none.

    Counted back from the monitor's last word, so that its clock need not be ours.
    """
    return mean_use(recent_samples(attempt))


def recent_samples(attempt: Attempt) -> list[dict[str, Any]]:
    """The samples of the last two minutes, all nodes in order of time."""
    newest = last_record(attempt.path / "gpu_stats.jsonl", key="gpus")
    if newest is None:
        return []
    since = time_of(newest) - NUM_CELLS * CELL_S
    return [record for record in read_stats(attempt.path, since) if record.get("gpus")]


def mean_use(samples: Sequence[dict[str, Any]], uuid: str | None = None) -> list[float | None]:
    """Of all GPUs or of one, cell by cell; empty where no sample has a figure."""
    cells: dict[int, list[float]] = collections.defaultdict(list)
    end = time_of(samples[-1]) if samples else 0.0
    for sample in samples:
        cell = NUM_CELLS - 1 - int((end - time_of(sample)) / CELL_S)
        for gpu in sample["gpus"]:
            percent = number(gpu.get("utilisation_percent"))
            if percent is not None and uuid in (None, gpu["uuid"]):
                cells[cell].append(percent)
    return [statistics.fmean(cells[i]) if cells[i] else None for i in range(NUM_CELLS)] if cells else []
