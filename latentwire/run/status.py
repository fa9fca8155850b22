"""What a person wants to know of a run, folded from its files. Reads only; light enough for `latentwire status`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Mapping
from typing import Any

from latentwire.run.budget import verdict_of
from latentwire.run.directory import REWRITE, Attempt, Run
from latentwire.run.figures import number, whole
from latentwire.run.goodput import Ledger, ledger_of, was_submitted
from latentwire.run.journal import time_of
from latentwire.run.seen import SeenRun
from latentwire.run.telling import tell_hang

HEARTBEAT_S = 90.0
"""On another node an attempt counts as alive while it wrote within so many seconds."""
STALLED_S = 900.0
"""No step for so long is a stall."""


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """A run at a glance. Times in seconds since the epoch, durations in seconds; None: not known (yet).

    Attributes:
        state: PENDING, RUNNING, STALLED, PREEMPTED, LOST, RETRYING (failed, within its budget), REQUEUED (any of these
            three, and its next job waits), FAILED (given up), STOPPED, CANCELLED or DONE.
        phase: of a running attempt: starting, building, restoring, warming up, training, evaluating, saving, draining.
        attempt: number of the newest attempt, 0 before the first.
        num_preemptions: attempts that ended preempted.
        num_lost: attempts that ended without a word.
        step, total_steps: completed and wanted.
        loss: of the last step.
        samples_per_s: of the last step.
        eta_s: at the present pace.
        committed_step: newest step that this run committed.
        verified_at: when the newest verified checkpoint was verified.
        job_id: of the newest attempt.
        reason: why it is not running, or not well.
        notice_needs_s: of a running attempt: what its step and its save take at a notice.
        grace_s: what it would have for that.
        warning: what a notice would lose; None where it fits, or nothing was measured yet.
        advice: what to change then.
        goodput: training that stood, over the time allotted.
        weights_sha256: of the finished run.
    """

    name: str
    path: str
    state: str
    phase: str | None
    attempt: int
    num_preemptions: int
    num_lost: int
    step: int
    total_steps: int | None
    loss: float | None
    samples_per_s: float | None
    eta_s: float | None
    committed_step: int | None
    verified_at: float | None
    job_id: str | None
    reason: str | None
    notice_needs_s: float | None
    grace_s: float | None
    warning: str | None
    advice: str | None
    goodput: float | None
    weights_sha256: str | None

    def to_json(self, more: Mapping[str, Any]) -> str:
        """One JSON object, with ``more`` in it."""
        return json.dumps({**dataclasses.asdict(self), **more})


def run_status(run: Run, now: float | None = None) -> RunStatus:
    """Look at a run and fold its files. Does not block; upset by no half-written or missing file."""
    return status_of(SeenRun(run), time.time() if now is None else now)


def status_of(run: SeenRun, now: float) -> RunStatus:
    """Fold what was seen of a run; for whoever looks at it again and again."""
    attempts = run.attempts()
    facts = _Facts()
    for attempt in attempts:
        facts.take(attempt)
    newest = attempts[-1] if attempts else None
    alive = is_running(run, now)
    verdicts = [verdict_of(a) for a in attempts if not (alive and a is newest)]
    state, reason = _state(run, alive, [v.outcome for v in verdicts], facts, now)
    if reason is None and verdicts and state not in ("RUNNING", "STALLED", "DONE"):
        reason = verdicts[-1].error
    if reason is None and not alive and state != "DONE" and _has_lost_checkpoints(run, facts):
        reason = f"step {facts.committed_step} was committed, and {run.checkpoints} holds no checkpoint any more"
    if run.mark() is None:
        reason = "; ".join(filter(None, (f"{run.config_path} is missing: {REWRITE}", reason)))
    forecast = facts.forecast if alive else {}
    return RunStatus(
        name=run.name,
        path=str(run.path),
        state=state,
        phase=facts.phase if alive else None,
        attempt=newest.number if newest else 0,
        num_preemptions=sum(v.outcome == "preempted" for v in verdicts),
        num_lost=sum(v.outcome == "lost" for v in verdicts),
        step=facts.step,
        total_steps=facts.total_steps,
        loss=facts.loss,
        samples_per_s=facts.samples_per_s if alive else None,
        eta_s=facts.eta_s() if alive else None,
        committed_step=facts.committed_step,
        verified_at=facts.verified_at,
        job_id=newest.record().get("job_id") if newest else _submitted_job(run),
        reason=reason,
        notice_needs_s=number(forecast.get("needs_s")),
        grace_s=number(forecast.get("grace_s")),
        warning=forecast.get("warning"),
        advice=forecast.get("advice"),
        goodput=ledger_of(run, now, alive).goodput,
        weights_sha256=facts.weights_sha256 if state == "DONE" else None,
    )


def account_of(run: Run, now: float) -> Ledger:
    """Where a run's time went until now; of a ``SeenRun`` each file is read once."""
    return ledger_of(run, now, is_running(run, now))


def is_running(run: Run, now: float) -> bool:
    """Whether its newest attempt is under way."""
    attempts = run.attempts()
    return bool(attempts) and attempts[-1].ended() is None and is_alive(attempts[-1], now)


def is_alive(attempt: Attempt, now: float) -> bool:
    """Whether the attempt's agent runs: its process on this node, else the age of the monitor's last line."""
    agent = attempt.agent()
    alive = agent.is_alive() if agent is not None else False
    if alive is not None:
        return alive
    writes = [attempt.claimed()]
    for name in ("gpu_stats.jsonl", "metrics.jsonl"):
        with contextlib.suppress(OSError):
            writes.append(os.stat(attempt.path / name).st_mtime)
    return now - max(writes) < HEARTBEAT_S


