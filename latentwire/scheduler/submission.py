"""Submitting jobs.

``submit`` runs this module in a process of its own session: a local job must not hear the Ctrl-C that its orchestrator
gets, and must outlive it. Each submission has a token, which Slurm keeps as the job's comment: a job whose submission
was killed before its record was written is found again by it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from latentwire.config import Config, SchedulerSection
from latentwire.errors import ConfigError, SchedulerError
from latentwire.run.directory import Run
from latentwire.run.process import ProcessIdentity
from latentwire.scheduler.jobs import Job, list_jobs, read_job, write_job
from latentwire.scheduler.ladder import best_rung
from latentwire.scheduler.parameters import PYTHON, slurm_parameters

_YEAR_MIN = 60 * 24 * 365
_PING_S = 30.0
_WARNED_EARLY_S = 60.0
_START_S = 30.0


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be submitted: one job, or one array with a task for each run.

    Attributes:
        token: the comment of its jobs.
        entries: the runs, and the number of each one's next job.
    """

    token: str
    entries: tuple[tuple[Run, int], ...]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Request:
        """The next job of each run."""
        return cls(uuid.uuid4().hex[:16], tuple((run, len(list_jobs(run)) + 1) for run in runs))


def scheduler_kind(section: SchedulerSection) -> str:
    """``local`` or ``slurm``; ``auto`` is decided by whether sbatch is there and knows of a cluster.

    Raises:
        ConfigError: slurm was asked for and there is no sbatch.
    """
    found = shutil.which("sbatch") is not None
    if section.kind == "slurm" and not found:
        raise ConfigError("scheduler.kind is slurm and there is no sbatch on PATH: log in to the cluster, or use local")
    if section.kind != "auto":
        return section.kind
    return "slurm" if found and _is_configured() else "local"


def scheduler_kinds(configs: Sequence[Config]) -> dict[str, str]:
    """What each ``scheduler.kind`` of the configs comes to: looked up once for all that say the same, as it blocks.

    Raises:
        ConfigError: slurm was asked for and there is no sbatch.
    """
    return {name: scheduler_kind(section) for name, section in {c.scheduler.kind: c.scheduler for c in configs}.items()}


def _is_configured() -> bool:
    """False where Slurm's programs are installed and no cluster is: one that is down for a while is still a cluster."""
    try:
        done = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, check=False, timeout=_PING_S)
    except (OSError, subprocess.TimeoutExpired):
        return True  # no scontrol here, or a controller that does not answer: what sbatch says of it counts
    return "establish a configuration source" not in done.stderr


