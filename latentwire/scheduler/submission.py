"""Submitting a run's job through submitit, in a process of its own.

``python -m latentwire.scheduler.submission RUN_PATH N`` submits and writes ``jobs/<n>.json``. The orchestrator starts
it in a new session: a local job must not hear the Ctrl-C that its orchestrator gets, and must outlive it.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from latentwire.config import SchedulerSection
from latentwire.errors import ConfigError, SchedulerError
from latentwire.run.atomic import read_json, write_json
from latentwire.run.directory import Run
from latentwire.run.process import ProcessIdentity

_YEAR_MIN = 60 * 24 * 365
_PING_S = 30.0
_DEAF = """sh -c 'trap "" TERM INT USR1 USR2; exec "$0" "$@"'"""
"""Starts a program to which these signals do nothing: one that came while Python starts (seconds, on a network file
system) would end the job as failed. The job asks Slurm what it may have missed."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A submitted job. ``controller``: the process that a local job lives in."""

    number: int
    job_id: str
    scheduler: str
    submitted: float
    controller: ProcessIdentity | None

    def is_alive(self) -> bool | None:
        """Whether a local job's controller runs; None where that cannot be told from here."""
        return None if self.controller is None else self.controller.is_alive()


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


def _is_configured() -> bool:
    """False where Slurm's programs are installed and no cluster is: one that is down for a while is still a cluster."""
    try:
        done = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, check=False, timeout=_PING_S)
    except (OSError, subprocess.TimeoutExpired):
        return True  # no scontrol here, or a controller that does not answer: what sbatch says of it counts
    return "establish a configuration source" not in done.stderr


def submit(run: Run) -> Job:
    """Submit one job for the run. Called by the orchestrator that holds the run's lease. Blocks for about a second.

    Raises:
        SchedulerError: submitit or the scheduler refused; the message carries what it said.
    """
    number = len(list_jobs(run)) + 1
    log = run.path / "submitit" / f"submission-{number:04d}.log"
    log.parent.mkdir(exist_ok=True)
    with open(log, "ab") as output:
        result = subprocess.run(
            [sys.executable, "-m", "latentwire.scheduler.submission", str(run.path), str(number)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            check=False,
        )
    job = read_job(run, number)
    if job is None:
        said = log.read_text(errors="replace").strip().splitlines()[-3:]
        raise SchedulerError(f"{run.name} could not be submitted (exit {result.returncode}): {' '.join(said)} ({log})")
    return job


def list_jobs(run: Run) -> list[Job]:
    """All jobs that were submitted for the run, oldest first."""
    numbers = sorted(int(p.stem) for p in (run.path / "jobs").glob("*.json") if p.stem.isdigit())
    return [job for number in numbers if (job := read_job(run, number)) is not None]


def read_job(run: Run, number: int) -> Job | None:
    """One submitted job, None if there is no such record."""
    record = read_json(run.path / "jobs" / f"{number:04d}.json")
    if not isinstance(record, dict):
        return None
    controller = ProcessIdentity.from_json(record.get("controller"))
    return Job(number, str(record["job_id"]), str(record["scheduler"]), float(record["submitted"]), controller)


def make_executor(run: Run) -> object:
    """The submitit executor for the run's config."""
    import submitit

    from latentwire.monitor.gpu import list_gpus

    config = run.config()
    section = config.scheduler
    folder = run.path / "submitit" / "%j"
    if scheduler_kind(section) == "local":
        executor = submitit.LocalExecutor(folder=folder)
        gpus = [gpu.index for gpu in list_gpus()][
            : section.ladder[0] if section.gpus is not None else None
        ]  # those that CUDA_VISIBLE_DEVICES lets us see
        executor.update_parameters(timeout_min=_YEAR_MIN, gpus_per_node=len(gpus), visible_gpus=tuple(gpus))
        return executor
    executor = submitit.SlurmExecutor(folder=folder, python=f"{_DEAF} {shlex.quote(sys.executable)}")
    options = {"partition": section.partition, "account": section.account, "qos": section.qos}
    signal = f"TERM@{max(1, round(config.preemption.grace_s))}"
    again = "requeue" if section.requeue else "no-requeue"
    additional = {"signal": signal, again: True, "open-mode": "append", **section.extra}
    executor.update_parameters(
        job_name=f"latentwire-{run.name}",
        time=section.time_min,
        nodes=1,
        ntasks_per_node=1,
        cpus_per_task=section.cpus,
        gres=f"gpu:{section.ladder[0] // section.nodes}",
        additional_parameters=additional | {k: v for k, v in options.items() if v is not None},
        **({"mem": f"{section.mem_gb}G"} if section.mem_gb else {}),
    )
    return executor


def main() -> None:
    """Submit and write down what became of it; run in a process of its own."""
    from latentwire.scheduler.job import TrainingJob

    run, number = Run(Path(sys.argv[1])), int(sys.argv[2])
    kind = scheduler_kind(run.config().scheduler)
    job = make_executor(run).submit(TrainingJob(str(run.path), kind))  # type: ignore[attr-defined]
    controller = dataclasses.asdict(ProcessIdentity.of(int(job.job_id))) if kind == "local" else None
    (run.path / "jobs").mkdir(exist_ok=True)
    record = {"job_id": job.job_id, "scheduler": kind, "submitted": time.time(), "controller": controller}
    write_json(run.path / "jobs" / f"{number:04d}.json", record)


if __name__ == "__main__":
    main()
