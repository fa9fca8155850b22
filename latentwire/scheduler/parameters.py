"""What a config says of its jobs, as submitit and sbatch want to hear it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentwire.config import Config
from latentwire.run.directory import PREFIX

_DEAF = """sh -c 'trap "" TERM INT USR1 USR2; exec "$0" "$@"'"""
"""Starts a program to which these signals do nothing: one that came while Python starts (seconds, on a network file
system) would end the job as failed. The job asks Slurm what it may have missed."""

PYTHON = f"{_DEAF} {shlex.quote(sys.executable)}"
"""How a job starts Python."""


def script(config: Config, runs_dir: Path) -> str:
    """The sbatch script of the config's job, exactly as it is submitted, but for its token."""
    folder = runs_dir.absolute() / f"{PREFIX}{config.name}" / "submitit" / "%j"
    command = f"{PYTHON} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return sbatch_text(command, folder, slurm_parameters(config, "TOKEN"))


def sbatch_text(command: str, folder: Path, parameters: Mapping[str, Any]) -> str:
    """What submitit would hand to sbatch. Its executor can say so only where Slurm is installed; a laptop has none."""
    from submitit.slurm.slurm import _make_sbatch_string

    return str(_make_sbatch_string(command=command, folder=folder, **parameters))


def slurm_parameters(config: Config, token: str, gpus: int | None = None) -> dict[str, Any]:
    """What submitit is to write at the head of the script."""
    section = config.scheduler
    gpus = section.ladder[0] if gpus is None else gpus
    names = ("partition", "account", "qos", "constraint", "reservation", "exclude")
    options = {name: getattr(section, name) for name in names}
    more = {
        "signal": f"TERM@{max(1, round(config.preemption.grace_s))}",  # of the time limit; preemption has its GraceTime
        "requeue" if section.requeue else "no-requeue": True,
        "open-mode": "append",
        "comment": token,
        **({"gres": f"gpu:{gpus // section.nodes}"} if gpus else {}),  # not --gpus: srun would go on asking for as many
        **({"mem": f"{section.mem_gb}G"} if section.mem_gb else {}),
        **{name: value for name, value in options.items() if value is not None},
        **{name.replace("_", "-"): value for name, value in section.extra.items() if value is not False},
    }
    return {
        "job_name": f"latentwire-{config.name}",
        "time": section.time_min,
        "nodes": section.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": section.cpus,
        # From Slurm 22.05 on srun does not take the CPUs over; and where one agent dies, those of other nodes end too.
        "srun_args": [f"--cpus-per-task={section.cpus}", "--kill-on-bad-exit=1"],
        "additional_parameters": more,
    }
