"""What a run went through, as the simulator wants it: what things took, and when the machine was taken away."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from latentwire.errors import ConfigError, RunError
from latentwire.run.directory import Run
from latentwire.run.figures import number
from latentwire.run.goodput import PRODUCTIVE, Ledger
from latentwire.run.journal import read_journal
from latentwire.run.simulation import Costs, Policy, Window

_START = ("starting", "loading", "restoring")
_TRAINING_WAITS = ("last", "notice")
_MOST_STEPS = 10_000_000


def costs_of(run: Run, ledger: Ledger) -> Costs:
    """What things took in a run, in the mean over its attempts. Reads its journals.

    Raises:
        RunError: it has not made enough steps to tell.
    """
    events = _rank_events(run)
    firsts_s, others_s = _step_times(run)
    trained = [span for span in ledger.spans if span.kind in (PRODUCTIVE, "redoing")]
    began = {span.attempt for span in trained}
    if not (others_s and began):
        raise RunError(f"{run.name} has made {len(firsts_s) + len(others_s)} steps: too few to tell what a step takes")
    first_step_s = max(0.0, statistics.fmean(firsts_s) - statistics.fmean(others_s))
    num_steps = len(firsts_s) + len(others_s)
    starts = [span for span in ledger.spans if span.kind in _START and span.attempt in began]
    in_background = [e for e in events["save_staged"] if e.get("reason") not in _TRAINING_WAITS]
    commit_s = _mean(events["save_committed"])
    drains_s = [span.seconds for span in ledger.spans if span.kind == "draining"]
    ends = [span for span in ledger.spans[-1:] if span.kind == "saving"]
    return Costs(
        start_s=sum(span.seconds for span in starts) / len(began),
        step_s=(sum(span.seconds for span in trained) - first_step_s * len(firsts_s)) / num_steps,
        first_step_s=first_step_s,
        stall_s=_mean(in_background),
        commit_s=commit_s,
        evaluation_s=_mean(events["evaluation_finished"]),
        drain_s=max(0.0, statistics.fmean(drains_s) - commit_s) if drains_s else 0.0,
        end_s=sum(span.seconds for span in ends),
    )


def _step_times(run: Run) -> tuple[list[float], list[float]]:
    """What the first steps of its attempts took, and what all others did."""
    firsts_s: list[float] = []
    others_s: list[float] = []
    for attempt in run.attempts():
        records = (number(r.get("step_s")) for r in read_journal(attempt.metrics_path))
        seconds = [each for each in records if each is not None]
        firsts_s += seconds[:1]
        others_s += seconds[1:]
    return firsts_s, others_s


def policy_of(run: Run) -> Policy:
    """What the run's config says; of ``checkpoint.interval_s: auto``, and of a loop's own steps, what was told last.

    Raises:
        ConfigError: its config cannot be read.
        RunError: the same, or it has more steps than are replayed one by one.
    """
    config, events = run.config(), _rank_events(run)
    chosen, interval_s = _known(events["interval_chosen"], "seconds"), config.checkpoint.interval_s
    if interval_s == "auto":
        interval_s = chosen[-1] if chosen else None
    evaluate_every = config.train.eval_every if events["evaluation_finished"] else None
    total = next(reversed(_known(events["training_started"], "total_steps")), config.train.steps)
    if total > _MOST_STEPS:
        raise RunError(
            f"{run.name} is said to have {total:g} steps: a replay goes step by step, at most {_MOST_STEPS:,}"
        )
    return Policy(int(total), interval_s, config.checkpoint.interval_steps, evaluate_every)


def windows_of(ledger: Ledger, grace_s: float) -> list[Window]:
    """The machine time that a run was given, attempt by attempt; without the last, which nobody took away.

    Args:
        ledger: the run's.
        grace_s: what there is between a notice and the kill.
    """
    found: list[Window] = []
    queued_s = 0.0
    for attempt, group in itertools.groupby(ledger.spans, lambda span: span.attempt):
        spans = list(group)
        seconds = {kind: sum(s.seconds for s in spans if s.kind == kind) for kind in {s.kind for s in spans}}
        dead_s = seconds.pop("failed", 0.0)
        if attempt is None:
            queued_s = seconds.get("queued", 0.0)
            if found and dead_s:
                last = found.pop()
                found.append(Window(last.queued_s, last.seconds, last.grace_s, last.dead_s + dead_s))
            continue
        drained = "draining" in seconds
        seconds.pop("draining", None)
        found.append(Window(queued_s, sum(seconds.values()), grace_s if drained else 0.0, dead_s))
        queued_s = 0.0
    return found[:-1]


def read_trace(path: Path) -> list[Window]:
    """A trace file: JSON lines of ``Window``'s fields, all but ``seconds`` optional.

    Raises:
        ConfigError: a line is none; names file and line.
    """
    found = []
    for line_number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if line.strip():
            found.append(_window(line, f"{path}:{line_number}"))
    return found


def _window(line: str, where: str) -> Window:
    wanted = 'wants {"seconds": 3600, "queued_s": 300, "grace_s": 120, "dead_s": 0}, all but seconds optional'
    try:
        fields = json.loads(line)
    except ValueError:
        raise ConfigError(f"{where}: not JSON; a trace {wanted}") from None
    known = {"queued_s", "seconds", "grace_s", "dead_s"}
    good = isinstance(fields, dict) and "seconds" in fields and fields.keys() <= known
    if not good or not all(_is_duration(value) for value in fields.values()):
        raise ConfigError(f"{where}: {line.strip()[:100]!r}; a trace {wanted}, none below 0")
    return Window(**{"queued_s": 0.0, **fields})


def _is_duration(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def _rank_events(run: Run) -> Mapping[str, list[dict[str, Any]]]:
    """Rank 0's events over all attempts, by name; none of a name that did not occur."""
    names = ("training_started", "save_staged", "save_committed", "evaluation_finished", "interval_chosen")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for attempt in run.attempts():
        for event in read_journal(attempt.path / "events.rank0.jsonl"):
            if event.get("event") in found:
                found[str(event["event"])].append(event)
    return found


def _mean(events: Iterable[Mapping[str, Any]]) -> float:
    seconds = _known(events, "seconds")
    return statistics.fmean(seconds) if seconds else 0.0


def _known(events: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    """A figure of those that have it."""
    return [value for event in events if (value := number(event.get(key))) is not None]
