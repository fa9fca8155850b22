"""The fault matrix of docs/reliability.md: rows that tests counted in this very session, and no others."""

from __future__ import annotations

import collections
import datetime
import os
import platform
import subprocess
import tempfile
from pathlib import Path

BEGIN = "<!-- written by `pytest --matrix docs/reliability.md`: begin -->"
END = "<!-- end -->"


class Matrix:
    """Collects what tests did, once what they assert has held."""

    def __init__(self) -> None:
        self._times: collections.Counter[tuple[str, str]] = collections.Counter()
        self._lost: collections.Counter[tuple[str, str]] = collections.Counter()

    def count(self, fault: str, how: str, times: int, lost: int = 0) -> None:
        """A fault was injected so many times; ``lost`` committed checkpoints were not found, or not whole."""
        self._times[fault, how] += times
        self._lost[fault, how] += lost

    @property
    def num_faults(self) -> int:
        """All of them."""
        return self._times.total()

    @property
    def num_lost(self) -> int:
        """Committed checkpoints that a fault took."""
        return self._lost.total()

    def table(self) -> str:
        """In Markdown."""
        rows = [f"| {f} | {how} | {times} | {self._lost[f, how]} |" for (f, how), times in self._times.items()]
        total = f"| **all** | | **{self.num_faults}** | **{self.num_lost}** |"
        return "\n".join(["| fault | injected by | times | lost commits |", "|---|---|---|---|", *rows, total])

    def write(self, path: Path, tests: str) -> None:
        """Put the table between the markers of a Markdown file; ``tests``: what came of the session, in words."""
        text = path.read_text(encoding="utf-8")
        before, marker, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        assert (marker, end) == (BEGIN, END), f"{path} has no markers {BEGIN} and {END}"
        df = subprocess.run(
            ["df", "--output=fstype", tempfile.gettempdir()], capture_output=True, text=True, check=True
        )
        kind = df.stdout.split()[-1]
        where = f"{os.cpu_count()} cores, Linux {platform.release()}, files on {kind} and in memory (/dev/shm)"
        said = f"{datetime.date.today().isoformat()}; {where}; {tests}."
        path.write_text(f"{before}{BEGIN}\n{said}\n\n{self.table()}\n{END}{after}", encoding="utf-8")
