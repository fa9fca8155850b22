"""The monitor's loop, and the file that it writes.

``gpu_stats.jsonl`` has one JSON object a line: samples ``{"time", "host", "gpus"}`` and events ``{"time", "event"}``
with details (``monitor_started`` first, ``gpu_lost``, ``records_lost``, ``monitor_stopped`` last). A file that does not
end in ``monitor_stopped`` was written by a monitor that is still running or was killed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict

from latentwire.monitor.gpu import GPUMonitor
from latentwire.monitor.host import HostMonitor
from latentwire.monitor.smi import SmiMonitor
from latentwire.monitor.thin import StatsWriter
from latentwire.run.process import node_name

Record = dict[str, object]


class Sampler:
    """Takes a sample of host and GPUs every interval until it is told to end."""

    def __init__(
        self,
        stats: StatsWriter,
        host: HostMonitor,
        gpus: GPUMonitor | SmiMonitor,
        interval_s: float,
        *,
        wait: Callable[[float], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Join the parts; nothing is read or written yet.

        Args:
            stats: Where records go.
            host: Read at each sample.
            gpus: Read at each sample.
            interval_s: Seconds between samples.
            wait: Sleeps for so many seconds; returns True at once when the monitor shall end.
            clock: Monotonic seconds; decides when samples are due.
        """
        self._stats = stats
        self._host = host
        self._gpus = gpus
        self._interval_s = interval_s
        self._wait = wait
        self._clock = clock

    def run(self) -> None:
        """Record until ``wait`` says to end; blocks until then. The first sample comes after one interval."""
        self._stats.event("monitor_started", **self._description())
        began_s = self._clock()
        num_ticks = 1
        while not self._wait(max(0.0, began_s + num_ticks * self._interval_s - self._clock())):
            self._sample()
            # Counted from the start, so it does not drift; ticks that were slept through (SIGSTOP) are left out.
            num_ticks = max(num_ticks, int((self._clock() - began_s) / self._interval_s)) + 1
        self._stats.event("monitor_stopped")

    def _description(self) -> Record:
        return {
            "source": self._gpus.source,
            "interval_s": self._interval_s,
            "hostname": node_name(),
            "num_cpus": os.cpu_count(),
            "gpus": [asdict(gpu) for gpu in self._gpus.gpus],
        }

    def _sample(self) -> None:
        host, readings = self._host.sample(), self._gpus.sample()
        for lost in (reading for reading in readings if "event" in reading):
            self._stats.event(str(lost["event"]), **{k: v for k, v in lost.items() if k != "event"})
        gpus = [reading for reading in readings if "event" not in reading]
        self._stats.record(host=host, gpus=gpus)
