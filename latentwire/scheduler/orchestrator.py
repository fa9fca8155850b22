"""The Orchestrator: looks after runs until each is done.

It keeps nothing in memory that is not on disk, so it can be killed at any moment and started again. A run has one
orchestrator (a lease) and one live job: a new one is submitted only when the last is known to be gone.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from latentwire.errors import LatentWireError, RunBusy, SchedulerError
from latentwire.run.atomic import write_json
from latentwire.run.budget import committed_step, next_move
from latentwire.run.directory import Attempt, Run
from latentwire.run.journal import Follower, Journal, last_record, read_journal, time_of
from latentwire.run.lease import Lease
from latentwire.run.status import RunStatus, is_alive, run_status
from latentwire.run.telling import tell
from latentwire.scheduler.queue import JobStates, job_states
from latentwire.scheduler.submission import Job, list_jobs, submit

_POLL_S = 0.5
_RENEW_S = 60.0
_SUBMISSION_TAKES_S = 60.0

log = logging.getLogger("latentwire.orchestrate")


class Watched:
    """A run that this orchestrator looks after: its lease, its journal, and what was last seen of it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.lease = Lease(run.lease_path)
        self.lease.acquire()
        self.config = run.config()
        self.journal = Journal(run.orchestrator_events)
        self.done = False
        self._followers: dict[Path, Follower] = {}
        self._skip_what_was_told()

    def submit(self) -> None:
        """Submit the run's next job; the intention is on disk first."""
        self.journal.event("submitting", number=len(list_jobs(self.run)) + 1)
        job = submit(self.run)
        self.journal.event("submitted", job_id=job.job_id, scheduler=job.scheduler, number=job.number)

    def give_up(self, reason: str) -> None:
        """Submit it no more; the reason stays on disk."""
        self.done = True
        self.journal.event("given_up", reason=reason)

    def release(self) -> None:
        """Give the run back."""
        self.journal.close()
        self.lease.release()

    def news(self) -> list[str]:
        """What happened since the last call, in words."""
        self._follow_new_files()
        events = [event for follower in self._followers.values() for event in follower.read()]
        lines = [tell(event) for event in sorted(events, key=time_of)]
        return [line for line in lines if line is not None]

    def _follow_new_files(self) -> None:
        for attempt in self.run.attempts():
            for path in sorted(attempt.path.glob("events.*.jsonl")):
                self._followers.setdefault(path, Follower(path))
        self._followers.setdefault(self.run.orchestrator_events, Follower(self.run.orchestrator_events))

    def _skip_what_was_told(self) -> None:
        self._follow_new_files()
        for follower in self._followers.values():
            follower.read()


