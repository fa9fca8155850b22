"""The command line: one module for each family of commands. Nothing here imports torch or a config at start-up."""

from __future__ import annotations

from pathlib import Path

DEFAULT_RUNS_DIR = Path("runs")
