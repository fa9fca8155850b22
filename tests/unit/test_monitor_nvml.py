"""The GPUs through a fake of NVML's calls, and the loop that samples them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from latentwire.errors import ConfigError
from latentwire.monitor import GPU, GPUMonitor, HostMonitor, Sampler, list_gpus
from latentwire.monitor.readings import GPM_FIELDS
from latentwire.monitor.thin import StatsWriter

GIB = 1 << 30
NOT_SUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED
LOST = pynvml.NVML_ERROR_GPU_IS_LOST
UUIDS = ("GPU-aaaa1111", "GPU-aabb2222", "GPU-cccc3333")
SLICES = {"MIG-1111": 71 * GIB, "MIG-2222": 18 * GIB}
SLICE_INSTANCES = {"MIG-1111": 2, "MIG-2222": 9}


class FakeNVML:
    """Three GPUs behind pynvml's names; constants, structures and errors are the real ones.

    ``failing`` maps a call's name, or (name, GPU index), to the error code that it gives. A GPU of ``sliced`` is in MIG
    mode, with room for four slices and two of them made; a slice's handle is its UUID, and gives no reading of those
    that NVML has for whole GPUs only.
    """

    def __init__(self, *, has_gpm: bool = True, sliced: tuple[int, ...] = ()) -> None:
        self.has_gpm = has_gpm
        self.sliced = sliced
        self.failing: dict[str | tuple[str, int | str], int] = {}
        self.num_open = 0
        self.num_gpm_samples = 0
        self.num_event_sets = 0
        self.watched: list[int] = []
        self.xids: list[tuple[int, int]] = []
        self.num_calls: dict[str, int] = {}
        self.mig_samples: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(pynvml, name)
        assert not (name.startswith("nvml") and callable(found)), f"{name} is not faked"
        return found

    def _check(self, call: str, handle: int | str = -1) -> None:
        self.num_calls[call] = self.num_calls.get(call, 0) + 1
        if isinstance(handle, str):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        for key in (call, (call, handle), ("", handle)):
            if key in self.failing:
                raise pynvml.NVMLError(self.failing[key])

    def nvmlInit(self) -> None:
        self._check("nvmlInit")
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(UUIDS)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        self._check("nvmlDeviceGetHandleByIndex", index)
        return index

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        self._check("nvmlDeviceGetMigMode", handle)
        mode = pynvml.NVML_DEVICE_MIG_ENABLE if handle in self.sliced else pynvml.NVML_DEVICE_MIG_DISABLE
        return [mode, mode]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: int) -> int:
        return 4

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: int, place: int) -> str:
        if place % 2:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return list(SLICES)[place // 2]

    def nvmlDeviceGetUUID(self, handle: int | str) -> str:
        return handle if isinstance(handle, str) else UUIDS[handle]

    def nvmlDeviceGetName(self, handle: int | str) -> str:
        return f"NVIDIA H200 MIG {handle}" if isinstance(handle, str) else "NVIDIA H200"

    def nvmlDeviceGetMemoryInfo(self, handle: int | str) -> SimpleNamespace:
        if isinstance(handle, str):
            return SimpleNamespace(used=GIB, total=SLICES[handle])
        self._check("nvmlDeviceGetMemoryInfo", handle)
        return SimpleNamespace(used=8 * GIB, total=140 * GIB)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        self._check("nvmlDeviceGetUtilizationRates", handle)
        return SimpleNamespace(gpu=97, memory=40)

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        self._check("nvmlDeviceGetTemperature", handle)
        return {pynvml.NVML_TEMPERATURE_GPU: 61}[sensor]

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        self._check("nvmlDeviceGetPowerUsage", handle)
        return 612_500

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
        self._check("nvmlDeviceGetEnforcedPowerLimit", handle)
        return 700_000

    def nvmlDeviceGetClockInfo(self, handle: int, clock: int) -> int:
        self._check("nvmlDeviceGetClockInfo", handle)
        return {pynvml.NVML_CLOCK_SM: 1980}[clock]

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> int:
        self._check("nvmlDeviceGetCurrentClocksEventReasons", handle)
        return pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonHwThermalSlowdown | 1 << 40

    def nvmlDeviceGetTotalEccErrors(self, handle: int, kind: int, counter: int) -> int:
        self._check("nvmlDeviceGetTotalEccErrors", handle)
        assert counter == pynvml.NVML_VOLATILE_ECC
        return {pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED: 3, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED: 1}[kind]

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int | str) -> list[SimpleNamespace]:
        own = SimpleNamespace(pid=os.getpid(), usedGpuMemory=7 * GIB)
        if isinstance(handle, str):
            return [own]
        self._check("nvmlDeviceGetComputeRunningProcesses", handle)
        gone = 1 << 30  # above the highest process id that Linux gives
        return [own, SimpleNamespace(pid=gone, usedGpuMemory=None)]

    def nvmlEventSetCreate(self) -> Any:
        self._check("nvmlEventSetCreate")
        self.num_event_sets += 1
        self.watched = []
        return "the set"

    def nvmlEventSetFree(self, events: Any) -> None:
        self.num_event_sets -= 1

    def nvmlDeviceRegisterEvents(self, handle: int, kinds: int, events: Any) -> None:
        self._check("nvmlDeviceRegisterEvents", handle)
        assert kinds == pynvml.nvmlEventTypeXidCriticalError
        self.watched.append(handle)

    def nvmlEventSetWait_v2(self, events: Any, timeout_ms: int) -> SimpleNamespace:
        assert timeout_ms == 0, "a sample waits for nothing"
        watched = [xid for xid in self.xids if xid[0] in self.watched]
        if not watched:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT)
        self.xids.remove(watched[0])
        return SimpleNamespace(device=watched[0][0], eventData=watched[0][1])

    def nvmlGpmQueryDeviceSupport(self, handle: int) -> SimpleNamespace:
        self._check("nvmlGpmQueryDeviceSupport", handle)
        return SimpleNamespace(isSupportedDevice=int(self.has_gpm))

    def nvmlGpmSampleAlloc(self) -> Any:
        self.num_gpm_samples += 1
        return pynvml.c_nvmlGpmSample_t()

    def nvmlGpmSampleFree(self, sample: Any) -> None:
        self.num_gpm_samples -= 1

    def nvmlGpmSampleGet(self, handle: int, sample: Any) -> None:
        self._check("nvmlGpmSampleGet", handle)

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> int:
        assert handle in SLICES
        return self.sliced[0]

    def nvmlDeviceGetGpuInstanceId(self, handle: str) -> int:
        return SLICE_INSTANCES[handle]

    def nvmlGpmMigSampleGet(self, gpu: int, instance: int, sample: Any) -> None:
        self._check("nvmlGpmMigSampleGet", gpu)
        self.mig_samples.append((gpu, instance))

    def nvmlGpmMetricsGet(self, wanted: Any) -> None:
        self._check("nvmlGpmMetricsGet")
        values = {
            pynvml.NVML_GPM_METRIC_SM_UTIL: 88.125,
            pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL: float("nan"),
            pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL: 41.5,
            pynvml.NVML_GPM_METRIC_PCIE_TX_PER_SEC: 2.5,
            pynvml.NVML_GPM_METRIC_PCIE_RX_PER_SEC: 0.0,
            pynvml.NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC: 300_000.0,
        }
        for metric in wanted.metrics[: wanted.numMetrics]:
            known = metric.metricId in values
            metric.nvmlReturn = pynvml.NVML_SUCCESS if known else pynvml.NVML_ERROR_NOT_SUPPORTED
            metric.value = values.get(metric.metricId, 17.0)


def test_a_sample_has_every_reading() -> None:
    nvml = FakeNVML()
    with GPUMonitor(nvml=nvml, environ={}) as monitor:
        assert monitor.source == "nvml"
        first, *others = monitor.sample()
    assert len(others) == 2
    assert first == {
        "index": 0,
        "uuid": UUIDS[0],
        "name": "NVIDIA H200",
        "utilisation_percent": 97,
        "memory_busy_percent": 40,
        "sm_active_percent": 88.12,
        "tensor_active_percent": None,
        "memory_used_bytes": 8 * GIB,
        "memory_total_bytes": 140 * GIB,
        "temperature_c": 61,
        "power_w": 612.5,
        "power_limit_w": 700.0,
        "sm_clock_mhz": 1980,
        "throttle_reasons": ["sw_power_cap", "hw_thermal_slowdown", "0x10000000000"],
        "num_ecc_corrected": 3,
        "num_ecc_uncorrected": 1,
        "dram_bandwidth_percent": 41.5,
        "pcie_tx_bytes_per_s": int(2.5 * (1 << 20)),
        "pcie_rx_bytes_per_s": 0,
        "nvlink_tx_bytes_per_s": 300_000 << 20,
        "nvlink_rx_bytes_per_s": None,
        "processes": [
            {"pid": os.getpid(), "name": Path("/proc/self/comm").read_text().strip(), "memory_bytes": 7 * GIB},
            {"pid": 1 << 30, "name": None, "memory_bytes": None},
        ],
    }
    given_back = (nvml.num_open, nvml.num_gpm_samples, nvml.num_event_sets)
    assert given_back == (0, 0, 0), "all that was opened is given back"


@pytest.mark.parametrize(
    ("call", "fields"),
    [
        ("nvmlDeviceGetUtilizationRates", {"utilisation_percent", "memory_busy_percent"}),
        ("nvmlDeviceGetTemperature", {"temperature_c"}),
        ("nvmlDeviceGetPowerUsage", {"power_w"}),
        ("nvmlDeviceGetTotalEccErrors", {"num_ecc_corrected", "num_ecc_uncorrected"}),
        ("nvmlGpmMetricsGet", set(GPM_FIELDS)),
        ("nvmlGpmQueryDeviceSupport", set(GPM_FIELDS)),
    ],
)
def test_a_reading_that_is_not_given_is_null(call: str, fields: set[str]) -> None:
    nvml = FakeNVML()
    nvml.failing[call] = NOT_SUPPORTED
    with GPUMonitor(nvml=nvml, environ={}) as monitor:
        record, *others = monitor.sample()
    not_given = {"tensor_active_percent", "nvlink_rx_bytes_per_s"}
    assert {name for name, value in record.items() if value is None} == fields | not_given
    assert not any("event" in other for other in others), "a chip that has no such reading is no fault"


def test_a_chip_without_performance_monitoring_has_no_sm_active() -> None:
    with GPUMonitor(nvml=FakeNVML(has_gpm=False), environ={}) as monitor:
        assert [record["sm_active_percent"] for record in monitor.sample()] == [None] * 3


def test_sm_active_comes_back_after_a_failed_reading() -> None:
    nvml = FakeNVML()
    with GPUMonitor(["0"], nvml=nvml, environ={}) as monitor:
        nvml.failing["nvmlGpmSampleGet"] = pynvml.NVML_ERROR_TIMEOUT
        values = [monitor.sample()[0]["sm_active_percent"]]
        nvml.failing.clear()
        values += [monitor.sample()[0]["sm_active_percent"] for _ in range(2)]
    assert values == [None, None, 88.12], "a mean needs two hardware samples on either side of the time"


def test_a_lost_gpu_is_one_event_and_the_others_go_on() -> None:
    nvml = FakeNVML()
    with GPUMonitor(nvml=nvml, environ={}) as monitor:
        assert len(monitor.sample()) == 3
        nvml.failing["", 1] = nvml.failing["nvmlDeviceGetTemperature", 1] = LOST
        lost = [record for record in monitor.sample() if "event" in record]
        assert lost == [
            {"event": "gpu_lost", "index": 1, "uuid": UUIDS[1], "name": "NVIDIA H200", "reason": "GPU is lost"}
        ]
        assert [record["index"] for record in monitor.sample()] == [0, 2]


def test_a_driver_error_is_one_event_until_it_was_quiet_for_long() -> None:
    now_s, nvml = 0, FakeNVML()
    with GPUMonitor(["1"], nvml=nvml, environ={}, clock=lambda: now_s) as monitor:
        nvml.failing["nvmlDeviceGetTemperature"] = nvml.failing["nvmlDeviceGetPowerUsage"] = pynvml.NVML_ERROR_UNKNOWN
        record, event = monitor.sample()
        assert (record["temperature_c"], record["utilisation_percent"]) == (None, 97)
        identity = {"index": 1, "uuid": UUIDS[1], "name": "NVIDIA H200"}
        fields = ["temperature_c", "power_w"]
        assert event == {"event": "gpu_error", **identity, "reason": "Unknown Error", "readings": fields}
        for _ in range(3000):
            now_s += 1
            assert len(monitor.sample()) == 1
        nvml.failing.clear()
        assert monitor.sample()[0]["temperature_c"] == 61
        nvml.failing["nvmlDeviceGetTemperature"] = pynvml.NVML_ERROR_UNKNOWN
        now_s += 500
        assert len(monitor.sample()) == 1, "it flickers"
        now_s += 700
        assert len(monitor.sample()) == 2, "it is back"


def test_an_xid_is_an_event_and_a_storm_of_it_one() -> None:
    nvml = FakeNVML()
    with GPUMonitor(nvml=nvml, environ={"CUDA_VISIBLE_DEVICES": "0,1"}) as monitor:
        nvml.xids = [(1, 31)] * 100 + [(0, 4711), (2, 79)]
        events = [r for _ in range(3) for r in monitor.sample() if "event" in r]
        identity = {"index": 1, "uuid": UUIDS[1], "name": "NVIDIA H200"}
        assert events[0] == {"event": "gpu_xid", **identity, "xid": 31, "meaning": "memory page fault"}
        assert [(event["index"], event["xid"], event["meaning"]) for event in events[1:]] == [(0, 4711, None)]
        assert nvml.xids == [(2, 79)], "GPU 2 is not ours"
        nvml.failing["nvmlDeviceGetTemperature", 0] = LOST
        monitor.sample()
        assert nvml.watched == [1]
        nvml.xids = [(1, 79)]
        assert [r["xid"] for r in monitor.sample() if "event" in r] == [79], "the others are watched on"


def test_slow_calls_are_made_seldom() -> None:
    nvml = FakeNVML()
    with GPUMonitor(["0"], nvml=nvml, environ={}) as monitor:
        samples = [monitor.sample()[0] for _ in range(10)]
    assert nvml.num_calls["nvmlDeviceGetTemperature"] == 10
    assert nvml.num_calls["nvmlDeviceGetComputeRunningProcesses"] == 2
    assert all(sample["processes"] == samples[0]["processes"] for sample in samples)


def test_a_gpu_lost_before_the_start_is_an_event_too() -> None:
    nvml = FakeNVML()
    nvml.failing["nvmlDeviceGetHandleByIndex", 0] = LOST
    with GPUMonitor(nvml=nvml, environ={"CUDA_VISIBLE_DEVICES": "0,2"}) as monitor:
        event, sample = monitor.sample()
    assert event == {"event": "gpu_lost", "index": 0, "reason": "GPU is lost"}
    assert sample["index"] == 2


def test_a_gpu_of_another_job_is_no_loss() -> None:
    nvml = FakeNVML()
    nvml.failing["nvmlDeviceGetHandleByIndex", 0] = pynvml.NVML_ERROR_NO_PERMISSION
    with GPUMonitor(nvml=nvml, environ={}) as monitor:
        assert [record["index"] for record in monitor.sample()] == [1, 2]


@pytest.mark.parametrize(
    ("visible", "indexes"),
    [
        (None, [0, 1, 2]),
        ("2,0", [2, 0]),
        (" 1 ", [1]),
        ("1,1", [1]),
        ("0,-1,2", [0]),
        ("0,7,2", [0]),
        ("GPU-cccc3333,GPU-aaaa", [2, 0]),
        ("GPU-aa", []),
        ("", []),
        ("NoDevFiles", []),
    ],
)
def test_cuda_visible_devices_is_honoured(visible: str | None, indexes: list[int]) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    nvml = FakeNVML()
    assert [gpu.index for gpu in list_gpus(nvml=nvml, environ=environ)] == indexes
    assert nvml.num_open == 0
    if not indexes:
        source = GPUMonitor(nvml=nvml, environ=environ).source
        assert source == f"host only: CUDA_VISIBLE_DEVICES is {visible!r}, which names no GPU of this machine"


def test_an_explicit_list_overrides_the_environment() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "0"}
    assert list_gpus(["GPU-aabb", "0"], nvml=FakeNVML(), environ=environ) == [
        GPU(1, UUIDS[1], "NVIDIA H200", 140 * GIB),
        GPU(0, UUIDS[0], "NVIDIA H200", 140 * GIB),
    ]
    with pytest.raises(ConfigError, match=r"there is no GPU '3'; .*: 0, 1, 2$"):
        list_gpus(["3"], nvml=FakeNVML(), environ={})


def test_a_gpu_in_mig_mode_is_its_slices() -> None:
    nvml = FakeNVML(sliced=(1,))
    gpus = list_gpus(nvml=nvml, environ={})
    assert [(gpu.index, gpu.uuid, gpu.memory_bytes, gpu.is_mig) for gpu in gpus] == [
        (0, UUIDS[0], 140 * GIB, False),
        (1, "MIG-1111", 71 * GIB, True),
        (1, "MIG-2222", 18 * GIB, True),
        (2, UUIDS[2], 140 * GIB, False),
    ]
    chosen = {"MIG-2222": ["MIG-2222"], "1": ["MIG-1111"]}
    for visible, uuids in chosen.items():
        assert [gpu.uuid for gpu in list_gpus(nvml=nvml, environ={"CUDA_VISIBLE_DEVICES": visible})] == uuids
    nvml.failing["nvmlDeviceGetMigMode"] = NOT_SUPPORTED
    assert not any(gpu.is_mig for gpu in list_gpus(nvml=nvml, environ={}))


def test_a_slice_gives_memory_processes_and_the_readings_of_its_gpu_instance() -> None:
    nvml = FakeNVML(sliced=(1,))
    with GPUMonitor(["MIG-2222"], nvml=nvml, environ={}) as monitor:
        (record,) = monitor.sample()
    given = {name: value for name, value in record.items() if value is not None}
    assert given.pop("processes") == [
        {"pid": os.getpid(), "name": Path("/proc/self/comm").read_text().strip(), "memory_bytes": 7 * GIB}
    ]
    assert given == {
        "index": 1,
        "uuid": "MIG-2222",
        "name": "NVIDIA H200 MIG MIG-2222",
        "memory_used_bytes": GIB,
        "memory_total_bytes": 18 * GIB,
        "sm_active_percent": 88.12,
        "dram_bandwidth_percent": 41.5,
        "pcie_tx_bytes_per_s": int(2.5 * (1 << 20)),
        "pcie_rx_bytes_per_s": 0,
        "nvlink_tx_bytes_per_s": 300_000 << 20,
    }
    assert nvml.mig_samples == [(1, 9)] * 2, "of the GPU that it lies on, by the number of its instance"
    assert (nvml.num_open, nvml.num_gpm_samples) == (0, 0)


def test_without_a_driver_there_are_no_gpus() -> None:
    nvml = FakeNVML()
    nvml.failing["nvmlInit"] = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    assert list_gpus(nvml=nvml, environ={}) == []
    with GPUMonitor(nvml=nvml, environ={}) as monitor:
        assert (monitor.source, monitor.sample()) == ("host only: Driver Not Loaded", [])
    assert nvml.num_open == 0


def test_the_loop_does_not_drift_and_records_a_lost_gpu(tmp_path: Path) -> None:
    clock_s, waits_s = 100.0, []
    nvml = FakeNVML()

    def wait(seconds: float) -> bool:
        nonlocal clock_s
        waits_s.append(round(seconds, 6))
        # Work takes 0.3 s a sample, and the process is stopped for 5 s during the third.
        clock_s += seconds + (5.3 if len(waits_s) == 3 else 0.3)
        if len(waits_s) == 2:
            nvml.failing["nvmlDeviceGetTemperature", 1] = LOST
        return len(waits_s) == 6

    stats = StatsWriter(tmp_path / "gpu_stats.jsonl", 1.0, clock=lambda: clock_s)
    host, gpus = HostMonitor(tmp_path), GPUMonitor(nvml=nvml, environ={})
    Sampler(stats, host, gpus, 1.0, wait=wait, clock=lambda: clock_s).run()
    stats.close()

    assert waits_s == [1.0, 0.7, 0.7, 0.7, 0.7, 0.7]
    records = [json.loads(line) for line in (tmp_path / "gpu_stats.jsonl").read_text().splitlines()]
    assert [record.get("event") for record in records] == [
        "monitor_started", None, "gpu_lost", None, None, None, None, "monitor_stopped"
    ]  # fmt: skip
    third = {"index": 2, "uuid": UUIDS[2], "name": "NVIDIA H200", "memory_bytes": 140 * GIB, "is_mig": False}
    assert records[0]["gpus"][2] == third
    assert [len(record["gpus"]) for record in records if "host" in record] == [3, 2, 2, 2, 2]
    assert [record["time"] for record in records if "host" in record] == [101.3, 102.3, 108.3, 109.3, 110.3]
