"""The GPUs through NVML: which there are, and what each does.

A reading that a chip or driver does not give is null. A GPU that falls off the bus gives one event and is then left
out. A machine without a driver has no GPUs and says why in :attr:`GPUMonitor.source`; it is not an error.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

from latentwire.errors import ConfigError

Nvml: TypeAlias = Any
"""The module ``pynvml``, its structures and its handles: it has no type stubs."""

LOST_ERRORS = ("NVML_ERROR_GPU_IS_LOST", "NVML_ERROR_RESET_REQUIRED", "NVML_ERROR_GPU_NOT_FOUND")
"""After any of these the device answers nothing more until someone resets it."""

THROTTLE_REASONS = {
    0x001: "gpu_idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
    0x200: "board_limit",
    0x400: "reliability",
}


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


def list_gpus(
    gpus: Sequence[str] | None = None, *, nvml: Nvml = None, environ: Mapping[str, str] = os.environ
) -> list[GPU]:
    """The GPUs that this process may use, in CUDA's order; called for the inventory.

    Blocks while NVML opens: milliseconds, or about a second a GPU where the driver's persistence mode is off.

    Args:
        gpus: Indexes or UUIDs, instead of those in CUDA_VISIBLE_DEVICES.
        nvml: The NVML module; by default ``pynvml``.
        environ: Where CUDA_VISIBLE_DEVICES is looked up.

    Returns:
        ``[]`` without a driver or without a visible GPU.

    Raises:
        ConfigError: ``gpus`` names one that this machine does not have.
    """
    opened = _Opened(nvml, gpus, environ)
    opened.close()
    return [gpu for gpu, _ in opened.devices]


class GPUMonitor:
    """Samples the GPUs of this process; the sampler owns one. Close it, or use it in a ``with``."""

    def __init__(
        self, gpus: Sequence[str] | None = None, *, nvml: Nvml = None, environ: Mapping[str, str] = os.environ
    ) -> None:
        """Open NVML and start the counters that :meth:`sample` reads; arguments and errors as :func:`list_gpus`."""
        self._opened = _Opened(nvml, gpus, environ)
        self._nvml = self._opened.nvml
        self._devices = [(gpu, handle, _Gpm(self._nvml, handle)) for gpu, handle in self._opened.devices]
        self._events = [{"event": "gpu_lost", **lost} for lost in self._opened.lost]

    @property
    def gpus(self) -> list[GPU]:
        """The GPUs still sampled."""
        return [gpu for gpu, _, _ in self._devices]

    @property
    def source(self) -> str:
        """``nvml``, or ``host only: <reason>`` where there is no GPU to sample."""
        return self._opened.source

    def sample(self) -> list[dict[str, object]]:
        """One record a GPU. Blocks for some tenths of a millisecond a GPU; never raises an NVMLError.

        Returns:
            ``index``, ``uuid``, ``name`` and the fields of ``READINGS`` and ``_Gpm.FIELDS``, null where not given.
            ``sm_active_percent`` and ``tensor_active_percent`` are means since the last call (or the opening).
            A GPU found lost gives ``{"event": "gpu_lost", "reason": ...}`` with its identity, once.
        """
        records, self._events = self._events, []
        for device in list(self._devices):
            gpu, handle, gpm = device
            identity = {"index": gpu.index, "uuid": gpu.uuid, "name": gpu.name}
            try:
                records.append(identity | self._readings(handle, gpm))
            except self._nvml.NVMLError as error:
                self._devices.remove(device)
                gpm.close()
                records.append({"event": "gpu_lost", **identity, "reason": str(error)})
        return records

    def close(self) -> None:
        """Give NVML back. Afterwards there is nothing to sample."""
        for _, _, gpm in self._devices:
            gpm.close()
        self._devices = []
        self._opened.close()

    def __enter__(self) -> GPUMonitor:
        """The monitor itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _readings(self, handle: Nvml, gpm: _Gpm) -> dict[str, object]:
        """Every reading of one GPU; raises NVMLError only if the GPU is lost."""
        record: dict[str, object] = {}
        for fields, read in (*READINGS, (_Gpm.FIELDS, gpm.read)):
            values: tuple[object, ...]
            try:
                values = read(self._nvml, handle)
            except self._nvml.NVMLError as error:
                if self._opened.means_lost(error):
                    raise
                values = (None,) * len(fields)
            record.update(zip(fields, values, strict=True))
        return record


