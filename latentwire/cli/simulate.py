"""``latentwire simulate``: what a policy would make of preemptions."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentwire.cli import DEFAULT_RUNS_DIR
from latentwire.cli.arguments import RunArgument, RunsDirOption
from latentwire.cli.text import columns, duration, figure

if TYPE_CHECKING:
    from latentwire.run.directory import Run
    from latentwire.run.simulation import Costs, Expected, Policy, Window

    Trace = Callable[[], Iterable[Window]]

_NUM_DRAWS = 20


def simulate(
    run: RunArgument,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="JSON lines, or another run's directory: replay its preemptions."),
    ] = None,
    mtbf_h: Annotated[
        float | None, typer.Option("--mtbf-h", metavar="H", help="Mean hours between preemptions.", min=1e-3, max=1e6)
    ] = None,
    queued_s: Annotated[
        float | None,
        typer.Option("--queued-s", metavar="S", help="Wait for each start; default: as the run's.", min=0, max=1e9),
    ] = None,
    interval_s: Annotated[
        list[float] | None,
        typer.Option("--interval-s", metavar="S", help="Save interval to try; may be repeated.", min=1e-3, max=1e9),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object for each policy.")] = False,
    runs_dir: RunsDirOption = DEFAULT_RUNS_DIR,
) -> None:
    """Show the goodput to expect of a run under preemptions, by what its steps, saves and starts took so far.

    Without --trace or --mtbf-h its own preemptions are replayed; of a finished run what was measured stands beside.
    """
    from latentwire.errors import ConfigError
    from latentwire.run.directory import open_run
    from latentwire.run.history import costs_of, policy_of, read_trace, windows_of
    from latentwire.run.seen import SeenRun
    from latentwire.run.simulation import windows
    from latentwire.run.status import account_of

    if trace is not None and mtbf_h is not None:
        raise ConfigError("--trace or --mtbf-h, not both: either a trace is replayed, or preemptions are drawn")
    opened = open_run(run, runs_dir)
    ledger, grace_s = account_of(SeenRun(opened), time.time()), opened.config().preemption.grace_s
    costs, policy = costs_of(opened, ledger), policy_of(opened)
    own = windows_of(ledger, grace_s)
    traces: list[Trace]
    if mtbf_h is not None:
        waited_s = statistics.fmean([window.queued_s for window in own] or [0.0]) if queued_s is None else queued_s
        draw = functools.partial(windows, mtbf_h * 3600, waited_s, grace_s)
        traces = [functools.partial(draw, seed) for seed in range(_NUM_DRAWS)]
    else:
        replayed = own if trace is None else _windows_of_folder(trace) if trace.is_dir() else read_trace(trace)
        traces = [lambda: replayed]
    policies = [dataclasses.replace(policy, interval_s=each, interval_steps=None) for each in interval_s or []] or [
        policy
    ]
    results = [(each, _replay(each, costs, traces)) for each in policies]
    measured = ledger.goodput if trace is None and mtbf_h is None and _is_done(opened) else None
    if json:
        _print_json(results, costs, measured)
    else:
        _print_table(results, costs, measured)


def _is_done(run: Run) -> bool:
    """Only what went to its end can be held against a replay that does."""
    ended = run.attempts()[-1].ended()
    return ended is not None and ended.get("outcome") == "finished"


def _windows_of_folder(path: Path) -> list[Window]:
    from latentwire.run.directory import open_run
    from latentwire.run.history import windows_of
    from latentwire.run.seen import SeenRun
    from latentwire.run.status import account_of

    run = open_run(str(path), path.parent)
    return windows_of(account_of(SeenRun(run), time.time()), run.config().preemption.grace_s)


def _replay(policy: Policy, costs: Costs, traces: Sequence[Trace]) -> list[Expected]:
    from latentwire.run.simulation import simulate as replay

    return [replay(policy, costs, trace()) for trace in traces]


def _print_json(results: Sequence[tuple[Policy, list[Expected]]], costs: Costs, measured: float | None) -> None:
    from json import dumps

    for policy, expected in results:
        figures = {
            "policy": dataclasses.asdict(policy),
            "costs": dataclasses.asdict(costs),
            "goodput": statistics.fmean(each.goodput for each in expected),
            "goodputs": [each.goodput for each in expected],
            "measured_goodput": measured,
            "wall_s": statistics.fmean(each.wall_s for each in expected),
            "seconds": {
                kind: statistics.fmean(each.seconds.get(kind, 0.0) for each in expected) for kind in _kinds(expected)
            },
            "attempts": statistics.fmean(each.num_attempts for each in expected),
        }
        print(dumps(figures))


def _kinds(expected: Iterable[Expected]) -> list[str]:
    from latentwire.run.goodput import KINDS

    occurring = {kind for each in expected for kind, seconds in each.seconds.items() if seconds}
    return [kind for kind in KINDS if kind in occurring]


def _print_table(results: Sequence[tuple[Policy, list[Expected]]], costs: Costs, measured: float | None) -> None:
    took = {name.removesuffix("_s"): f"{figure(seconds)} s" for name, seconds in dataclasses.asdict(costs).items()}
    print("a run's costs, as measured: " + ", ".join(f"{name} {seconds}" for name, seconds in took.items()))
    kinds = _kinds(each for _, expected in results for each in expected)
    rows = [["saves every", "goodput", "wall clock", "attempts", *kinds]]
    for policy, expected in results:
        goodputs = [each.goodput for each in expected]
        spread = f" ± {100 * statistics.stdev(goodputs):.1f}" if len(goodputs) > 1 else ""
        rows.append(
            [
                _saves(policy),
                f"{100 * statistics.fmean(goodputs):.1f}{spread} %",
                duration(statistics.fmean(each.wall_s for each in expected)),
                f"{statistics.fmean(each.num_attempts for each in expected):.1f}",
                *(duration(statistics.fmean(each.seconds.get(kind, 0.0) for each in expected)) for kind in kinds),
            ]
        )
    print("\n".join(columns(rows)))
    if measured is not None:
        print(f"measured, with the same preemptions: {100 * measured:.1f} %")


def _saves(policy: Policy) -> str:
    every = [f"{policy.interval_s:g} s"] if policy.interval_s else []
    every += [f"{policy.interval_steps} steps"] if policy.interval_steps else []
    return " or ".join(every) or "never"
