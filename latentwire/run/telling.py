"""Events in words: one short line for each, for logs and terminals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from latentwire.run.figures import number

Event = Mapping[str, Any]

_CAUSES = {
    "oom": "out of memory",
    "network": "network failure",
    "user": "error that would recur",
    "other": "unexpected error",
}
"""Those that are no words for people. Files and ``--json`` have the keys."""

_WORDS: dict[str, Callable[[Event], str | None]] = {
    "submitted": lambda e: (
        f"found as job {e.get('job_id')}: its submission was cut short"
        if e.get("found")
        else f"submitted as job {e.get('job_id')} ({e.get('scheduler')})"
    ),
    "submission_failed": lambda e: (
        "could not be submitted"
        + (f", again in {e['again_in_s']} s" if "again_in_s" in e else "")
        + f": {e.get('error')}"
    ),
    "rung": lambda e: (
        f"job {e.get('job_id')} asks for {e.get('gpus')} GPUs instead of {e.get('before')}: {e.get('why')}"
        if e.get("gpus") != e.get("before")
        else None
    ),
    "job_died": lambda e: f"job {e.get('job_id')} died before it started: {e.get('reason')}",
    "job_cancelled": lambda e: f"job {e.get('job_id')} was cancelled by hand: not submitted again",
    "requeue": lambda e: (
        f"requeued, {e.get('given_back_s')} s of grace given back"
        if e.get("done")
        else f"not requeued: {e.get('reason')}"
    ),
    "attempt_lost": lambda e: (
        f"attempt {e.get('attempt')} ended without a word (SIGKILL, node failure), committed step {e.get('step')}"
    ),
    "given_up": lambda e: f"ALARM given up: {e.get('reason')}",
    "resumed": lambda e: f"resumed by hand after attempt {e.get('after_attempt')}",
    "attempt_started": lambda e: f"attempt started (job {e.get('job_id', '-')})",
    "placed": lambda e: f"placed on {' | '.join(', '.join(rank) for rank in e.get('devices', []))}: {e.get('why')}",
    "node_started": lambda e: f"node {e.get('node')} ({e.get('host')}) takes part",
    "environment_changed": lambda e: f"WARNING environment changed, {e.get('note')}: {'; '.join(e.get('changes', []))}",
    "hang": lambda e: f"WARNING {tell_hang(e)}",
    "hang_over": lambda e: f"{_ranks(e.get('ranks', []))} came after {_figure(e.get('waited_s'))} s",
    "alert": lambda e: None if e.get("alert") == "grace" else f"WARNING {e.get('text')}",  # the forecast said so
    "alert_over": lambda e: f"alert over ({e.get('alert')}): {e.get('text')}",
    "config_changed": lambda e: f"config changed: {'; '.join(e.get('changes', []))}",
    "monitor_not_started": lambda e: f"WARNING the monitor could not be started again: {e.get('error')}",
    "monitor_ended": lambda e: f"WARNING the monitor ended {e.get('how')} and is started again",
    "alerts_failed": lambda e: f"WARNING no more alerts in this attempt: {e.get('error')}",
    "alert_not_sent": lambda e: f"WARNING no alert reaches the {e.get('sink')}: {e.get('error')}",
    "micro_batch_halved": lambda e: (
        f"WARNING micro-batch {e.get('to')} instead of {e.get('from')} after running out of memory: {e.get('note')}"
    ),
    "forecast": lambda e: (
        f"WARNING {e['warning']}. To change it: {e.get('advice')}"
        if e.get("warning")
        else f"a notice fits: needs {_figure(e.get('needs_s'))} s of {_figure(e.get('grace_s'))} s grace"
    ),
    "workload_built": lambda e: f"workload built in {_seconds(e)}",
    "restored": lambda e: f"resumed at step {e.get('step')} in {_seconds(e)}" if e.get("step") else "starts at step 0",
    "training_started": lambda e: f"training from step {e.get('step')} to {e.get('total_steps')}",
    "evaluation_finished": lambda e: f"evaluated at step {e.get('step')}: eval/loss {_figure(e.get('eval/loss'))}",
    "notice": lambda e: f"notice: {e.get('signal')}",
    "draining": lambda e: f"draining, {_figure(e.get('deadline_in_s'))} s left",
    "save_committed": lambda e: f"step {e.get('step')} committed in {_seconds(e)}",
    "save_failed": lambda e: f"ALARM save of step {e.get('step')} failed, trying again: {e.get('error')}",
    "checkpoint_given_up": lambda e: f"WARNING step {e.get('step')} was given up to make room on a full disk",
    "save_torn": lambda e: f"ALARM step {e.get('step')} was not saved: {e.get('error')}",
    "staging_failed": lambda e: f"WARNING step {e.get('step')} is streamed, training waits: {e.get('error')}",
    "share_failed": lambda e: f"ALARM a rank's share of step {e.get('step')} failed: {e.get('error')}",
    "read_back_skipped": lambda e: f"step {e.get('step')} is read back by the next attempt: no time is left",
    "interval_chosen": lambda e: f"saves every {_figure(e.get('seconds'))} s: {e.get('reason')}",
    "weights_unchanged": lambda e: (
        f"ALARM {e.get('saves')} saves in a row hold the same {e.get('group')}: is anything trained?"
    ),
    "checkpoint_quarantined": lambda e: f"ALARM {e.get('path')} moved to quarantine: {e.get('reason')}",
    "checkpoint_skipped": lambda e: f"ALARM {e.get('path')} skipped: {e.get('reason')}",
    "checkpoint_unreadable": lambda e: f"ALARM {e.get('path')} cannot be read: {e.get('error')}",
    "mirror_committed": lambda e: f"step {e.get('step')} copied to the mirror in {_seconds(e)}",
    "mirror_failed": lambda e: f"ALARM {e.get('path')} could not be copied to the mirror: {e.get('error')}",
    "mirror_restored": lambda e: f"step {e.get('step')} brought back from {e.get('origin')} in {_seconds(e)}",
    "mirror_skipped": lambda e: f"ALARM {e.get('folder')} of the mirror is of no use: {e.get('reason')}",
    "mirror_stopped": lambda e: f"nothing more is copied to the mirror: {e.get('reason')}",
    "step_skipped": lambda e: f"WARNING step {e.get('step')} skipped: {e.get('reason')}",
    "left_unsaved": lambda e: f"ALARM left without saving step {e.get('step')}: {e.get('error')}",
    "mark_failed": lambda e: f"ALARM nothing could be added to {e.get('path')}: {e.get('error')}",
    "prune_failed": lambda e: f"ALARM an old checkpoint could not be deleted: {e.get('error')}",
    "partial_step_not_saved": lambda e: f"WARNING a step was half done and could not be saved at step {e.get('step')}",
    "training_finished": lambda e: f"finished at step {e.get('step')}, weights {str(e.get('weights_sha256'))[:16]}",
    "attempt_ended": lambda e: (
        "attempt ended: "
        + tell_end(str(e.get("outcome", "")), e.get("cause"))
        + (f" at step {e['step']}" if e.get("step") is not None else "")
        + (f": {e['error']}" if e.get("error") else "")
    ),
}


def tell(event: Event) -> str | None:
    """The event in words; None for one that only matters in a file."""
    words = _WORDS.get(str(event.get("event")))
    try:
        return words(event) if words is not None else None
    except (TypeError, ValueError, KeyError, AttributeError):  # somebody else's line, or one that was damaged
        return f"{event.get('event')}: cannot be read"


def tell_cause(cause: str) -> str:
    """Why an attempt failed, or what time was lost to."""
    return _CAUSES.get(cause, cause)


def tell_end(outcome: str, cause: str | None) -> str:
    """How an attempt ended: ``failed (out of memory)``."""
    return f"{outcome} ({tell_cause(cause)})" if cause else outcome


def tell_hang(event: Event) -> str:
    """Which ranks keep which others waiting, and where they stand."""
    waited = f"{_figure(event.get('waited_s'))} s"
    if not event.get("ranks"):
        return f"all ranks wait for each other since {waited}: the network between them"
    return (
        f"{_ranks(event['ranks'])} ({', '.join(event.get('at', []))}) did not come for {waited}, "
        f"awaited by {_ranks(event.get('waiting', []))}"
    )


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))}"


def _seconds(event: Event) -> str:
    return f"{_figure(event.get('seconds'))} s"


def _figure(value: Any) -> str:
    known = number(value)
    return str(value) if known is None else f"{known:.3g}"
