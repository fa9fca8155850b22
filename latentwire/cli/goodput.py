"""``latentwire goodput``: where the time went."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentwire.cli import DEFAULT_RUNS_DIR
from latentwire.cli.arguments import RunsDirOption
from latentwire.cli.fleet import Fleet
from latentwire.cli.text import NOTHING, columns, duration, figure, nothing_in, one_line

if TYPE_CHECKING:
    from latentwire.run.goodput import Ledger


def goodput(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run's name or directory; without one: all.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, seconds unrounded.")] = False,
    runs_dir: RunsDirOption = DEFAULT_RUNS_DIR,
) -> None:
    """Show where the time of a run, or of all, went: every second in one class, and what was lost to which cause.

    Goodput is the time of training that stood, over the time that was allotted (all but queued and stopped).
    """
    from latentwire.run.directory import open_run
    from latentwire.run.goodput import together
    from latentwire.run.seen import SeenRun
    from latentwire.run.status import account_of

    now, fleet = time.time(), Fleet(runs_dir)
    if run is None:
        fleet.look(now)
    runs = fleet.runs if run is None else [SeenRun(open_run(run, runs_dir))]
    ledgers = {each.name: account_of(each, now) for each in runs}
    total = together(ledgers.values())
    if json:
        _print_json(ledgers, total)
    elif ledgers:
        _print_table(ledgers, total)
    elif not fleet.unreadable:
        print(one_line(nothing_in(runs_dir)))
    for trouble in fleet.unreadable:
        print(f"latentwire: {one_line(trouble)}", file=sys.stderr)


def _print_json(ledgers: dict[str, Ledger], total: Ledger) -> None:
    from json import dumps

    runs = {name: _as_dict(ledger) for name, ledger in ledgers.items()}
    print(dumps({"runs": runs, "total": _as_dict(total)}))


def _as_dict(ledger: Ledger) -> dict[str, Any]:
    causes = ledger.lost_by_cause()
    return {
        "goodput": ledger.goodput,
        "wall_s": ledger.wall_s,
        "allotted_s": ledger.allotted_s,
        "gpu_hours": ledger.gpu_hours,
        "seconds": ledger.seconds(),
        "lost": {cause: {"seconds": seconds, "gpu_hours": hours} for cause, (seconds, hours) in causes.items()},
    }


def _print_table(ledgers: dict[str, Ledger], total: Ledger) -> None:
    shown = {"all": total, **ledgers} if len(ledgers) > 1 else ledgers
    kinds = [kind for kind, seconds in total.seconds().items() if seconds]
    header = ["run", "goodput", "wall clock", *kinds]
    rows = [
        [name, _percent(ledger.goodput), duration(ledger.wall_s), *(duration(ledger.seconds_of(k)) for k in kinds)]
        for name, ledger in shown.items()
    ]
    print("\n".join(columns([header, *rows])))
    from latentwire.run.telling import tell_cause

    causes = total.lost_by_cause()
    if causes:
        lost = [
            [tell_cause(cause), duration(seconds), figure(hours) if total.gpu_hours else NOTHING]
            for cause, (seconds, hours) in causes.items()
        ]
        print("\n" + "\n".join(columns([("not training, due to", "time", "GPU-hours"), *lost])))


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f} %"
