"""What goes wrong on a GPU, told once: driver errors, and the XIDs that the driver reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress

from latentwire.monitor.devices import Nvml

NOT_GIVEN = (
    "NVML_ERROR_NOT_SUPPORTED",
    "NVML_ERROR_VGPU_ECC_NOT_SUPPORTED",
    "NVML_ERROR_NO_PERMISSION",
    "NVML_ERROR_FUNCTION_NOT_FOUND",
    "NVML_ERROR_ARGUMENT_VERSION_MISMATCH",
    "NVML_ERROR_DEPRECATED",
    "NVML_ERROR_INVALID_ARGUMENT",
    "NVML_ERROR_NOT_FOUND",
    "NVML_ERROR_NO_DATA",
    "NVML_ERROR_NOT_READY",
)
"""What a chip, a MIG slice or an old driver answers where it has no such reading: nothing is wrong."""
QUIET_S = 600.0
"""A fault that comes back sooner is the same one."""
MOST_XIDS = 64
"""Taken in one sample; the driver keeps the rest for the next."""

XIDS = {
    13: "graphics engine exception",
    31: "memory page fault",
    43: "the driver stopped a process",
    45: "a process was ended and cleaned up after",
    48: "double-bit ECC error",
    63: "a memory row was retired or remapped",
    64: "a memory row could not be retired or remapped",
    74: "NVLink error",
    79: "the GPU has fallen off the bus",
    92: "many single-bit ECC errors",
    94: "uncorrectable ECC error, contained in one process",
    95: "uncorrectable ECC error, not contained",
    119: "the GPU's system processor does not answer",
    120: "error of the GPU's system processor",
}
"""What the most frequent ones mean."""


class Faults:
    """Says of a fault whether it is to be told: when it begins, not each second that it lasts."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """No fault is known yet; the clock is in seconds."""
        self._clock = clock
        self._last_s: dict[Hashable, float] = {}

    def is_new(self, fault: Hashable) -> bool:
        """Called each time that it is seen; True if it was not seen for :data:`QUIET_S`."""
        now_s = self._clock()
        last_s = self._last_s.get(fault)
        self._last_s[fault] = now_s
        return last_s is None or now_s - last_s > QUIET_S


class XidWatch:
    """Asks the driver for the critical errors of some GPUs since it was made. Needs no rights; reads no kernel log."""

    def __init__(self, nvml: Nvml, handles: Sequence[Nvml]) -> None:
        """Register; where that is not possible (old driver, MIG slices), there will be no XIDs."""
        self._nvml = nvml
        self._set: Nvml = None
        with suppress(nvml.NVMLError):
            self._set = nvml.nvmlEventSetCreate()
        for handle in handles if self._set is not None else []:
            with suppress(nvml.NVMLError):
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, self._set)

    def take(self) -> list[dict[str, object]]:
        """What came since the last call: ``{"uuid", "xid", "meaning"}``. Does not block."""
        nvml = self._nvml
        found: list[dict[str, object]] = []
        while self._set is not None and len(found) < MOST_XIDS:
            try:
                event = nvml.nvmlEventSetWait_v2(self._set, 0)
            except nvml.NVMLError:  # nothing more; a GPU that is lost is found by its readings
                break
            xid = int(event.eventData)
            found.append({"uuid": self._uuid(event.device), "xid": xid, "meaning": XIDS.get(xid)})
        return found

    def close(self) -> None:
        """Give the registration back."""
        if self._set is not None:
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlEventSetFree(self._set)
            self._set = None

    def _uuid(self, device: Nvml) -> str | None:
        try:
            return str(self._nvml.nvmlDeviceGetUUID(device))
        except self._nvml.NVMLError:
            return None
