"""Runs without an orchestrator: one job is submitted, or this very allocation becomes the run's job."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latentwire.config import Config
from latentwire.errors import RunBusy, RunError, SchedulerError
from latentwire.run.directory import Run, create_run, list_runs, refuse_another_identity, run_of
from latentwire.run.process import ProcessIdentity
from latentwire.run.resuming import take_back_stops
from latentwire.run.status import run_status
from latentwire.scheduler import slurm
from latentwire.scheduler.jobs import Job, list_jobs, write_job
from latentwire.scheduler.queue import ask
from latentwire.scheduler.submission import Request, check_times, is_permanent, scheduler_kind, submit
from latentwire.scheduler.watched import Watched

_FIRST_NODE_TAKES_S = 300.0
_POLL_S = 0.5


def submit_one(config: Config, runs_dir: Path) -> list[Job]:
    """Submit the next job of a config's run, and its successors; returns them. Blocks for about a second.

    Raises:
        RunBusy: an orchestrator looks after the run, or it has a job.
        RunError: it is finished.
        SchedulerError: the scheduler refused, or does not answer.
    """
    check_times([config])
    if is_done(config, runs_dir):
        raise RunError(f"{config.name} is finished; another experiment wants another name (name={config.name}-2)")
    with _held(config, runs_dir) as watched:
        request = Request.of([watched.run])
        watched.begin(request.entries[0][1], request.token)
        try:
            (job,) = submit(request)
        except (SchedulerError, OSError) as error:
            watched.journal.event("submission_failed", error=str(error), **watched.submitting)
            if isinstance(error, SchedulerError) and is_permanent(error):
                watched.give_up(str(error))
            raise
        watched.submitted(job)
        watched.refresh()
        return watched.chain()


def run_here(read_config: Callable[[], Config], runs_dir: Path) -> Run:
    """The run that this allocation, or else this machine, is to train; it is written down as the run's job.

    Each node of an allocation asks once: the first makes the run, the others wait for it. A Slurm job that was started
    again goes on with the run that it had, whatever its config file says by now.

    Raises:
        RunBusy: an orchestrator looks after the run, or it has another job.
        SchedulerError: this is no place to train in, or the scheduler does not answer.
    """
    job_id = slurm.own_job_id(os.environ)
    if job_id is None:
        me = dataclasses.asdict(ProcessIdentity.of())
        return _become_its_job(read_config(), runs_dir, str(os.getppid()), "local", controller=me)
    _refuse_unless_once_a_node(job_id)
    if slurm.restart_count(os.environ) and (mine := [run for run in list_runs(runs_dir) if _has_job(run, job_id)]):
        return mine[0]
    if os.environ.get("SLURM_NODEID") == "0":
        return _become_its_job(read_config(), runs_dir, job_id, "slurm")
    return _wait_for_the_first_node(read_config(), runs_dir, job_id)


def is_done(config: Config, runs_dir: Path) -> bool:
    """Whether the config's run is finished.

    Raises:
        RunConflict: its directory belongs to another config.
    """
    run = run_of(config, runs_dir)
    return refuse_another_identity(run, config) and run_status(run).state == "DONE"


def _become_its_job(config: Config, runs_dir: Path, job_id: str, scheduler: str, **more: Any) -> Run:
    if not is_done(config, runs_dir):
        with _held(config, runs_dir) as watched:
            write_job(watched.run, len(list_jobs(watched.run)) + 1, job_id, scheduler, **more)
            watched.submitted(list_jobs(watched.run)[-1])
    return run_of(config, runs_dir)


def _wait_for_the_first_node(config: Config, runs_dir: Path, job_id: str) -> Run:
    run = run_of(config, runs_dir)
    deadline = time.monotonic() + _FIRST_NODE_TAKES_S
    while not _has_job(run, job_id) and not is_done(config, runs_dir):
        if time.monotonic() > deadline:
            raise RunError(f"the first node of job {job_id} did not make {run.path}; its output says why")
        time.sleep(_POLL_S)
    return run


def _has_job(run: Run, job_id: str) -> bool:
    jobs = list_jobs(run)
    return bool(jobs) and jobs[-1].job_id == job_id


def _refuse_unless_once_a_node(job_id: str) -> None:
    if "SLURM_STEP_ID" not in os.environ:
        raise SchedulerError(
            f"job {job_id} would hear of no preemption: start it in a step, with srun latentwire run ..."
        )
    if os.environ.get("SLURM_LOCALID") != "0":
        raise SchedulerError(f"one task a node starts all the ranks: ask for --ntasks-per-node=1 in job {job_id}")


@contextmanager
def _held(config: Config, runs_dir: Path) -> Iterator[Watched]:
    """The run of a config, made where it is new, with its lease: inside the block nobody else submits for it."""
    run = run_of(config, runs_dir)
    if not refuse_another_identity(run, config):
        create_run(config, runs_dir)
    watched = Watched(run)
    try:
        _refuse_if_busy(watched)
        create_run(config, runs_dir)  # settings of operation: only now, a job that lives keeps those that it has
        take_back_stops(run)
        yield watched
    finally:
        watched.release()


def _refuse_if_busy(watched: Watched) -> None:
    name, now = watched.run.name, time.time()
    cut_short = watched.is_unsure() and scheduler_kind(watched.config.scheduler) == "slurm"
    queue = ask(watched.chain(), unknown_ones=cut_short)
    busy = [f"job {job.job_id}" for job in watched.chain() if queue.is_live(job)]
    busy += [f"attempt {watched.attempts[-1].number}"] if watched.runs_locally(now) else []
    busy += [f"job {job_id}, of a submission cut short," for job_id in watched.found_in(queue)]
    busy += ["a submission under way"] if watched.is_being_submitted(now) else []
    if busy:
        raise RunBusy(
            f"{name} has {busy[0]} already; look on with: latentwire status {name}, "
            f"or end that first: latentwire cancel {name}"
        )
