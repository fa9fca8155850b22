"""The Orchestrator: looks after runs until each is done.

It keeps nothing in memory that is not on disk, so it can be killed at any moment and started again. A run has one
orchestrator (a lease) and one live job: a new one is submitted only when the last is known to be gone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from latentwire.errors import LatentWireError, RunBusy, SchedulerError
from latentwire.run.budget import next_move
from latentwire.run.directory import Run
from latentwire.run.disk import is_passing, told
from latentwire.run.journal import time_of
from latentwire.run.status import RunStatus
from latentwire.run.telling import tell
from latentwire.scheduler import ladder
from latentwire.scheduler.jobs import Job, write_job
from latentwire.scheduler.queue import Queue, ask, run_once
from latentwire.scheduler.reports import Reports
from latentwire.scheduler.submission import Request, is_permanent, scheduler_kinds, submit
from latentwire.scheduler.watched import Watched

_FEW = 8
_LOOK_S, _LOOK_AT_MANY_S = 0.5, 5.0
_FOLD_S, _FOLD_MANY_S = 0.5, 10.0
_ASK_S, _ASK_EAGERLY_S, _EAGER_FOR_S = 10.0, 1.0, 20.0
_FOLD_PAUSES = 20
"""So many times what all folds took, none is made again: 5 % of a core at most."""
_RENEW_S = 60.0
_ALERTS_WITHIN_S = 5.0
_TURNING_POINTS = {"submitted", "attempt_ended", "requeue"}
"""After these a job's state is about to change: Slurm is asked more often for a while, and otherwise left in peace."""

log = logging.getLogger("latentwire.orchestrate")


