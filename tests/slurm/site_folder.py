"""A user's folder on the private cluster."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from cluster import Cluster
from orchestrated import stand_after
from running import BIN, hold

from latentwire.run.directory import Run

TOP = Path(__file__).parents[2]
EDITS = {
    "# export SBATCH_PARTITION=cpu": "export SBATCH_PARTITION=preempt",
    "# export SBATCH_TIMELIMIT=1-00:00:00": "export SBATCH_TIMELIMIT=30",
    "  # scheduler.partition=preempt": "  scheduler.partition=preempt",
    "  # scheduler.time_min=240": "  scheduler.time_min=10",
    ". .venv/bin/activate": f'export PATH="{BIN}:$PATH"',
}


class Site:
    """A user's folder: the scripts, and site.env as edited for this cluster."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder, self.runs = cluster, folder, folder / "runs"
        for name in ("slurm", "configs"):
            shutil.copytree(TOP / name, folder / name)
        self.runs.mkdir()
        text = (folder / "slurm" / "site.env").read_text(encoding="utf-8")
        for line, edited in EDITS.items():
            assert f"{line}\n" in text
            text = text.replace(line, edited)
        (folder / "slurm" / "site.env").write_text(text, encoding="utf-8")

    def shell(self, line: str) -> subprocess.CompletedProcess[str]:
        """What a user types after ``. slurm/site.env``."""
        line = f". slurm/site.env && {line}"
        return subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env=self.cluster.environ,
            capture_output=True,
            text=True,
            check=False,
        )

    def sbatch(self, words: str) -> str:
        """The id of a job."""
        done = self.shell(f"sbatch --parsable {words}")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def standing_run(self, name: str) -> Run:
        """A run that is to be, and will stand still in the middle."""
        run = Run(self.runs / f"experiment_{name}")
        run.path.mkdir()
        hold(run, "step", stand_after(4))
        return run

    def said(self, job: str) -> str:
        """The output of a job."""
        return "".join(path.read_text() for path in self.runs.glob(f"latentwire-*-{job}.out"))

    def show(self, job: str) -> dict[str, str]:
        """The fields of ``scontrol show job``."""
        words = self.cluster.run("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)