class _Opened:
    """NVML opened, and the devices chosen from it."""

    def __init__(self, nvml: Nvml, wanted: Sequence[str] | None, environ: Mapping[str, str]) -> None:
        self.nvml = nvml = nvml or importlib.import_module("pynvml")
        self._is_open = False
        self.devices: list[tuple[GPU, Nvml]] = []
        self.lost: list[dict[str, object]] = []
        reason = "NVML sees no GPU"
        try:
            nvml.nvmlInit()
            self._is_open = True
            self._find_all()
        except nvml.NVMLError as error:
            reason = str(error)
        visible = environ.get("CUDA_VISIBLE_DEVICES")
        if wanted is not None:
            self.devices = self._pick(wanted, reason)
        elif visible is not None and self.devices:
            self.devices = self._visible(visible)
            reason = f"CUDA_VISIBLE_DEVICES is {visible!r}, which names no GPU of this machine"
        self.source = "nvml" if self.devices else f"host only: {reason}"

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            with suppress(self.nvml.NVMLError):
                self.nvml.nvmlShutdown()

    def means_lost(self, error: Nvml) -> bool:
        return error.value in {getattr(self.nvml, name) for name in LOST_ERRORS}

    def _find_all(self) -> None:
        nvml = self.nvml
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                slices = self._slices(handle)
                found = [self._identify(index, each, bool(slices)) for each in slices or [handle]]
            except nvml.NVMLError as error:
                # Another job's GPU, which this one has no permission to read, is no loss.
                if self.means_lost(error):
                    self.lost.append({"index": index, "reason": str(error)})
            else:
                self.devices += found

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

    def _identify(self, index: int, handle: Nvml, is_mig: bool) -> tuple[GPU, Nvml]:
        uuid, name = self.nvml.nvmlDeviceGetUUID(handle), self.nvml.nvmlDeviceGetName(handle)
        return GPU(index, uuid, name, int(self.nvml.nvmlDeviceGetMemoryInfo(handle).total), is_mig), handle

    def _named(self, token: str) -> list[tuple[GPU, Nvml]]:
        """The devices of an index, or of a UUID, which CUDA lets be shortened; of a GPU in slices the first slice."""
        if token.startswith(("GPU-", "MIG-")):
            return [device for device in self.devices if device[0].uuid.startswith(token)]
        return [device for device in self.devices if str(device[0].index) == token][:1]

    def _pick(self, wanted: Sequence[str], reason: str) -> list[tuple[GPU, Nvml]]:
        picked: list[tuple[GPU, Nvml]] = []
        for token in wanted:
            named = self._named(token)
            if len(named) != 1:
                here = ", ".join(str(gpu.index) for gpu, _ in self.devices) or f"none ({reason})"
                self.close()
                raise ConfigError(f"there is no GPU {token!r}; give indexes or UUIDs of this machine's GPUs: {here}")
            picked += [device for device in named if device not in picked]
        return picked

    def _visible(self, value: str) -> list[tuple[GPU, Nvml]]:
        """CUDA's own rule: the list ends at the first entry that names no device (``-1``, ``NoDevFiles``)."""
        picked: list[tuple[GPU, Nvml]] = []
        for token in (part.strip() for part in value.split(",")):
            if any(token == str(lost["index"]) for lost in self.lost):
                continue
            named = self._named(token)
            if len(named) != 1:
                break
            picked += [device for device in named if device not in picked]
        return picked


