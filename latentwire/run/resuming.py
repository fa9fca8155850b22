"""A person asks for a run again."""

from __future__ import annotations

from latentwire.run.directory import Run
from latentwire.run.journal import Journal
from latentwire.run.status import run_status


def take_back_stops(run: Run) -> None:
    """What stopped the run before (a cancel, an INT, a budget that was used up) does not count any more."""
    status = run_status(run)
    if status.state in ("FAILED", "STOPPED", "CANCELLED"):
        run.cancel_path.unlink(missing_ok=True)
        journal = Journal(run.orchestrator_events)
        journal.event("resumed", after_attempt=status.attempt)
        journal.close()
