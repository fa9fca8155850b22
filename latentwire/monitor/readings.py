"""What is read from one GPU through NVML: the calls, the fields that each fills, and the performance monitor."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from latentwire.monitor.devices import Nvml

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
MIB = 1 << 20
GPM_PERCENTS = {
    "sm_active_percent": "NVML_GPM_METRIC_SM_UTIL",
    "tensor_active_percent": "NVML_GPM_METRIC_ANY_TENSOR_UTIL",
    "dram_bandwidth_percent": "NVML_GPM_METRIC_DRAM_BW_UTIL",
}
GPM_MIB_PER_S = {
    "pcie_tx_bytes_per_s": "NVML_GPM_METRIC_PCIE_TX_PER_SEC",
    "pcie_rx_bytes_per_s": "NVML_GPM_METRIC_PCIE_RX_PER_SEC",
    "nvlink_tx_bytes_per_s": "NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC",
    "nvlink_rx_bytes_per_s": "NVML_GPM_METRIC_NVLINK_TOTAL_RX_PER_SEC",
}
GPM_FIELDS = (*GPM_PERCENTS, *GPM_MIB_PER_S)


def throttle_names(bits: int) -> list[str]:
    """The names of the bits that are set, in hexadecimal where this version knows none."""
    set_bits = (1 << position for position in range(bits.bit_length()) if bits >> position & 1)
    return [THROTTLE_REASONS.get(bit, hex(bit)) for bit in set_bits]


class Gpm:
    """GPU performance monitoring (Hopper and later): means over the time between two hardware samples.

    PCIe and NVLink traffic is read here or not at all: ``nvmlDeviceGetPcieThroughput`` waits for 20 ms a direction,
    which at one sample a second is 40 times what all of this monitor may cost.
    """

    def __init__(self, nvml: Nvml, handle: Nvml, is_mig: bool) -> None:
        """Take the first hardware sample, where the chip has such; a slice has those of its GPU instance."""
        self._nvml = nvml
        self._samples: list[Nvml] = []
        self._has_previous = False
        try:
            gpu = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle) if is_mig else handle
            self._take: Callable[[Nvml], object] = partial(nvml.nvmlGpmSampleGet, gpu)
            if is_mig:  # NVML gives none for a slice's own handle
                self._take = partial(nvml.nvmlGpmMigSampleGet, gpu, nvml.nvmlDeviceGetGpuInstanceId(handle))
            if nvml.nvmlGpmQueryDeviceSupport(gpu).isSupportedDevice:
                self._samples = [nvml.nvmlGpmSampleAlloc(), nvml.nvmlGpmSampleAlloc()]
                self._take(self._samples[0])
                self._has_previous = True
        except nvml.NVMLError:
            pass  # an old chip, an old driver or no permission; if the GPU is lost, the first sample says so
        self._wanted = self._metrics()

    def read(self, nvml: Nvml, handle: Nvml) -> tuple[float | None, ...]:
        """The values of ``GPM_FIELDS`` since the last call; nulls where there was none or the chip has none."""
        if not self._samples:
            return (None,) * len(GPM_FIELDS)
        previous, latest = self._samples
        had_previous, self._has_previous = self._has_previous, False
        self._take(latest)
        self._samples, self._has_previous = [latest, previous], True
        if not had_previous:
            return (None,) * len(GPM_FIELDS)
        self._wanted.sample1, self._wanted.sample2 = previous, latest
        nvml.nvmlGpmMetricsGet(self._wanted)
        return tuple(self._value(position) for position in range(len(GPM_FIELDS)))

    def close(self) -> None:
        """Give the samples back."""
        for sample in self._samples:
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlGpmSampleFree(sample)
        self._samples = []

    def _metrics(self) -> Nvml:
        """The structure of a request: 20 KB, so it is made once."""
        wanted = self._nvml.c_nvmlGpmMetricsGet_t()
        wanted.version = self._nvml.NVML_GPM_METRICS_GET_VERSION
        wanted.numMetrics = len(GPM_FIELDS)
        for metric, name in zip(wanted.metrics, (*GPM_PERCENTS.values(), *GPM_MIB_PER_S.values()), strict=False):
            metric.metricId = getattr(self._nvml, name)
        return wanted

    def _value(self, position: int) -> float | None:
        metric = self._wanted.metrics[position]
        # Each metric has its own return code, and a window without a clock tick divides by zero.
        if metric.nvmlReturn != self._nvml.NVML_SUCCESS or not math.isfinite(metric.value):
            return None
        return round(metric.value, 2) if position < len(GPM_PERCENTS) else int(metric.value * MIB)


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
    return (throttle_names(nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)),)


def _ecc(nvml: Nvml, handle: Nvml) -> tuple[object, ...]:
    kinds = (nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED)
    return tuple(nvml.nvmlDeviceGetTotalEccErrors(handle, kind, nvml.NVML_VOLATILE_ECC) for kind in kinds)


def _processes(nvml: Nvml, handle: Nvml) -> tuple[object, ...]:
    running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    return ([{"pid": p.pid, "name": _name(p.pid), "memory_bytes": p.usedGpuMemory} for p in running],)


def _name(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:  # it has ended, or runs where this process cannot see it
        return None


Readings = tuple[tuple[tuple[str, ...], Callable[[Nvml, Nvml], tuple[object, ...]]], ...]
"""Which fields each NVML call fills; a call that fails leaves all of its fields null."""

READINGS: Readings = (
    (("utilisation_percent", "memory_busy_percent"), _utilisation),
    (("memory_used_bytes", "memory_total_bytes"), _memory),
    (("temperature_c",), _temperature),
    (("power_w",), _power),
    (("sm_clock_mhz",), _sm_clock),
    (("throttle_reasons",), _throttle_reasons),
)
SLOW_READINGS: Readings = (
    (("power_limit_w",), _power_limit),
    (("num_ecc_corrected", "num_ecc_uncorrected"), _ecc),
    (("processes",), _processes),
)
"""What changes seldom and costs more than the rest."""
SLOW_EVERY = 5
"""In how many samples these are read once; the others repeat them."""

FIELDS = tuple(field for fields, _ in (*READINGS, *SLOW_READINGS) for field in fields) + GPM_FIELDS
"""All that a record has besides the GPU's identity."""