_PHASES = {
    "attempt_started": "starting",
    "placed": "building",
    "workload_built": "restoring",
    "restored": "restored",
    "warmup_started": "warming up",
    "training_started": "training",
    "evaluation_started": "evaluating",
    "evaluation_finished": "training",
    "notice": "draining",
    "draining": "draining",
    "training_finished": "finishing",
}


class _Facts:
    """What the attempts' files say, the newest last."""

    def __init__(self) -> None:
        self.phase: str | None = None
        self.step = 0
        self.total_steps: int | None = None
        self.loss: float | None = None
        self.samples_per_s: float | None = None
        self.pace_s: float | None = None
        self.last_step_at: float | None = None
        self.committed_step: int | None = None
        self.verified_at: float | None = None
        self.weights_sha256: str | None = None
        self.alarm: str | None = None
        self.hang: str | None = None
        self.forecast: dict[str, Any] = {}
        self.alerts: dict[str, str] = {}

    def take(self, attempt: Attempt) -> None:
        for event in attempt.events():
            self._take_event(event)
        record = attempt.last_step()
        if not record:
            return
        self.step = whole(record.get("step"), self.step)
        self.loss = number(record.get("loss", self.loss))
        self.samples_per_s = number(record.get("samples_per_s", self.samples_per_s))
        self.pace_s = number(record.get("pace_s"))
        self.last_step_at = number(record.get("time"))

    def _take_event(self, event: dict[str, Any]) -> None:
        name = event.get("event")
        self.phase = _PHASES.get(str(name), self.phase)
        if name == "attempt_started":
            self.last_step_at = number(event.get("time"))
            self.samples_per_s = self.pace_s = None
            self.forecast = {}
            self.hang = None
            self.alerts = {}
        elif name == "forecast":
            self.forecast = event
        elif name == "alert" and event.get("alert") != "grace":  # which has its place beside the forecast
            self.alerts[str(event.get("alert"))] = str(event.get("text"))
        elif name == "alert_over":
            self.alerts.pop(str(event.get("alert")), None)
        elif name in ("hang", "hang_over"):
            self.hang = tell_hang(event) if name == "hang" else None
        if name == "attempt_started" and self.total_steps is None:  # by the config; a loop of one's own may say else
            self.total_steps = whole(event.get("total_steps"), 0) or None
        elif name == "training_started" and event.get("total_steps") is not None:
            self.total_steps = whole(event["total_steps"], self.total_steps or 0)
        elif name == "restored":
            self.step = whole(event.get("step"), self.step)
        elif name == "save_committed":
            self.committed_step = whole(event.get("step"), self.committed_step or 0)
            self.alarm = None
        elif name == "save_failed":
            self.alarm = f"the last save failed: {event.get('error')}"
        elif name == "save_verified":
            self.verified_at = number(event.get("time"))
        elif name == "training_finished":
            self.step = whole(event.get("step"), self.step)
            self.weights_sha256 = event.get("weights_sha256") or self.weights_sha256  # only rank 0 knows them

    def eta_s(self) -> float | None:
        if self.total_steps is None or self.pace_s is None:
            return None
        return max(0, self.total_steps - self.step) * self.pace_s


def _state(run: SeenRun, alive: bool, outcomes: list[str], facts: _Facts, now: float) -> tuple[str, str | None]:
    if alive:
        if run.is_cancelled():
            return "RUNNING", "cancelled: ends at its next stop"
        if facts.alarm is not None:
            return "RUNNING", facts.alarm
        stalled = facts.last_step_at is not None and now - facts.last_step_at > STALLED_S
        if stalled:
            return "STALLED", facts.hang or f"no step for {now - (facts.last_step_at or now):.0f} s"
        return "RUNNING", facts.hang or "; ".join(facts.alerts.values()) or None
    last = outcomes[-1] if outcomes else None
    if last == "finished":
        return "DONE", None
    if run.is_cancelled():
        return "CANCELLED", "cancelled by hand"
    given_up = _given_up(run)
    if given_up is not None:
        return "FAILED", given_up
    if last is None:
        return "PENDING", "not started yet"
    if last == "failed" and not was_submitted(run.own_events()):
        return "FAILED", None
    words = {"preempted": "PREEMPTED", "interrupted": "STOPPED", "cancelled": "CANCELLED", "lost": "LOST"}
    state = words.get(last, "RETRYING")
    if state in ("PREEMPTED", "LOST", "RETRYING") and (job_id := _waiting_job(run)):
        return "REQUEUED", f"{state.lower()}, waits as job {job_id}"
    return state, None


def _has_lost_checkpoints(run: SeenRun, facts: _Facts) -> bool:
    return facts.committed_step is not None and next(run.checkpoints.glob("step-*"), None) is None


def _given_up(run: SeenRun) -> str | None:
    """The reason, where the orchestrator's last word was that it starts the run no more."""
    last = run.own_events()[-1:]
    return next((str(event.get("reason")) for event in last if event.get("event") == "given_up"), None)


def _waiting_job(run: SeenRun) -> str | None:
    """The job that was put into the queue after the newest attempt ended."""
    newest = run.attempts()[-1]
    events = newest.events()
    since = max(map(time_of, events), default=0.0)
    if any(e.get("event") == "requeue" and e.get("done") for e in events):
        return str(newest.record().get("job_id"))
    later = [e for e in run.own_events() if e.get("event") == "submitted" and time_of(e) >= since]
    return str(later[-1].get("job_id")) if later else None


def _submitted_job(run: SeenRun) -> str | None:
    jobs = [r for r in run.own_events() if r.get("event") == "submitted"]
    return str(jobs[-1].get("job_id")) if jobs else None
