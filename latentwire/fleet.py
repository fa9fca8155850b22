"""Fleets: one file for many runs.

::

    base: quickstart.yaml        # what all runs have in common, as in any config
    max_running: 2               # so many of them have a job at a time
    runs:                        # what each has of its own, laid over the rest
      - {name: seed-1, seed: 1}
      - {name: seed-2, seed: 2, train: {steps: 200}}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from latentwire.config import Config, parse_config
from latentwire.errors import ConfigError
from latentwire.tree import merge, read_tree


@dataclasses.dataclass(frozen=True)
class Fleet:
    """The configs of a file, and how many of them may run at a time; None: all."""

    configs: tuple[Config, ...]
    max_running: int | None = None


def load_fleet(path: Path | str, overrides: Iterable[str] = ()) -> Fleet:
    """Read a config of one run, or of many under ``runs:``; overrides go to each.

    Raises:
        ConfigError: any mistake, with the file, the run and the key.
    """
    path = Path(path)
    tree = read_tree(path)
    own_parts = tree.pop("runs", None)
    max_running = tree.pop("max_running", None)
    if max_running is not None and (type(max_running) is not int or max_running < 1):  # True is an int, too
        raise ConfigError(f"{path}: max_running is how many of the runs may have a job at a time, not {max_running!r}")
    if own_parts is None:
        return Fleet((parse_config(tree, str(path), overrides),), max_running)
    if not isinstance(own_parts, list) or not own_parts or not all(isinstance(part, dict) for part in own_parts):
        raise ConfigError(f"{path}: runs: is a list of what each run has of its own, such as {{name: a, seed: 1}}")
    return Fleet(
        tuple(
            parse_config(merge(tree, part), f"{path}, runs[{index}]{_named(part)}", overrides)
            for index, part in enumerate(own_parts)
        ),
        max_running,
    )


def _named(part: dict[str, Any]) -> str:
    return f" ({part['name']})" if "name" in part else ""