class Orchestrator:
    """Looks after runs until each is finished, stopped, or beyond its budget.

    Args:
        runs: their directories; each is leased, or ``RunBusy`` is raised.
        show: called with the statuses after each look, and with the news in words.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        show: Callable[[Sequence[RunStatus]], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._show = show
        self._clock = clock
        self._stop = threading.Event()
        self._next_renewal = clock() + _RENEW_S
        self.watched: list[Watched] = []
        try:
            self.watched.extend(Watched(run) for run in runs)
        except LatentWireError:
            self.release()
            raise

    def stop(self) -> None:
        """Make ``main`` return soon; jobs go on. Safe in a signal handler."""
        self._stop.set()

    def main(self) -> list[RunStatus]:
        """Submit and watch until all runs are done or ``stop``; returns what became of them. Blocks."""
        try:
            while True:
                self._look()
                statuses = [run_status(watched.run) for watched in self.watched]
                self._show(statuses)
                if all(watched.done for watched in self.watched) or self._stop.wait(_POLL_S):
                    return statuses
        finally:
            self.release()

    def release(self) -> None:
        """Give all leases back."""
        for watched in self.watched:
            watched.release()

    def _look(self) -> None:
        self._renew()
        open_ones = [watched for watched in self.watched if not watched.done]
        jobs_of = [list_jobs(watched.run) for watched in open_ones]  # once: a job that appears later was not asked for
        try:
            states = job_states([jobs[-1] for jobs in jobs_of if jobs])
        except SchedulerError as error:
            log.warning("the scheduler does not answer, waiting: %s", error)
            return
        for watched, jobs in zip(open_ones, jobs_of, strict=True):
            try:
                self._advance(watched, jobs, states)
            except (LatentWireError, OSError) as error:  # an OSError: its directory was removed, or cannot be written
                watched.give_up(str(error))
                log.error("%s: given up: %s", watched.run.name, error)
        for watched in self.watched:
            for line in watched.news():
                log.info("%s: %s", watched.run.name, line)

    def _renew(self) -> None:
        if self._clock() < self._next_renewal:
            return
        self._next_renewal = self._clock() + _RENEW_S
        for watched in self.watched:
            if watched.done:
                continue
            try:
                watched.lease.renew()
            except RunBusy as error:  # asleep for too long: the run is somebody else's now, the others stay ours
                log.warning("%s", error)
                watched.done = True

    def _advance(self, watched: Watched, jobs: Sequence[Job], states: JobStates) -> None:
        """One run: wait for its job, or submit the next, or be done with it."""
        run, now = watched.run, self._clock()
        attempts = run.attempts()
        job, attempt = (jobs[-1] if jobs else None), (attempts[-1] if attempts else None)
        running = attempt is not None and attempt.ended() is None and is_alive(attempt, now)
        if running or (job is not None and job.job_id in states.live) or _is_being_submitted(run, job, now):
            return
        if job is not None and job.job_id in states.cancelled and not run.cancel_path.exists():
            write_json(run.cancel_path, {"time": now, "by": f"scancel of job {job.job_id}"})
            watched.journal.event("job_cancelled", job_id=job.job_id)
        if run.cancel_path.exists():
            watched.done = True
        elif job is not None and job.job_id not in {a.record().get("job_id") for a in attempts}:
            self._after_a_death(watched, job)
        else:
            self._after_an_attempt(watched, attempt)

    def _after_an_attempt(self, watched: Watched, attempt: Attempt | None) -> None:
        if attempt is not None and attempt.ended() is None and not self._told_lost(watched, attempt):
            watched.journal.event("attempt_lost", attempt=attempt.number, step=committed_step(attempt))
        move = next_move(watched.run, watched.config.retry)
        if move.again:
            ended_at = float((attempt.ended() or {}).get("time", 0)) if attempt is not None else 0.0
            if self._clock() >= ended_at + move.pause_s:
                watched.submit()
        elif move.reason in ("finished", "interrupted", "cancelled"):
            watched.done = True
        else:
            watched.give_up(move.reason)

    @staticmethod
    def _told_lost(watched: Watched, attempt: Attempt) -> bool:
        records = read_journal(watched.run.orchestrator_events)
        return any(r.get("event") == "attempt_lost" and r.get("attempt") == attempt.number for r in records)

    def _after_a_death(self, watched: Watched, job: Job) -> None:
        """The newest job is gone and never made an attempt."""
        last_words = _last_words(watched.run, job)
        watched.journal.event("job_died", job_id=job.job_id, reason=last_words)
        started = {attempt.record().get("job_id") for attempt in watched.run.attempts()}
        since = itertools.takewhile(lambda j: j.job_id not in started, reversed(list_jobs(watched.run)))
        deaths = sum(1 for _ in since)
        if deaths > watched.config.retry.other:
            watched.give_up(f"{deaths} jobs in a row died before they started: {last_words}")
        else:
            watched.submit()


def _is_being_submitted(run: Run, job: Job | None, now: float) -> bool:
    """An orchestrator that was killed may have left a submission under way, whose job is not written down yet."""
    record = last_record(run.orchestrator_events)
    if record is None or record.get("event") != "submitting":
        return False
    known = job.number if job is not None else 0
    return int(record.get("number", 0)) > known and now - float(record["time"]) < _SUBMISSION_TAKES_S


def _last_words(run: Run, job: Job) -> str:
    paths = sorted((run.path / "submitit").glob(f"{job.job_id}/*.err"))
    text = paths[-1].read_text(errors="replace").strip() if paths else ""
    return text.splitlines()[-1][:300] if text else "it left no message"
