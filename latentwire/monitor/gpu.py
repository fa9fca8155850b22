"""The GPUs through NVML: which there are, and what each does.

A reading that a chip or driver does not give is null. A GPU that falls off the bus gives one event and is then left
out; any other fault is an event when it begins. A machine without a driver has no GPUs and says why in
:attr:`GPUMonitor.source`; it is not an error.
"""

from __future__ import annotations

import importlib
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence

from latentwire.monitor.devices import GPU, Nvml, OpenedNvml
from latentwire.monitor.faults import NOT_GIVEN, Faults, XidWatch
from latentwire.monitor.readings import GPM_FIELDS, READINGS, SLOW_EVERY, SLOW_READINGS, Gpm
from latentwire.monitor.smi import SmiMonitor

Record = dict[str, object]


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
    opened = OpenedNvml(nvml, gpus, environ)
    opened.close()
    return [gpu for gpu, _ in opened.devices]


def open_gpus(
    gpus: Sequence[str] | None,
    interval_s: float,
    *,
    nvml: Nvml = None,
    environ: Mapping[str, str] = os.environ,
) -> GPUMonitor | SmiMonitor:
    """What the sampler reads: NVML, or ``nvidia-smi`` where NVML's library is missing and the program is not.

    Args:
        gpus: As in :func:`list_gpus`.
        interval_s: Seconds between samples, which ``nvidia-smi`` has to know.
        nvml: The NVML module; by default ``pynvml``.
        environ: As in :func:`list_gpus`; its PATH is searched.

    Raises:
        ConfigError: ``gpus`` names one that this machine does not have.
    """
    nvml = nvml or importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        program = shutil.which("nvidia-smi", path=environ.get("PATH"))
        if program is not None and error.value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            return SmiMonitor(program, gpus, interval_s, environ=environ)
        return GPUMonitor(gpus, nvml=nvml, environ=environ)
    try:
        return GPUMonitor(gpus, nvml=nvml, environ=environ)
    finally:
        nvml.nvmlShutdown()  # it counts: the monitor has opened it, too


class GPUMonitor:
    """Samples the GPUs of this process; the sampler owns one. Close it, or use it in a ``with``."""

    def __init__(
        self,
        gpus: Sequence[str] | None = None,
        *,
        nvml: Nvml = None,
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open NVML and start the counters that :meth:`sample` reads; arguments and errors as :func:`list_gpus`."""
        self._opened = OpenedNvml(nvml, gpus, environ)
        self._nvml = self._opened.nvml
        self._devices = [_Device(self._opened, gpu, handle) for gpu, handle in self._opened.devices]
        self._events: list[Record] = [{"event": "gpu_lost", **lost} for lost in self._opened.lost]
        self._faults = Faults(clock)
        self._xids = self._watch()

    @property
    def gpus(self) -> list[GPU]:
        """The GPUs still sampled."""
        return [device.gpu for device in self._devices]

    @property
    def source(self) -> str:
        """``nvml``, or ``host only: <reason>`` where there is no GPU to sample."""
        return self._opened.source

    def sample(self) -> list[Record]:
        """One record a GPU. Blocks for some tenths of a millisecond a GPU; never raises an NVMLError.

        Returns:
            ``index``, ``uuid``, ``name`` and ``readings.FIELDS``, null where not given. Those of ``GPM_FIELDS`` are
            means since the last call (or the opening), those of ``SLOW_READINGS`` are up to ``SLOW_EVERY`` calls old.
            Besides, with the GPU's identity: ``{"event": "gpu_lost", "reason": ...}`` of one found lost, once;
            ``{"event": "gpu_error", "reason": ..., "readings": [...]}`` when a driver error begins, which leaves these
            readings null; ``{"event": "gpu_xid", "xid": 31, "meaning": ...}`` when the driver reports one.
        """
        records, self._events = self._events + self._xid_events(), []
        for device in list(self._devices):
            try:
                readings, errors = device.read()
            except self._nvml.NVMLError as error:
                self._drop(device)
                records.append({"event": "gpu_lost", **device.gpu.identity, "reason": str(error)})
                continue
            records.append(device.gpu.identity | readings)
            for reason, fields in errors.items():
                if self._faults.is_new((device.gpu, reason)):
                    records.append({"event": "gpu_error", **device.gpu.identity, "reason": reason, "readings": fields})
        return records

    def close(self) -> None:
        """Give NVML back. Afterwards there is nothing to sample."""
        for device in self._devices:
            device.close()
        self._devices = []
        self._xids.close()
        self._opened.close()

    def __enter__(self) -> GPUMonitor:
        """The monitor itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _watch(self) -> XidWatch:
        return XidWatch(self._nvml, [device.handle for device in self._devices])

    def _xid_events(self) -> list[Record]:
        known = {gpu.uuid: gpu.identity for gpu in self.gpus}
        return [
            {"event": "gpu_xid", **known.get(str(xid["uuid"]), {}), **xid}
            for xid in self._xids.take()
            if self._faults.is_new((xid["uuid"], xid["xid"]))
        ]

    def _drop(self, device: _Device) -> None:
        self._devices.remove(device)
        device.close()
        # A set of events with a lost GPU in it answers nothing more of the others.
        self._xids.close()
        self._xids = self._watch()


class _Device:
    """One GPU that is sampled."""

    def __init__(self, opened: OpenedNvml, gpu: GPU, handle: Nvml) -> None:
        self.gpu = gpu
        self.handle = handle
        self._opened = opened
        self._nvml = opened.nvml
        self._not_given = {getattr(self._nvml, name) for name in NOT_GIVEN}
        self._gpm = Gpm(self._nvml, handle, gpu.is_mig)
        self._always = (*READINGS, (GPM_FIELDS, self._gpm.read))
        self._slow: Record = {}
        self._num_reads = 0

    def read(self) -> tuple[Record, dict[str, list[str]]]:
        """Its readings, and by driver error the fields that it cost; raises NVMLError only if the GPU is lost."""
        record: Record = {}
        errors: dict[str, list[str]] = {}
        if self._num_reads % SLOW_EVERY == 0:
            self._call(SLOW_READINGS, self._slow, errors)
        self._num_reads += 1
        self._call(self._always, record, errors)
        return record | self._slow, errors

    def close(self) -> None:
        self._gpm.close()

    def _call(
        self,
        readings: Sequence[tuple[tuple[str, ...], Callable[[Nvml, Nvml], tuple[object, ...]]]],
        record: Record,
        errors: dict[str, list[str]],
    ) -> None:
        for fields, read in readings:
            values: tuple[object, ...]
            try:
                values = read(self._nvml, self.handle)
            except self._nvml.NVMLError as error:
                if self._opened.means_lost(error):
                    raise
                if error.value not in self._not_given:
                    errors.setdefault(str(error), []).extend(fields)
                values = (None,) * len(fields)
            record.update(zip(fields, values, strict=True))
