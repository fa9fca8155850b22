"""The simulator held against a drill: the preemptions of its disturbed run, replayed with costs of two sources.

    python benchmarks/simulator.py [CONFIG, or the folder of a drill that was kept]

By the costs of the disturbed run itself it shows whether the model is right; by those of the undisturbed one, also
whether the machine was as fast in both. Prints all class by class; takes as long as ``latentwire drill``.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from latentwire.checklist.disturb import DISTURBANCES
from latentwire.checklist.drill import drill
from latentwire.run.directory import Run, open_run
from latentwire.run.goodput import KINDS, Ledger
from latentwire.run.history import costs_of, policy_of, windows_of
from latentwire.run.simulation import Expected, simulate
from latentwire.run.status import account_of


def main() -> None:
    """Drill, simulate, print."""
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("configs/drill.yaml")
    with tempfile.TemporaryDirectory() as made:
        folder = given if given.is_dir() else Path(made)
        if folder != given:
            drill(given, folder, DISTURBANCES, lambda line: print(line, flush=True))
        _compare(*(open_run(name, folder) for name in ("undisturbed", "disturbed")))


def _compare(calm: Run, disturbed: Run) -> None:
    now = time.time()
    measured = account_of(disturbed, now)
    windows, policy = windows_of(measured, disturbed.config().preemption.grace_s), policy_of(disturbed)
    by_own = simulate(policy, costs_of(disturbed, measured), windows)
    by_calm = simulate(policy, costs_of(calm, account_of(calm, now)), windows)
    print(_table(measured, by_own, by_calm))
    goodput = measured.goodput
    assert goodput is not None
    for costs, expected in (("its own", by_own), ("the undisturbed run's", by_calm)):
        off = 100 * (expected.goodput / goodput - 1)
        print(
            f"goodput measured {100 * goodput:.2f} %, simulated by {costs} costs {100 * expected.goodput:.2f} %: "
            f"{off:+.1f} % off"
        )


def _table(measured: Ledger, *simulated: Expected) -> str:
    rows = ["| class | measured, s | by its own costs, s | by the undisturbed run's, s |", "|---|---:|---:|---:|"]
    for kind in KINDS:
        seconds = [measured.seconds_of(kind), *(each.seconds.get(kind, 0.0) for each in simulated)]
        if any(seconds):
            rows.append(f"| {kind} | " + " | ".join(f"{each:.2f}" for each in seconds) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
