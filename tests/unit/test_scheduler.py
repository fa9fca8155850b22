"""Where jobs go."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentwire.config import SchedulerSection
from latentwire.errors import ConfigError
from latentwire.scheduler.submission import scheduler_kind

NO_CLUSTER = "echo 'scontrol: fatal: Could not establish a configuration source' >&2; exit 1"
DOWN = "echo 'Slurmctld(primary) at login is DOWN'; exit 1"


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """Programs of these names and shell lines are all that is on PATH."""
    for name, line in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.parametrize(
    ("programs", "kind"),
    [
        ({}, "local"),
        ({"sbatch": "", "scontrol": NO_CLUSTER}, "local"),
        ({"sbatch": "", "scontrol": DOWN}, "slurm"),
        ({"sbatch": "", "scontrol": ""}, "slurm"),
        ({"sbatch": ""}, "slurm"),
    ],
)
def test_auto_goes_to_slurm_where_there_is_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: dict[str, str], kind: str
) -> None:
    install(tmp_path, monkeypatch, **programs)
    assert scheduler_kind(SchedulerSection()) == kind


def test_slurm_without_sbatch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match="no sbatch on PATH"):
        scheduler_kind(SchedulerSection(kind="slurm"))
    assert scheduler_kind(SchedulerSection(kind="local")) == "local"
