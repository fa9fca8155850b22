"""What a job finds on its node. Pure: the readings are handed in."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from latentwire.errors import ConfigError

GB = 10**9
"""As in the names of the chips, of which none has less: an 80 GB chip has 85 of these."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a vendor's data sheet says of a chip.

    Attributes:
        tflops: of dense matrix products in bf16, or in fp16 where there is no bf16.
        has_bf16: whether there is.
    """

    tflops: float
    has_bf16: bool = True


CHIPS: Mapping[str, Chip] = {
    "V100": Chip(125, has_bf16=False),
    "T4": Chip(65, has_bf16=False),
    "A10": Chip(125),
    "A10G": Chip(70),
    "A30": Chip(165),
    "A40": Chip(150),
    "A100": Chip(312),
    "L4": Chip(121),
    "L40": Chip(181),
    "L40S": Chip(362),
    "RTX 6000 ADA": Chip(364),
    "H100": Chip(989),
    "H100 PCIE": Chip(756),
    "H100 NVL": Chip(835),
    "H200": Chip(989),
    "H200 NVL": Chip(836),
    "GH200": Chip(990),
    "B200": Chip(2250),
    "GB200": Chip(2500),
}
"""By words of the driver's name for it. NVIDIA's data sheets, dense: half of what they give for sparse matrices."""


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU, or a MIG slice of one.

    Attributes:
        name: the driver's, such as ``NVIDIA H100 80GB HBM3``.
        memory_bytes: all of it.
        is_mig: a slice; a process sees one and no other.
    """

    name: str
    memory_bytes: int
    is_mig: bool = False

    @property
    def chip(self) -> Chip | None:
        """What is known of it, from the most specific entry of ``CHIPS``; None: nothing."""
        words = set(_words(self.name))
        known = [key for key in CHIPS if words.issuperset(key.split())]
        return CHIPS[max(known, key=lambda key: len(key.split()))] if known else None

    @property
    def flops_per_s(self) -> float | None:
        """Of dense products in its 16-bit format; None: the chip, or how large a slice it is, is not known."""
        chip = self.chip
        if chip is None:
            return None
        if not self.is_mig:
            return chip.tflops * 1e12
        share = re.search(r"\b(\d)g\.\d+gb", self.name, re.IGNORECASE)  # of a chip's seven
        return None if share is None else chip.tflops * 1e12 * int(share[1]) / 7


@dataclasses.dataclass(frozen=True)
class Inventory:
    """GPUs, cores and memory of a node, and the versions that the bits of a result can depend on; environment.json.

    Attributes:
        gpus: that the job sees, in CUDA's order.
        cpu_model: of the node.
        versions: package -> version.
    """

    gpus: tuple[Device, ...]
    cpu_model: str
    versions: Mapping[str, str]

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Inventory:
        """Read what ``dataclasses.asdict`` wrote; other keys are passed over."""
        gpus = tuple(Device(**gpu) for gpu in record["gpus"])
        return cls(gpus, record["cpu_model"], record["versions"])

    def changes_since(self, earlier: Mapping[str, Any]) -> list[str]:
        """What differs from an earlier attempt's environment and may change bits, in words."""
        lines = []
        chips = sorted({gpu.name for gpu in self.gpus})
        for key, now in (("gpus", chips), ("cpu_model", self.cpu_model), ("versions", self.versions)):
            before = _chips(earlier.get(key, [])) if key == "gpus" else earlier.get(key)
            if before != now:
                lines.append(f"{key}: {before} -> {now}")
        return lines


def parse_gpus(text: str) -> tuple[Device, ...]:
    """The GPUs of a node as a person writes them: ``4xH100-80GB``, ``2xA100-40GB+2xH100-80GB``; ``0`` for none.

    Raises:
        ConfigError: it is of another form.
    """
    if text.strip() == "0":
        return ()
    devices: list[Device] = []
    for part in text.split("+"):
        found = re.fullmatch(r"(?:([1-9]\d?)x)?([A-Z][\w .-]*?)-(\d+(?:\.\d+)?)GB", part.strip(), re.IGNORECASE)
        if found is None or float(found[3]) == 0:
            raise ConfigError(
                f"GPUs {text!r}: {part.strip()!r} is not of the form 4xH100-80GB (how many, the chip, its memory); "
                "several kinds are joined by +, a slice is H200-MIG-71GB, and 0 means none"
            )
        name = found[2]
        device = Device(name, round(float(found[3]) * GB), is_mig="MIG" in _words(name))
        devices += [device] * int(found[1] or 1)
    return tuple(devices)


def cpu_model(cpuinfo: Sequence[str]) -> str:
    """The processor's name from the lines of /proc/cpuinfo."""
    return next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), "unknown")


def _words(name: str) -> list[str]:
    return re.sub(r"[^A-Z0-9]+", " ", name.upper()).split()


def _chips(gpus: Iterable[Any]) -> list[str]:
    """Names; before devices were written down, an environment held nothing else."""
    return sorted({gpu["name"] if isinstance(gpu, dict) else str(gpu) for gpu in gpus})
