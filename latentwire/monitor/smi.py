"""The GPUs through ``nvidia-smi``, where NVML's library cannot be loaded: fewer readings, and a second process.

One ``nvidia-smi`` runs as long as the monitor and writes a line a GPU and interval; nobody waits for it.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

from latentwire.monitor.devices import GPU, choose
from latentwire.monitor.faults import Faults
from latentwire.monitor.readings import FIELDS, MIB, throttle_names

Record = dict[str, object]

STALE_S = 10.0
"""Readings older than this, or than three intervals, are no readings."""
RESTART_S = 60.0
"""How long an ``nvidia-smi`` that ended is left alone."""
INVENTORY_WITHIN_S = 60.0
SHORTEST_MS = 200


def _whole(text: str) -> float:
    return int(float(text))


def _mib(text: str) -> int:
    return int(float(text) * MIB)


QUERIES: dict[str, tuple[tuple[str, ...], Callable[[str], object]]] = {
    "utilisation_percent": (("utilization.gpu",), _whole),
    "memory_busy_percent": (("utilization.memory",), _whole),
    "memory_used_bytes": (("memory.used",), _mib),
    "memory_total_bytes": (("memory.total",), _mib),
    "temperature_c": (("temperature.gpu",), _whole),
    "power_w": (("power.draw",), float),
    "power_limit_w": (("enforced.power.limit",), float),
    "sm_clock_mhz": (("clocks.sm", "clocks.current.sm"), _whole),
    "throttle_reasons": (
        ("clocks_event_reasons.active", "clocks_throttle_reasons.active"),
        lambda text: throttle_names(int(text, 16)),
    ),
    "num_ecc_corrected": (("ecc.errors.corrected.volatile.total",), _whole),
    "num_ecc_uncorrected": (("ecc.errors.uncorrected.volatile.total",), _whole),
}
"""Of each reading the names that versions of the program have for it, and how its text is read."""


class SmiMonitor:
    """Samples the GPUs of this process as :class:`GPUMonitor` does; the sampler owns one. Close it."""

    def __init__(
        self,
        program: str,
        gpus: Sequence[str] | None,
        interval_s: float,
        *,
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Ask for the GPUs and start the stream; blocks for two short runs of the program.

        Args:
            program: Path of ``nvidia-smi``.
            gpus: Indexes or UUIDs, instead of those in CUDA_VISIBLE_DEVICES.
            interval_s: Seconds between samples.
            environ: Where CUDA_VISIBLE_DEVICES is looked up.
            clock: Monotonic seconds.

        Raises:
            ConfigError: ``gpus`` names one that this machine does not have.
        """
        self._program = program
        self._interval_s = interval_s
        self._clock = clock
        found, complaint = self._inventory()
        self.gpus, reason = choose(found, gpus, environ, reason=f"nvidia-smi: {complaint}")
        self.source = "nvidia-smi" if self.gpus else f"host only: {reason}"
        self._columns = self._known_columns() if self.gpus else {}
        self._faults = Faults(clock)
        self._rows: dict[str, tuple[float, Record]] = {}
        self._stream: subprocess.Popen[bytes] | None = None
        self._half_line = b""
        self._start()

    def sample(self) -> list[Record]:
        """One record a GPU that said something lately, and events as :class:`GPUMonitor` has them. Does not block."""
        records: list[Record] = [
            {"event": "gpu_error", "reason": complaint} for complaint in self._take() if self._faults.is_new(complaint)
        ]
        now_s = self._clock()
        for gpu in self.gpus:
            read_s, readings = self._rows.get(gpu.uuid, (self._started_s, {}))
            if now_s - read_s > max(STALE_S, 3 * self._interval_s):
                reason = f"nvidia-smi says nothing of it for {now_s - read_s:.0f} s"
                if self._faults.is_new(gpu):
                    records.append({"event": "gpu_error", **gpu.identity, "reason": reason})
            elif readings:
                records.append(gpu.identity | readings)
        return records

    def close(self) -> None:
        """End the stream."""
        if self._stream is not None:
            self._stream.kill()
            self._stream.communicate()
            self._stream = None

    def __enter__(self) -> SmiMonitor:
        """The monitor itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _ask(self, *arguments: str) -> tuple[str, str]:
        """The output, and what the program complains of."""
        try:
            answer = subprocess.run(
                [self._program, *arguments], capture_output=True, text=True, errors="replace",
                stdin=subprocess.DEVNULL, timeout=INVENTORY_WITHIN_S,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return "", str(error)
        if answer.returncode != 0:
            return "", (answer.stdout + answer.stderr).strip() or f"exit status {answer.returncode}"
        return answer.stdout, "it lists no GPU"

    def _inventory(self) -> tuple[list[GPU], str]:
        listed, complaint = self._ask("--query-gpu=index,uuid,memory.total,name", "--format=csv,noheader,nounits")
        rows = [line.split(", ", 3) for line in listed.splitlines()]
        return [GPU(int(r[0]), r[1], r[3], _mib(r[2])) for r in rows if len(r) == 4 and r[0].isdigit()], complaint

    def _known_columns(self) -> dict[str, str]:
        """Of each reading the name that this version knows; it would refuse a query with one that it does not."""
        known, _ = self._ask("--help-query-gpu")
        names = {reading: [n for n in names if f'"{n}"' in known] for reading, (names, _) in QUERIES.items()}
        return {reading: known_names[0] for reading, known_names in names.items() if known_names}

    def _start(self) -> None:
        self._started_s = self._clock()
        if not self.gpus:
            return
        query = ",".join(["uuid", *self._columns.values()])
        command = [self._program, f"--query-gpu={query}", "--format=csv,noheader,nounits"]
        command += [f"--id={','.join(gpu.uuid for gpu in self.gpus)}"]
        command += [f"--loop-ms={max(SHORTEST_MS, round(self._interval_s * 1000))}"]
        self._stream = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert self._stream.stdout is not None
        os.set_blocking(self._stream.stdout.fileno(), False)

    def _take(self) -> list[str]:
        """Read what the stream has; what is no row of readings is a complaint."""
        if self._stream is None:
            return []
        lines = self._new_lines(self._stream)
        complaints = [line for line in lines if not self._is_row(line)]
        if self._stream.poll() is not None and self._clock() - self._started_s > RESTART_S:
            complaints.append(f"nvidia-smi ended with status {self._stream.returncode}; it is started again")
            self.close()
            self._start()
        return complaints

    def _new_lines(self, stream: subprocess.Popen[bytes]) -> list[str]:
        assert stream.stdout is not None
        data = self._half_line
        while True:
            try:
                chunk = os.read(stream.stdout.fileno(), 1 << 16)
            except BlockingIOError:
                break
            if not chunk:
                break
            data += chunk
        *whole, self._half_line = data.split(b"\n")
        return [line.decode(errors="replace").strip() for line in whole if line.strip()]

    def _is_row(self, line: str) -> bool:
        uuid, *values = line.split(", ")
        if len(values) != len(self._columns) or uuid not in {gpu.uuid for gpu in self.gpus}:
            return False
        readings: Record = dict.fromkeys(FIELDS)
        for reading, text in zip(self._columns, values, strict=True):
            readings[reading] = _read(reading, text)
        self._rows[uuid] = (self._clock(), readings)
        return True


def _read(reading: str, text: str) -> object:
    try:
        return QUERIES[reading][1](text)
    except ValueError:  # "[N/A]", "[Not Supported]", "[Unknown Error]"
        return None
