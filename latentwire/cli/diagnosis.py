"""``latentwire diagnose``: what keeps a run from being faster, and the one thing to change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentwire.cli import DEFAULT_RUNS_DIR
from latentwire.cli.arguments import AttemptOption, RunArgument, RunsDirOption, find_attempt
from latentwire.cli.text import one_line
from latentwire.errors import LatentWireError

if TYPE_CHECKING:
    from latentwire.run.directory import Attempt, Run


def diagnose(
    run: RunArgument,
    attempt: AttemptOption = None,
    json: Annotated[bool, typer.Option("--json", help="A JSON list, gravest first.")] = False,
    runs_dir: RunsDirOption = DEFAULT_RUNS_DIR,
) -> None:
    """Show what costs a run time, gravest first: the figures, and what to change.

    Without --attempt the newest is read that has made a step.
    """
    from dataclasses import asdict
    from json import dumps

    from latentwire.monitor.diagnose import diagnose as diagnose_records
    from latentwire.run.directory import open_run
    from latentwire.run.journal import read_journal

    opened = open_run(run, runs_dir)
    trained = [each for each in opened.attempts() if each.last_step()]
    chosen = trained[-1] if attempt is None and trained else find_attempt(opened, attempt)
    found = diagnose_records(_samples(chosen), read_journal(chosen.metrics_path))
    if json:
        print(dumps([{"attempt": chosen.number, **asdict(finding)} for finding in found], indent=1))
        return
    print(f"attempt {chosen.number}:")
    for finding in found:
        cost = f" ({finding.share:.0%})" if finding.share else ""
        print(one_line(f"{finding.verdict}{cost}: {finding.evidence}"))
        if finding.change is not None:
            print(one_line(f"  change {finding.change}{_present(opened, finding.change)}: {finding.advice}"))


def _samples(attempt: Attempt) -> list[dict[str, Any]]:
    """Of all nodes."""
    from latentwire.monitor.stats import read_stats

    return list(read_stats(attempt.path))


def _present(run: Run, key: str) -> str:
    """What the key says now, in brackets; nothing where the config has no such key, or cannot be read."""
    try:
        value: Any = run.config().model_dump(mode="json")
    except LatentWireError:
        return ""
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            return ""
        value = value[name]
    return f" (now {'null' if value is None else value})"