class Orchestrator:
    """Looks after runs until each is finished, stopped, or beyond its budget.

    Args:
        runs: their directories; each is leased, or ``RunBusy`` is raised.
        show: called with the statuses after each look.
        max_running: so many of them may have a job at a time; None: all.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        show: Callable[[Sequence[RunStatus]], None],
        max_running: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._show = show
        self._max_running = len(runs) if max_running is None else max_running
        self._clock = clock
        self._stop = threading.Event()
        self._next_renewal = clock() + _RENEW_S
        self._next_ask = 0.0
        self._eager_until = 0.0
        self._reports = Reports()
        self.watched: list[Watched] = []
        try:
            self.watched.extend(Watched(run) for run in runs)
        except LatentWireError:
            self.release()
            raise
        self._kinds = scheduler_kinds([watched.config for watched in self.watched])

    def stop(self) -> None:
        """Make ``main`` return soon; jobs go on. Safe in a signal handler."""
        self._stop.set()

    def main(self) -> list[RunStatus]:
        """Submit and watch until all runs are done or ``stop``; returns what became of them. Blocks."""
        try:
            while True:
                self._look()
                open_ones = [watched for watched in self.watched if not watched.done]
                self._fold(0.0 if not open_ones else _FOLD_S if len(open_ones) <= _FEW else _FOLD_MANY_S)
                self._show([watched.status for watched in self.watched])
                pause = _LOOK_S if len(open_ones) <= _FEW else _LOOK_AT_MANY_S
                if not open_ones:
                    self._reports.finish(self._stop)
                if not open_ones or self._stop.wait(pause):
                    self._fold(0.0)
                    return [watched.status for watched in self.watched]
        finally:
            self.release()

    def release(self) -> None:
        """Give all leases back; blocks for a few seconds where alerts are under way."""
        until = time.monotonic() + _ALERTS_WITHIN_S
        for watched in self.watched:
            watched.release(max(0.0, until - time.monotonic()))

    def _is_slurm(self, watched: Watched) -> bool:
        return self._kinds[watched.config.scheduler.kind] == "slurm"

    def _fold(self, at_most_every_s: float) -> None:
        """Bring statuses up to date; what that costs for many long runs is held to a share of a core."""
        pause_s = _FOLD_PAUSES * sum(watched.fold_took_s for watched in self.watched) if at_most_every_s else 0.0
        for watched in self.watched:
            watched.fold(self._clock(), max(at_most_every_s, pause_s))

    def _look(self) -> None:
        """Read what changed; now and then ask the schedulers, and do what is to be done."""
        self._renew()
        self._tell_news()
        self._reports.go_on()
        now = self._clock()
        open_ones = [watched for watched in self.watched if not watched.done]
        if now < self._next_ask and any(self._is_slurm(watched) for watched in open_ones):
            return
        self._next_ask = now + (_ASK_EAGERLY_S if now < self._eager_until else _ASK_S)
        try:
            cut_short = any(watched.is_unsure() and self._is_slurm(watched) for watched in open_ones)
            queue = ask([job for watched in open_ones for job in watched.chain()], unknown_ones=cut_short)
        except SchedulerError as error:
            log.warning("the scheduler does not answer, waiting: %s", error)
            return
        due = self._advance_all(open_ones, queue)
        if due:
            self._submit(due)
            self._tell_news()

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
            except OSError as error:  # the next renewal tries again; here nobody takes over from a living process
                log.warning("%s: the lease was not renewed: %s", watched.run.name, told(error))

    def _tell_news(self) -> None:
        for watched in self.watched:
            for event in watched.refresh():
                if event.get("event") in _TURNING_POINTS:
                    self._eager_until = self._clock() + _EAGER_FOR_S
                    self._next_ask = 0.0
                if event.get("event") == "attempt_ended":
                    self._reports.want(watched.run)
                line = tell(event)
                if line is not None:
                    log.info("%s: %s", watched.run.name, line)

    # --- one run ------------------------------------------------------------------------------------------------------

    def _advance_all(self, open_ones: Sequence[Watched], queue: Queue) -> list[Watched]:
        """Bring each run forward; returns those whose next job is due and may be submitted now."""
        busy = [watched for watched in open_ones if self._look_after(watched, queue)]
        free = self._max_running - len(busy)
        due: list[Watched] = []
        for watched in open_ones:
            if watched in busy or watched.done or free <= 0:
                continue
            try:
                due_at = self._due_at(watched)
            except (LatentWireError, OSError) as error:  # an OSError: its directory was removed, or cannot be written
                self._wait_or_give_up(watched, error)
                continue
            if due_at is not None:
                free -= 1  # one that pauses keeps its place
                due += [watched] if self._clock() >= due_at else []
        return due

    def _look_after(self, watched: Watched, queue: Queue) -> bool:
        """Do what its jobs need; returns whether it has, or may have, a job: then no other is submitted."""
        chain = watched.chain()
        try:
            self._heed_a_cancel(watched, chain, queue)
            live = [job for job in chain if queue.is_live(job)]
            if live:
                self._mind_the_ladder(watched, live[0], queue)
            if live or watched.runs_locally(self._clock()):
                return True
            found = watched.found_in(queue)
            if found:  # by an orchestrator that was killed, whose submission did not write the job down
                self._adopt(watched, int(watched.last_event["number"]), found)
            return bool(found) or watched.is_being_submitted(self._clock())
        except (LatentWireError, OSError) as error:
            self._wait_or_give_up(watched, error)
            return True  # while that is not known no other is submitted

    def _heed_a_cancel(self, watched: Watched, chain: Sequence[Job], queue: Queue) -> None:
        """A plain scancel is a person's word: the run stays cancelled, and what waits after its job is taken back."""
        since = watched.resumed_at() if any(queue.was_cancelled(job) for job in chain) else 0.0
        cancelled = [job for job in chain if queue.was_cancelled(job) and job.submitted > since]
        if cancelled and not watched.is_cancelled:
            watched.run.mark_cancelled(by=f"scancel of job {cancelled[0].job_id}")
            watched.is_cancelled = True
            watched.journal.event("job_cancelled", job_id=cancelled[0].job_id)
        if not watched.is_cancelled:
            return
        for job in chain:
            state = queue.state_of(job)
            if job.scheduler == "slurm" and state is not None and state.state == "PENDING":
                run_once(["scancel", job.job_id])

    def _adopt(self, watched: Watched, number: int, job_ids: list[str]) -> None:
        """Take over jobs whose submission was cut short: the first, and its successors."""
        before = None
        for place, job_id in enumerate(sorted(job_ids, key=lambda each: int(each.partition("_")[0]))):
            write_job(watched.run, number + place, job_id, "slurm", after=before)
            before = job_id
        watched.refresh()
        watched.submitted(watched.chain()[0], found=True)

    def _due_at(self, watched: Watched) -> float | None:
        """When the next job of a run without one is due, unix seconds; None: never again."""
        run, attempt = watched.run, watched.attempts[-1] if watched.attempts else None
        if watched.is_cancelled:
            watched.done = True
            return None
        ended = attempt.ended() if attempt is not None else None
        unheard = watched.num_unheard_jobs()
        if unheard and (ended is None or ended.get("outcome") != "finished"):
            return self._due_after_a_death(watched, unheard)
        if attempt is not None and ended is None:
            watched.tell_lost(attempt)
        move = next_move(run, watched.config.retry)
        if move.again:
            return max(watched.retry_at, time_of(ended or {}) + move.pause_s)
        if move.reason in ("finished", "interrupted", "cancelled"):
            watched.done = True
        else:
            self._give_up(watched, move.reason)
        return None

    def _due_after_a_death(self, watched: Watched, unheard: int) -> float | None:
        """The last job is gone and never made an attempt."""
        reason = watched.tell_death(watched.jobs[-1])
        if unheard <= watched.config.retry.other:
            return watched.retry_at
        self._give_up(watched, f"{unheard} jobs in a row died before they started: {reason}")
        return None

    def _wait_or_give_up(self, watched: Watched, error: LatentWireError | OSError) -> None:
        """A full disk or a file server that is away is waited for: the next look tries again."""
        if isinstance(error, OSError) and is_passing(error):
            log.warning("%s: waiting: %s", watched.run.name, told(error))
        else:
            self._give_up(watched, told(error))

    @staticmethod
    def _give_up(watched: Watched, reason: str) -> None:
        watched.give_up(reason)
        log.error("%s: given up: %s", watched.run.name, reason)

    def _mind_the_ladder(self, watched: Watched, job: Job, queue: Queue) -> None:
        """A pending job asks for fewer GPUs after a while, and after a restart again for as many as can be had soon."""
        config, state = watched.config, queue.state_of(job)
        if len(config.scheduler.ladder) == 1 or state is None or state.state != "PENDING":
            return
        decided = watched.rung_decided_at(job, state.restarts)
        wanted: int | None
        if decided is None and state.restarts:
            wanted, why = ladder.best_rung(config), "it waits for its next start"
        else:
            wanted = ladder.next_rung(config, state, decided, self._clock())
            why = f"it waited for longer than patience ({state.reason})"
        if wanted is None:
            return
        before = (state.gpus_per_node or 0) * config.scheduler.nodes
        gpus = self._change_gpus(watched, job, before, wanted)
        watched.journal.event("rung", job_id=job.job_id, restarts=state.restarts, gpus=gpus, before=before, why=why)

    @staticmethod
    def _change_gpus(watched: Watched, job: Job, before: int, wanted: int) -> int:
        """The GPUs that the pending job asks for now: those that are wanted, unless Slurm refused."""
        if wanted == before:
            return before
        try:
            ladder.change_gpus(watched.config, job.job_id, wanted)
        except SchedulerError as error:
            log.warning("%s: job %s keeps its %d GPUs: %s", watched.run.name, job.job_id, before, error)
            return before
        return wanted

    # --- submitting ---------------------------------------------------------------------------------------------------

    def _submit(self, due: Sequence[Watched]) -> None:
        """Submit the next jobs, those that ask for the same as one array."""
        groups: dict[str, list[Watched]] = {}
        for watched in due:
            groups.setdefault(self._array_of(watched), []).append(watched)
        for group in groups.values():
            request = Request.of([watched.run for watched in group])
            for task, (watched, (_, number)) in enumerate(zip(group, request.entries, strict=True)):
                watched.begin(number, request.token, task if len(group) > 1 else None)
            try:
                jobs = submit(request)
            except (SchedulerError, OSError) as error:
                self._after_a_refusal(group, error)
                continue
            for watched, job in zip(group, jobs, strict=True):
                watched.submitted(job)

    def _array_of(self, watched: Watched) -> str:
        """Equal for runs whose next jobs can be tasks of one array."""
        config = watched.config
        if not self._is_slurm(watched) or config.scheduler.successors:
            return watched.run.name
        return f"{config.scheduler!r} {config.elastic.patience_s} {config.preemption.grace_s}"

    def _after_a_refusal(self, group: Sequence[Watched], error: SchedulerError | OSError) -> None:
        is_final = not is_passing(error) if isinstance(error, OSError) else is_permanent(error)
        for watched in group:
            if is_final:
                self._give_up(watched, told(error))
            else:
                watched.put_off(told(error), self._clock())
