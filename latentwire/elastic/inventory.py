"""What a job finds on its node. Pure: the readings are handed in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Inventory:
    """GPUs, cores and memory of a node, and the versions that the bits of a result can depend on.

    Attributes:
        gpus: names of the GPUs that the job sees.
        cpu_model: of the node.
        versions: package -> version.
    """

    gpus: tuple[str, ...]
    cpu_model: str
    versions: dict[str, str]

    def changes_since(self, earlier: dict[str, Any]) -> list[str]:
        """What differs from an earlier attempt's environment and may change bits, in words."""
        lines = []
        for key, now in (("gpus", sorted(set(self.gpus))), ("cpu_model", self.cpu_model), ("versions", self.versions)):
            before = sorted(set(earlier.get(key, []))) if key == "gpus" else earlier.get(key)
            if before != now:
                lines.append(f"{key}: {before} -> {now}")
        return lines


def cpu_model(cpuinfo: Sequence[str]) -> str:
    """The processor's name from the lines of /proc/cpuinfo."""
    return next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), "unknown")