class _Gpm:
    """GPU performance monitoring (Hopper and later): means over the time between two hardware samples."""

    FIELDS = ("sm_active_percent", "tensor_active_percent")

    def __init__(self, nvml: Nvml, handle: Nvml) -> None:
        self._nvml = nvml
        self._samples: list[Nvml] = []
        self._has_previous = False
        try:
            if nvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice:
                self._samples = [nvml.nvmlGpmSampleAlloc(), nvml.nvmlGpmSampleAlloc()]
                nvml.nvmlGpmSampleGet(handle, self._samples[0])
                self._has_previous = True
        except nvml.NVMLError:
            pass  # an old chip, an old driver or no permission; if the GPU is lost, the first sample says so

    def read(self, nvml: Nvml, handle: Nvml) -> tuple[float | None, ...]:
        if not self._samples:
            return (None, None)
        previous, latest = self._samples
        had_previous, self._has_previous = self._has_previous, False
        nvml.nvmlGpmSampleGet(handle, latest)
        self._samples, self._has_previous = [latest, previous], True
        if not had_previous:
            return (None, None)
        wanted = nvml.c_nvmlGpmMetricsGet_t()
        wanted.version = nvml.NVML_GPM_METRICS_GET_VERSION
        wanted.sample1, wanted.sample2 = previous, latest
        ids = (nvml.NVML_GPM_METRIC_SM_UTIL, nvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL)
        wanted.numMetrics = len(ids)
        for metric, metric_id in zip(wanted.metrics, ids, strict=False):
            metric.metricId = metric_id
        nvml.nvmlGpmMetricsGet(wanted)
        return tuple(_finite_percent(nvml, wanted.metrics[position]) for position in range(len(ids)))

    def close(self) -> None:
        for sample in self._samples:
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlGpmSampleFree(sample)
        self._samples = []


def _finite_percent(nvml: Nvml, metric: Nvml) -> float | None:
    # Each metric has its own return code, and a window without a clock tick divides by zero.
    if metric.nvmlReturn != nvml.NVML_SUCCESS or not math.isfinite(metric.value):
        return None
    percent: float = round(metric.value, 2)
    return percent


def _utilisation(nvml: Nvml, handle: Nvml) -> tuple[object, ...]:
    rates = nvml.nvmlDeviceGetUtilizationRates(handle)
    return (rates.gpu, rates.memory)


def _memory(nvml: Nvml, handle: Nvml) -> tuple[object, ...]:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return (memory.used, memory.total)


def _temperature(nvml: Nvml, handle: Nvml) -> tuple[object, ...]:
    return (nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),)


def _power(nvml: Nvml, handle: Nvml) -> tuple[object, ...]:
    return (nvml.nvmlDeviceGetPowerUsage(handle) / 1000,)


def _power_limit(nvml: Nvml, handle: Nvml) -> tuple[object, ...]:
    return (nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,)


def _sm_clock(nvml: Nvml, handle: Nvml) -> tuple[object, ...]:
    return (nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),)


def _throttle_reasons(nvml: Nvml, handle: Nvml) -> tuple[object, ...]:
    bits = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    set_bits = (1 << position for position in range(bits.bit_length()) if bits >> position & 1)
    return ([THROTTLE_REASONS.get(bit, hex(bit)) for bit in set_bits],)


def _processes(nvml: Nvml, handle: Nvml) -> tuple[object, ...]:
    running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    return ([{"pid": process.pid, "memory_bytes": process.usedGpuMemory} for process in running],)


READINGS: tuple[tuple[tuple[str, ...], Callable[[Nvml, Nvml], tuple[object, ...]]], ...] = (
    (("utilisation_percent", "memory_busy_percent"), _utilisation),
    (("memory_used_bytes", "memory_total_bytes"), _memory),
    (("temperature_c",), _temperature),
    (("power_w",), _power),
    (("power_limit_w",), _power_limit),
    (("sm_clock_mhz",), _sm_clock),
    (("throttle_reasons",), _throttle_reasons),
    (("processes",), _processes),
)
"""Which fields each NVML call fills; a call that fails leaves all of its fields null."""
