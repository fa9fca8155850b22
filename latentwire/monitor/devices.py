"""Which GPUs there are, and which of them this process may use."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

from latentwire.errors import ConfigError

Nvml: TypeAlias = Any
"""The module ``pynvml``, its structures and its handles: it has no type stubs."""

LOST_ERRORS = ("NVML_ERROR_GPU_IS_LOST", "NVML_ERROR_RESET_REQUIRED", "NVML_ERROR_GPU_NOT_FOUND")
"""After any of these the device answers nothing more until someone resets it."""


@dataclass(frozen=True)
class GPU:
    """One GPU of this machine, or a slice of one that is in MIG mode."""

    index: int
    """NVML's number: PCI bus order, not narrowed by CUDA_VISIBLE_DEVICES. The slices of a GPU share it."""
    uuid: str
    name: str
    memory_bytes: int
    is_mig: bool = False
    """A MIG slice, of which CUDA shows a process one and no other GPU."""

    @property
    def identity(self) -> dict[str, object]:
        """How records name it."""
        return {"index": self.index, "uuid": self.uuid, "name": self.name}


def choose(
    found: Sequence[GPU],
    wanted: Sequence[str] | None,
    environ: Mapping[str, str],
    lost_indexes: Collection[int] = (),
    reason: str = "",
) -> tuple[list[GPU], str]:
    """The GPUs that a process may use, in CUDA's order, and why there are none.

    Args:
        found: All of this machine.
        wanted: Indexes or UUIDs, instead of those in CUDA_VISIBLE_DEVICES.
        environ: Where CUDA_VISIBLE_DEVICES is looked up.
        lost_indexes: GPUs that CUDA_VISIBLE_DEVICES may name all the same.
        reason: Why none was found, for the message.

    Raises:
        ConfigError: ``wanted`` names one that this machine does not have.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is not None:
        return _pick(found, wanted, reason), reason
    if visible is None or not found:
        return list(found), reason
    chosen = _visible(found, visible, lost_indexes)
    return chosen, f"CUDA_VISIBLE_DEVICES is {visible!r}, which names no GPU of this machine"


def _named(found: Sequence[GPU], token: str) -> list[GPU]:
    """The devices of an index, or of a UUID, which CUDA lets be shortened; of a GPU in slices the first slice."""
    if token.startswith(("GPU-", "MIG-")):
        return [gpu for gpu in found if gpu.uuid.startswith(token)]
    return [gpu for gpu in found if str(gpu.index) == token][:1]


def _pick(found: Sequence[GPU], wanted: Sequence[str], reason: str) -> list[GPU]:
    picked: list[GPU] = []
    for token in wanted:
        named = _named(found, token)
        if len(named) != 1:
            here = ", ".join(str(gpu.index) for gpu in found) or f"none ({reason})"
            raise ConfigError(f"there is no GPU {token!r}; give indexes or UUIDs of this machine's GPUs: {here}")
        picked += [gpu for gpu in named if gpu not in picked]
    return picked


def _visible(found: Sequence[GPU], value: str, lost_indexes: Collection[int]) -> list[GPU]:
    """CUDA's own rule: the list ends at the first entry that names no device (``-1``, ``NoDevFiles``)."""
    picked: list[GPU] = []
    for token in (part.strip() for part in value.split(",")):
        if token in map(str, lost_indexes):
            continue
        named = _named(found, token)
        if len(named) != 1:
            break
        picked += [gpu for gpu in named if gpu not in picked]
    return picked


class OpenedNvml:
    """NVML opened, and the devices chosen from it."""

    def __init__(self, nvml: Nvml, wanted: Sequence[str] | None, environ: Mapping[str, str]) -> None:
        """Open it and choose; arguments and errors as :func:`choose`. Without a driver there are no devices."""
        self.nvml = nvml = nvml or importlib.import_module("pynvml")
        self._is_open = False
        self._handles: dict[GPU, Nvml] = {}
        self.lost: list[dict[str, object]] = []
        reason = "NVML sees no GPU"
        try:
            nvml.nvmlInit()
            self._is_open = True
            self._find_all()
        except nvml.NVMLError as error:
            reason = str(error)
        lost_indexes = [int(str(lost["index"])) for lost in self.lost]
        try:
            chosen, reason = choose(list(self._handles), wanted, environ, lost_indexes, reason)
        except ConfigError:
            self.close()
            raise
        self.devices = [(gpu, self._handles[gpu]) for gpu in chosen]
        self.source = "nvml" if self.devices else f"host only: {reason}"

    def close(self) -> None:
        """Give NVML back."""
        if self._is_open:
            self._is_open = False
            with suppress(self.nvml.NVMLError):
                self.nvml.nvmlShutdown()

    def means_lost(self, error: Nvml) -> bool:
        """Whether the device of a call that raised this is gone."""
        return error.value in {getattr(self.nvml, name) for name in LOST_ERRORS}

    def _find_all(self) -> None:
        nvml = self.nvml
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                slices = self._slices(handle)
                found = {self._identify(index, each, bool(slices)): each for each in slices or [handle]}
            except nvml.NVMLError as error:
                # Another job's GPU, which this one has no permission to read, is no loss.
                if self.means_lost(error):
                    self.lost.append({"index": index, "reason": str(error)})
            else:
                self._handles |= found

    def _slices(self, gpu: Nvml) -> list[Nvml]:
        """The MIG slices of a GPU, none of one that is not in MIG mode."""
        nvml, slices = self.nvml, []
        try:
            mode, _ = nvml.nvmlDeviceGetMigMode(gpu)
            places = nvml.nvmlDeviceGetMaxMigDeviceCount(gpu) if mode == nvml.NVML_DEVICE_MIG_ENABLE else 0
        except nvml.NVMLError:
            return []  # a chip that has no such mode
        for place in range(places):
            with suppress(nvml.NVMLError):  # nothing was made in this place
                slices.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, place))
        return slices

    def _identify(self, index: int, handle: Nvml, is_mig: bool) -> GPU:
        uuid, name = self.nvml.nvmlDeviceGetUUID(handle), self.nvml.nvmlDeviceGetName(handle)
        return GPU(index, uuid, name, int(self.nvml.nvmlDeviceGetMemoryInfo(handle).total), is_mig)
