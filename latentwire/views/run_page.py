"""All that the page of a run shows, section by section."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from latentwire.run.budget import Verdict, verdict_of
from latentwire.run.directory import Attempt, Run
from latentwire.run.goodput import ledger_of
from latentwire.run.journal import time_of
from latentwire.run.seen import SeenRun
from latentwire.run.status import is_running, status_of
from latentwire.run.telling import tell_cause
from latentwire.views.accounts import goodput, timeline
from latentwire.views.checkpoints import CheckpointsView
from latentwire.views.curve import CurveView
from latentwire.views.gpus import GpuView
from latentwire.views.told import last_events, log_tail

Sections = dict[str, Any]

_FOLD_SHARE = 4
"""Folding all journals may take one part in so many of the time."""
_FOLD_EVERY_S = 2.0


class RunPage:
    """Follows a run for those who look at it. One thread at a time.

    Args:
        run: whose page.
        clock: seconds since the epoch.
    """

    def __init__(self, run: Run, clock: Callable[[], float] = time.time) -> None:
        self.run = run
        self._clock = clock
        self._begin()

    def _begin(self) -> None:
        """Nothing was read yet."""
        self._mark = self.run.mark()
        self._seen = SeenRun(self.run)
        self._curve = CurveView(self.run)
        self._gpus = GpuView(self.run)
        self._checkpoints = CheckpointsView(self.run)
        self._whole: Sections = {}
        self._next_fold = 0.0

    @property
    def has_glimpse(self) -> bool:
        """The curve is one of some hundred steps yet; the next ``read`` may take seconds."""
        return self._curve.is_behind

    def read(self) -> Sections:
        """The sections that have changed since the last call; of ``curve`` and ``gpus`` what is to be added.

        All of them where the run was removed and made again under its name.
        """
        if self.run.mark() != self._mark:
            self._begin()
            self._read_on()
            return self.snapshot()
        return self._read_on()

    def _read_on(self) -> Sections:
        changed = self._changed_whole()
        for name, message in (("curve", self._curve.read()), ("gpus", self._gpus.read())):
            if message is not None:
                changed[name] = message
        return changed

    def snapshot(self) -> Sections:
        """All sections as of the last ``read``, for somebody who has none yet."""
        return {**self._whole, "curve": self._curve.snapshot(), "gpus": self._gpus.snapshot()}

    def _changed_whole(self) -> Sections:
        sections: Sections = {"checkpoints": self._checkpoints.read(), "log": self._log()}
        began = time.monotonic()
        if began >= self._next_fold:
            sections |= self._folded()
            took_s = time.monotonic() - began
            self._next_fold = time.monotonic() + max(_FOLD_EVERY_S, _FOLD_SHARE * took_s)
        changed = {name: section for name, section in sections.items() if self._whole.get(name) != section}
        self._whole |= changed
        return changed

    def _folded(self) -> Sections:
        now = self._clock()
        self._seen.look()
        attempts, alive = self._seen.attempts(), is_running(self._seen, now)
        ledger = ledger_of(self._seen, now, alive)
        spans = timeline(ledger)
        status = dataclasses.asdict(status_of(self._seen, now))
        if not self.run.path.is_dir():
            status |= {"state": "VANISHED", "reason": f"{self.run.path} is gone"}
        return {
            "status": status,
            "timeline": spans,
            "goodput": goodput(ledger),
            "attempts": [_attempt(a, spans, alive and a is attempts[-1]) for a in attempts],
            "events": last_events(self._seen),
        }

    def _log(self) -> dict[str, Any]:
        attempts = self.run.attempts()
        if not attempts:
            return {"attempt": None, "stdout": "", "stderr": ""}
        newest = attempts[-1]
        tails = {name: log_tail(newest, f"{name}.log") for name in ("stdout", "stderr")}
        return {"attempt": newest.number, **tails}


def _attempt(attempt: Attempt, spans: list[dict[str, Any]], alive: bool) -> dict[str, Any]:
    own = [span for span in spans if span["attempt"] == attempt.number]
    verdict = Verdict("running") if alive else verdict_of(attempt)
    record = attempt.record()
    agent = attempt.agent()
    return {
        "number": attempt.number,
        "begin": own[0]["begin"] if own else round(time_of({"time": record.get("claimed")}) * 1000),
        "end": own[-1]["end"] if own else None,
        "step": attempt.last_step().get("step"),
        "outcome": verdict.outcome,
        "cause": tell_cause(verdict.cause) if verdict.cause else None,
        "error": verdict.error,
        "job_id": record.get("job_id"),
        "host": agent.host if agent is not None else None,
    }