def submit(request: Request) -> list[Job]:
    """Submit the request. Called by the orchestrator that holds the runs' leases. Blocks for about a second.

    Raises:
        SchedulerError: submitit or the scheduler refused; the message carries what it said.
    """
    first = request.entries[0][0]
    log = first.path / "submitit" / f"submission-{request.token}.log"
    log.parent.mkdir(exist_ok=True)
    words = [word for run, number in request.entries for word in (str(run.path), str(number))]
    with open(log, "ab") as output:
        subprocess.run(
            [sys.executable, "-m", "latentwire.scheduler.submission", request.token, *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            check=False,
        )
    jobs = [read_job(run, number) for run, number in request.entries]
    if None in jobs:
        raise SchedulerError(f"{first.name} could not be submitted: {_what_went_wrong(log)} ({log})")
    return [job for job in jobs if job is not None]


_PERMANENT = re.compile(
    r"invalid|unrecognized|not permitted|access/permission|configuration is not available", re.IGNORECASE
)


def _what_went_wrong(log: Path) -> str:
    """What sbatch said; else the last line of a Python error."""
    lines = log.read_text(errors="replace").strip().splitlines() or ["it left no message"]
    said = [line[line.index("sbatch: ") :] for line in lines if "sbatch: " in line]
    return "; ".join(dict.fromkeys(said)) or lines[-1]


def check_times(configs: Sequence[Config]) -> dict[str, str]:
    """Refuse jobs that would be warned of their time limit before they have trained; returns ``scheduler_kinds``.

    Raises:
        ConfigError: with the least that makes sense.
    """
    kinds = scheduler_kinds(configs)
    for config in configs:
        least = math.ceil((config.preemption.grace_s + _WARNED_EARLY_S + _START_S) / 60)
        if kinds[config.scheduler.kind] == "slurm" and config.scheduler.time_min < least:
            raise ConfigError(
                f"scheduler.time_min: Slurm warns a job of {config.scheduler.time_min} min as early as "
                f"{config.preemption.grace_s:g} + {_WARNED_EARLY_S:g} s before its end (preemption.grace_s); it would "
                f"hardly train. Ask for {least} min or more, or for less grace"
            )
    return kinds


def is_permanent(error: SchedulerError) -> bool:
    """Whether a refusal would be the same next time: a partition or an account that is wrong, more than a node has."""
    return _PERMANENT.search(str(error)) is not None


# --- in the process that submits --------------------------------------------------------------------------------------


def main() -> None:
    """Submit a request and write down what became of it."""
    token, *words = sys.argv[1:]
    request = Request(token, tuple((Run(Path(p)), int(n)) for p, n in zip(words[::2], words[1::2], strict=True)))
    configs = [run.config() for run, _ in request.entries]
    if scheduler_kind(configs[0].scheduler) == "local":
        for run, number in request.entries:
            _submit_locally(run, number)
    else:
        _submit_to_slurm(request, configs[0])


def _submit_locally(run: Run, number: int) -> None:
    import submitit

    from latentwire.monitor.gpu import list_gpus
    from latentwire.scheduler.job import TrainingJob

    section = run.config().scheduler
    wanted = None if section.gpus is None else section.ladder[0]
    gpus = list(dict.fromkeys(gpu.index for gpu in list_gpus()))[:wanted]  # that CUDA_VISIBLE_DEVICES lets us see
    executor = submitit.LocalExecutor(folder=run.path / "submitit" / "%j")
    executor.update_parameters(timeout_min=_YEAR_MIN, gpus_per_node=len(gpus), visible_gpus=tuple(gpus))
    job = executor.submit(TrainingJob(str(run.path), "local"))
    write_job(run, number, job.job_id, "local", controller=dataclasses.asdict(ProcessIdentity.of(int(job.job_id))))


def _submit_to_slurm(request: Request, config: Config) -> None:
    """One job or one array, and its successors, each waiting for the end of the one before."""
    import submitit

    from latentwire.scheduler.job import TrainingJob

    _leave_the_job_around_us()
    runs = [run for run, _ in request.entries]
    parent = runs[0].path if len(runs) == 1 else runs[0].path.parent
    gpus = best_rung(config)
    parameters = slurm_parameters(config, request.token, gpus)
    if len(runs) > 1:
        parameters["job_name"] = "latentwire-fleet"
    executor = submitit.SlurmExecutor(folder=parent / "submitit" / "%j", python=PYTHON)
    executor.update_parameters(**parameters)
    with executor.batch():
        jobs = [executor.submit(TrainingJob(str(run.path), "slurm")) for run in runs]
    for (run, number), job in zip(request.entries, jobs, strict=True):
        write_job(run, number, job.job_id, "slurm", gpus=gpus)
    (run, number), before = request.entries[0], jobs[0].job_id
    for extra in range(1, config.scheduler.successors + 1):
        parameters["additional_parameters"]["dependency"] = f"afterany:{before}"
        executor.update_parameters(**parameters)
        job_id = executor.submit(TrainingJob(str(run.path), "slurm")).job_id
        write_job(run, number + extra, job_id, "slurm", gpus=gpus, after=before)
        before = job_id


def _leave_the_job_around_us() -> None:
    """Drop what an orchestrator that is a job itself would hand down to the jobs that it submits."""
    for key in list(os.environ):
        if key != "SLURM_CONF" and key.startswith(("SLURM_", "SLURMD_", "SBATCH_", "SUBMITIT_")):
            del os.environ[key]


if __name__ == "__main__":
    main()
