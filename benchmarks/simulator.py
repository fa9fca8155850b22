"""The simulator held against a drill: costs from the undisturbed run, preemptions from the disturbed one.

    python benchmarks/simulator.py [CONFIG]

Nothing that the simulator is given was measured on the run whose goodput it foretells, but for when the machine was
taken away. Prints both goodputs, class by class; takes as long as ``latentwire drill``.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from latentwire.checklist.disturb import DISTURBANCES
from latentwire.checklist.drill import drill
from latentwire.run.directory import Run, open_run
from latentwire.run.goodput import KINDS, Ledger, ledger_of
from latentwire.run.history import costs_of, policy_of, windows_of
from latentwire.run.simulation import Expected, simulate


def main() -> None:
    """Drill, simulate, print."""
    config = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("configs/drill.yaml")
    with tempfile.TemporaryDirectory() as folder:
        drill(config, Path(folder), DISTURBANCES, lambda line: print(line, flush=True))
        calm, disturbed = (open_run(name, Path(folder)) for name in ("undisturbed", "disturbed"))
        _compare(calm, disturbed)


def _compare(calm: Run, disturbed: Run) -> None:
    now = time.time()
    measured = ledger_of(disturbed, now, alive=False)
    costs = costs_of(calm, ledger_of(calm, now, alive=False))
    windows = windows_of(measured, disturbed.config().preemption.grace_s)
    expected = simulate(policy_of(calm), costs, windows)
    print(_table(measured, expected))
    goodput = measured.goodput
    assert goodput is not None
    off = 100 * (expected.goodput / goodput - 1)
    print(f"goodput measured {100 * goodput:.2f} %, simulated {100 * expected.goodput:.2f} %: {off:+.1f} % off")


def _table(measured: Ledger, expected: Expected) -> str:
    rows = [
        f"| {kind} | {measured.seconds_of(kind):.2f} | {expected.seconds.get(kind, 0.0):.2f} |"
        for kind in KINDS
        if measured.seconds_of(kind) or expected.seconds.get(kind)
    ]
    return "\n".join(["| class | measured, s | simulated, s |", "|---|---:|---:|", *rows])


if __name__ == "__main__":
    main()
