"""A run that an orchestrator looks after: its lease, its journal, and what its files said when they last changed."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

from latentwire.monitor.alerts import Alert
from latentwire.monitor.sinks import Sinks
from latentwire.run.budget import committed_step
from latentwire.run.directory import Attempt, Run
from latentwire.run.journal import Follower, Journal, last_record, read_journal, time_of
from latentwire.run.lease import Lease
from latentwire.run.status import RunStatus, is_alive, run_status
from latentwire.scheduler.jobs import Job, list_jobs
from latentwire.scheduler.queue import Queue

_FIRST_PAUSE_S = 5.0
_LONGEST_PAUSE_S = 300.0
_SUBMISSION_TAKES_S = 60.0
_TOLD = ("events.agent.jsonl", "events.rank0.jsonl")
_FILES = (*_TOLD, "metrics.jsonl")

log = logging.getLogger("latentwire.orchestrate")


class Watched:
    """One run. Hundreds of them wait at the cost of a few ``stat`` calls: files are read only where one has changed.

    Args:
        run: its lease is taken.

    Attributes:
        done: nothing more is to be done for it.
        attempts: as of the last ``refresh``, like ``jobs``, ``is_cancelled`` and the orchestrator's own ``last_event``.
        status: as of the last ``fold``.
        retry_at: no submission before this time, unix seconds.
        submitting: number and token of the submission under way; in its events, so that a job can be found by them.

    Raises:
        RunBusy: another orchestrator holds the lease.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.lease = Lease(run.lease_path)
        self.lease.acquire()
        self.config = run.checked_config()
        self.journal = Journal(run.orchestrator_events)
        self._sinks = Sinks(self.config.alerts, run, self._tell_not_sent)
        self.done = False
        self.retry_at = 0.0
        self.submitting: dict[str, Any] = {}
        self.attempts: list[Attempt] = []
        self.jobs: list[Job] = []
        self.is_cancelled = False
        self.last_event: dict[str, Any] = {}
        self.status: RunStatus = run_status(run)
        self._num_failures = 0
        self._signature: tuple[Any, ...] = ()
        self._folded: tuple[Any, ...] = ()
        self._folded_at = 0.0
        self.fold_took_s = 0.0
        """Of the last fold."""
        self._followers: dict[Path, Follower] = {}
        self._files = self._files_that_matter()
        self.refresh()  # its news were told by an earlier orchestrator

    def refresh(self) -> list[dict[str, Any]]:
        """Read again what has changed on disk; returns the events that are new."""
        signature = self._sign()
        if signature == self._signature:
            return []
        self._signature = signature
        self.attempts = self.run.attempts()
        self._files = self._files_that_matter()
        self.jobs = list_jobs(self.run)
        self.last_event = last_record(self.run.orchestrator_events) or {}
        self.is_cancelled = self.run.is_cancelled()
        return self._read_news()

    def fold(self, now: float, at_most_every_s: float) -> None:
        """Bring ``status`` up to date, if it can have changed: also without a new line a started run can stall."""
        unchanged = self._folded == self._signature and (self.done or not self.attempts)
        if unchanged or now - self._folded_at < at_most_every_s:
            return
        began = time.monotonic()
        self._folded, self._folded_at = self._signature, now
        self.status = run_status(self.run)
        self.fold_took_s = time.monotonic() - began

    def chain(self) -> list[Job]:
        """The last job that was submitted by itself, and its successors."""
        firsts = [index for index, job in enumerate(self.jobs) if job.after is None]
        return self.jobs[firsts[-1] :] if firsts else []

    def is_unsure(self) -> bool:
        """Whether a submission was begun, or failed, of which there is no job: the scheduler may know better."""
        begun = self.last_event.get("event") in ("submitting", "submission_failed")
        return begun and int(self.last_event.get("number", 0)) > (self.jobs[-1].number if self.jobs else 0)

    def is_being_submitted(self, now: float) -> bool:
        """Whether a submission may be under way: its process outlives an orchestrator that is killed."""
        begun = self.is_unsure() and self.last_event["event"] == "submitting"
        return begun and now - time_of(self.last_event) < _SUBMISSION_TAKES_S

    def found_in(self, queue: Queue) -> list[str]:
        """Ids of the jobs that came of a submission that was cut short: of an array, of this run's task alone."""
        if not self.is_unsure():
            return []
        found = queue.ids_with(str(self.last_event.get("token", "")))
        task = self.last_event.get("task")
        return found if task is None else [job_id for job_id in found if job_id.endswith(f"_{task}")]

    def runs_locally(self, now: float) -> bool:
        """Whether an attempt lives on this machine. One under Slurm is judged by its job, whatever its node may say."""
        attempt = self.attempts[-1] if self.attempts else None
        if attempt is None or attempt.record().get("scheduler") == "slurm" or attempt.ended() is not None:
            return False
        return is_alive(attempt, now)

    def resumed_at(self) -> float:
        """When a person last asked for the run again, unix seconds; 0: never."""
        return max((time_of(r) for r in self._own("resumed")), default=0.0)

    def rung_decided_at(self, job: Job, restarts: int) -> float | None:
        """When the number of GPUs of a pending job was last decided upon, unix seconds."""
        of_job = [r for r in self._own("rung") if r.get("job_id") == job.job_id and r.get("restarts") == restarts]
        return time_of(of_job[-1]) if of_job else None

    def num_unheard_jobs(self) -> int:
        """So many jobs in a row, up to the last, ended without having made an attempt. Successors do not count."""
        started = {attempt.record().get("job_id") for attempt in self.attempts}
        number = 0
        for job in reversed(self.jobs):
            if job.job_id in started:
                break
            number += job.after is None
        return number

    def tell_lost(self, attempt: Attempt) -> None:
        """Write down, once, that an attempt ended without a word."""
        if all(r.get("attempt") != attempt.number for r in self._own("attempt_lost")):
            self.journal.event("attempt_lost", attempt=attempt.number, step=committed_step(attempt))

    def last_words(self, job: Job) -> str:
        """What a job that made no attempt left in its log."""
        paths = sorted(path for folder in (self.run.path, self.run.path.parent) for path in _error_logs(folder, job))
        text = paths[-1].read_text(errors="replace").strip() if paths else ""
        return text.splitlines()[-1][:300] if text else "it left no message"

    def tell_death(self, job: Job) -> str:
        """Write down, once, that a job made no attempt; returns its last words."""
        reason = self.last_words(job)
        if all(r.get("job_id") != job.job_id for r in self._own("job_died")):
            self.journal.event("job_died", job_id=job.job_id, reason=reason)
        return reason

    def give_up(self, reason: str) -> None:
        """Submit it no more; the reason stays on disk, and a person hears of it."""
        self.done = True
        self.journal.event("given_up", reason=reason)
        self._folded = ()  # the next fold is the last, and nothing new is read before it
        try:
            self._sinks.send(Alert("failed", True, f"given up: {reason}"), self.run.newest_number())
        except RuntimeError as error:  # no thread could be started: the other runs must be looked after all the same
            self._tell_not_sent("sinks", str(error))

    def put_off(self, error: str, now: float) -> None:
        """A submission failed for a reason that may pass: try again after a pause that doubles."""
        pause = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**self._num_failures)
        self._num_failures += 1
        self.retry_at = now + pause
        self.journal.event("submission_failed", error=error, again_in_s=pause, **self.submitting)

    def begin(self, number: int, token: str, task: int | None = None) -> None:
        """Write down that the next job is about to be submitted, as a task of an array where ``task`` is given."""
        self.submitting = {"number": number, "token": token} | ({} if task is None else {"task": task})
        self.journal.event("submitting", **self.submitting)

    def submitted(self, job: Job, **facts: Any) -> None:
        """Write down that a submission was taken."""
        self._num_failures = 0
        self.journal.event("submitted", job_id=job.job_id, scheduler=job.scheduler, number=job.number, **facts)

    def release(self, alerts_within_s: float = 0.0) -> None:
        """Give the run back; waits at most so long for an alert under way."""
        self._sinks.close(alerts_within_s)
        self.journal.close()
        self.lease.release()

    def _tell_not_sent(self, sink: str, reason: str) -> None:
        """In the log alone: the last line of the run's journal says that it was given up."""
        log.warning("%s: no alert reaches the %s: %s", self.run.name, sink, reason)

    def _own(self, name: str) -> list[dict[str, Any]]:
        return [r for r in read_journal(self.run.orchestrator_events) if r.get("event") == name]

    def _files_that_matter(self) -> list[str]:
        """Strings: a path object costs more to make than the file to look at."""
        run = self.run
        paths = [run.path / "attempts", run.path / "jobs", run.orchestrator_events, run.cancel_path]
        if self.attempts:
            paths += [self.attempts[-1].path / name for name in _FILES]
        return [str(path) for path in paths]

    def _sign(self) -> tuple[Any, ...]:
        """Changes whenever a file does that decides what to do, or that is shown."""
        return tuple(map(_stamp, self._files))

    def _read_news(self) -> list[dict[str, Any]]:
        paths = [attempt.path / name for attempt in self.attempts for name in _TOLD]
        for path in [*paths, self.run.orchestrator_events]:
            self._followers.setdefault(path, Follower(path))
        return sorted((event for follower in self._followers.values() for event in follower.read()), key=time_of)


def _error_logs(folder: Path, job: Job) -> list[Path]:
    return list((folder / "submitit").glob(f"{job.job_id}/*.err"))


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size
