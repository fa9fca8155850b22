"""What keeps a run from being faster, from what it wrote of itself. Pure: records in, findings out.

A verdict needs figures of its own, and is not given without them. The steps' timings (``metrics.jsonl``) say what the
host waited for; the GPUs' readings (``gpu_stats.jsonl``) say what they did meanwhile. The first step is left out, as it
warms up, and so are samples from before and after training, in which the GPUs have nothing to do.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from latentwire.monitor.figures import Record, figure_of, gpus_of, host_of, percent
from latentwire.monitor.stats import throttled_s

DATA_BOUND = COMMUNICATION_BOUND = 0.10
"""Of the time: more than so much of it waiting is worth a change."""
UNEVEN = 0.15
LONG = 3.0
"""Times the median: a step of so long was held up by something else."""
SAVE_BOUND = 0.05
HOST_BOUND = 0.25
BUSY_PERCENT = 75.0
"""A kernel runs for so much of the time: the GPU is kept busy, with whatever."""
IDLE_SM_PERCENT = 50.0
"""Under this many SMs are empty while kernels run."""
ROOMY_PERCENT = 60.0
"""Of a GPU's memory: under this there is room for more samples at a time."""
FULL_BANDWIDTH_PERCENT = 60.0
"""Of the data sheet's, which no kernel reaches."""
BUSY_MEMORY_PERCENT = 80.0
"""Of the time, where the chip does not tell its bandwidth: any access counts as busy, however small."""
BUSY_TENSOR_PERCENT = 30.0
THROTTLED = 0.10
FRAGMENTED = 0.20
"""Of the memory that the allocator took: so much was never in use, although it took more and more."""
TIGHT_PERCENT = 70.0
"""Of a GPU's memory: below, what the allocator wastes harms nobody."""
BUSY_CPU_PERCENT = 90.0

HOT = ("sw_thermal_slowdown", "hw_thermal_slowdown", "hw_slowdown")
POWER = ("sw_power_cap", "hw_power_brake_slowdown")
_SIGNS_OF_WORK = ("utilisation_percent", "sm_active_percent")
"""A slice of a GPU has no utilisation of its own."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One verdict.

    Attributes:
        verdict: ``data-bound``, ``healthy``, ``nothing measured`` and so on.
        share: about so much of the time is lost to it (of fragmentation: of the memory); the graver the larger.
        evidence: the figures, in words.
        change: the one key of the config, or variable of the environment, to change; None where there is nothing to.
        advice: how to change it, in words.
    """

    verdict: str
    share: float
    evidence: str
    change: str | None
    advice: str


def diagnose(samples: Iterable[Record], steps: Iterable[Record]) -> list[Finding]:
    """What costs time, gravest first. Called by ``latentwire diagnose`` and by reports; does not block.

    Args:
        samples: lines of ``gpu_stats.jsonl``, of one node or of several.
        steps: lines of ``metrics.jsonl`` of the same attempt; those without ``step_s`` are passed over.

    Returns:
        At least one: ``healthy`` where nothing is found in the figures, ``nothing measured`` where there are none.
    """
    figures = _Figures(samples, steps)
    found = [finding for look in _LOOKS if (finding := look(figures)) is not None]
    if found:
        return sorted(found, key=lambda finding: -finding.share)
    if not figures.measured:
        return [Finding("nothing measured", 0.0, "no step was timed", None, "train for some steps first")]
    return [Finding("healthy", 0.0, f"nothing found in {figures.measured}", None, "leave it as it is")]


class _Figures:
    """What the verdicts are made from: sums over the steps, and the readings of the GPUs that worked in them."""

    def __init__(self, samples: Iterable[Record], steps: Iterable[Record]) -> None:
        timed = [step for step in steps if (figure_of(step, "step_s") or 0) > 0]
        self.steps = timed[1:] if len(timed) > 2 else timed
        training = [sample for sample in samples if self._is_in_training(sample)]
        readings = [(str(gpu.get("uuid")), gpu, _stands_for(each)) for each in training for gpu in gpus_of(each)]
        working = {uuid for uuid, gpu, _ in readings if any(figure_of(gpu, name) for name in _SIGNS_OF_WORK)}
        self.gpus: list[Record] = [gpu for uuid, gpu, _ in readings if uuid in working]
        """Readings of the GPUs that ever did something: others on the node are not this run's."""
        self.gpu_seconds = [seconds for uuid, _, seconds in readings if uuid in working]
        """How long each of them stands for: a thinned one for a minute and more."""
        self._hosts = [(host_of(sample), _stands_for(sample)) for sample in training]
        self.step_s = self.total("step_s")
        self.save_s = self.total("save_s")
        self.num_gpus = len(working)

    def _is_in_training(self, sample: Record) -> bool:
        time_s = figure_of(sample, "time")
        if not self.steps or time_s is None:
            return False
        first, last = self.steps[0], self.steps[-1]
        began_s = (figure_of(first, "time") or 0.0) - (figure_of(first, "step_s") or 0.0)
        return began_s <= time_s <= (figure_of(last, "time") or 0.0)

    @property
    def measured(self) -> str:
        """What there are figures of, in words; empty: of nothing."""
        steps = f"the timings of {len(self.steps)} steps" if self.steps else ""
        gpus = f"{len(self.gpus)} readings of {self.num_gpus} GPUs" if self.gpus else "no GPU was measured"
        return f"{steps}; {gpus}" if steps else ""

    @property
    def wall_s(self) -> float:
        """From the begin of the first step to the end of the last, with saves and evaluations between them."""
        first, last = (figure_of(step, "time") or 0.0 for step in (self.steps[0], self.steps[-1]))
        return max(last - first + (figure_of(self.steps[0], "step_s") or 0.0), self.step_s + self.save_s)

    @property
    def exchange_s(self) -> float:
        """What the exchange of gradients kept the ranks waiting.

        The host's own ``reduction_s`` would, on GPUs, also count what they still had to compute.
        """
        on_gpus = [s for step in self.steps if (s := figure_of(step, "exchange_s")) is not None]
        return sum(on_gpus) if on_gpus or self.gpus else self.total("reduction_s")

    def total(self, name: str) -> float:
        """Sum over the steps, seconds."""
        return sum(figure_of(step, name) or 0.0 for step in self.steps)

    def mean(self, name: str) -> float | None:
        """Mean over time of the working GPUs' readings; None without any."""
        return _mean_over_time(zip(self.gpus, self.gpu_seconds, strict=True), name)

    @property
    def cpu_percent(self) -> float | None:
        """Mean over time of the hosts' readings."""
        return _mean_over_time(self._hosts, "cpu_percent")

    @property
    def memory_percent(self) -> float | None:
        """How full the fullest GPU ever was."""
        full = (percent(figure_of(g, "memory_used_bytes"), figure_of(g, "memory_total_bytes")) for g in self.gpus)
        return max((value for value in full if value is not None), default=None)


# --- what the host waited for -----------------------------------------------------------------------------------------


def _data_bound(figures: _Figures) -> Finding | None:
    share = figures.total("data_s") / figures.step_s if figures.step_s else 0.0
    if share < DATA_BOUND:
        return None
    evidence = f"{share:.0%} of a step waits for data ({_per_step(figures, 'data_s')} of {_per_step(figures)})"
    cpu = figures.cpu_percent
    if cpu is not None and cpu >= BUSY_CPU_PERCENT:
        full = f"{evidence}, and the CPUs are full ({cpu:.0f} %)"
        return Finding(
            "data-bound", share, full, "scheduler.cpus", "ask for more cores, or prepare the data beforehand"
        )
    advice = "more workers prepare batches beside the step; at 0 the step itself does"
    return Finding("data-bound", share, evidence, "data.workers", advice)


def _communication_bound(figures: _Figures) -> Finding | None:
    share = figures.exchange_s / figures.step_s if figures.step_s else 0.0
    if share < COMMUNICATION_BOUND:
        return None
    seconds = figures.exchange_s / len(figures.steps)
    evidence = f"{share:.0%} of a step is the exchange of gradients ({seconds:.3g} s of {_per_step(figures)})"
    advice = "a larger batch gives the ranks more to compute for each exchange; a new run, as the result changes"
    return Finding("communication-bound", share, evidence, "train.global_batch", advice)


def _uneven(figures: _Figures) -> Finding | None:
    """Steps that take many times as long as most; what keeps all steps waiting has verdicts of its own."""
    lengths = [figure_of(step, "step_s") or 0.0 for step in figures.steps]
    usual_s = statistics.median(lengths) if lengths else 0.0
    long = [(step, seconds) for step, seconds in zip(figures.steps, lengths, strict=True) if seconds > LONG * usual_s]
    lost_s = sum(seconds - usual_s for _, seconds in long)
    waited_s = sum(figure_of(step, "data_s") or 0.0 for step, _ in long)
    if not long or lost_s < UNEVEN * figures.step_s or waited_s > lost_s / 2:
        return None
    evidence = (
        f"{len(long)} of {len(lengths)} steps took up to {max(lengths):.3g} s, half of all steps {usual_s:.3g} s or "
        f"less: {lost_s / figures.step_s:.0%} of the time"
    )
    advice = "something else had the processors, the GPU or the network then: ask for whole nodes, exclusive: true"
    return Finding("uneven steps", lost_s / figures.step_s, evidence, "scheduler.extra", advice)


def _idle_in_saves(figures: _Figures) -> Finding | None:
    share = figures.save_s / (figures.step_s + figures.save_s) if figures.step_s else 0.0
    if share < SAVE_BOUND:
        return None
    saved = [step for step in figures.steps if (figure_of(step, "save_s") or 0.0) > 0]
    stall_s = figures.save_s / len(saved)
    evidence = f"{share:.0%} of the time is {len(saved)} saves, {stall_s:.3g} s each, in {len(figures.steps)} steps"
    every = _usual_gap(saved)
    if every is not None:
        advice = f"it saves every {every} steps: save more seldom, or leave it to checkpoint.interval_s: auto"
        return Finding("idle in saves", share, evidence, "checkpoint.interval_steps", advice)
    advice = "auto weighs what a save costs against what a preemption would"
    return Finding("idle in saves", share, evidence, "checkpoint.interval_s", advice)


def _usual_gap(saved: Sequence[Record]) -> int | None:
    """So many steps lie between most saves; None where no number is usual."""
    numbers = [step["step"] for step in saved if isinstance(step.get("step"), int)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(numbers)]
    gap, times = Counter(gaps).most_common(1)[0] if gaps else (0, 0)
    return gap if times >= 2 and times > len(gaps) / 2 else None


# --- what the GPUs did ------------------------------------------------------------------------------------------------


def _host_bound(figures: _Figures) -> Finding | None:
    busy = figures.mean("utilisation_percent")
    if busy is None:
        return None
    computing = (figures.step_s - figures.total("data_s") - figures.exchange_s) / figures.wall_s
    share = computing - busy / 100
    if share < HOST_BOUND:
        return None
    evidence = f"the GPUs run kernels for {busy:.0f} % of the time, although steps compute for {computing:.0%} of it"
    cpu = figures.cpu_percent
    if cpu is not None and cpu >= BUSY_CPU_PERCENT:
        evidence += f"; the CPUs are full ({cpu:.0f} %)"
        return Finding("host-bound", share, evidence, "scheduler.cpus", "ask for more cores: kernels wait for the host")
    advice = "larger micro-batches launch fewer kernels for the same work; a new run, as bits depend on it"
    return Finding("host-bound", share, evidence, "train.micro_batch", advice)


def _too_small_batch(figures: _Figures) -> Finding | None:
    busy, active, full = figures.mean("utilisation_percent"), figures.mean("sm_active_percent"), figures.memory_percent
    if busy is None or active is None or full is None:
        return None
    if busy < BUSY_PERCENT or active >= IDLE_SM_PERCENT or full >= ROOMY_PERCENT or _memory_traffic(figures):
        return None
    evidence = (
        f"kernels run for {busy:.0f} % of the time and fill {active:.0f} % of the SMs; memory is {full:.0f} % full"
    )
    advice = "auto takes the largest that fits; a new run, as bits depend on it"
    return Finding("too-small batch", 1 - active / 100, evidence, "train.micro_batch", advice)


def _memory_bound(figures: _Figures) -> Finding | None:
    memory, tensor = _memory_traffic(figures), figures.mean("tensor_active_percent")
    if memory is None or tensor is None or tensor >= BUSY_TENSOR_PERCENT:
        return None
    percent_of, words = memory
    evidence = f"{words}, and the tensor cores work for {tensor:.0f} % of the time"
    share = (percent_of - tensor) / 100
    if tensor < 1:
        advice = "bf16 moves half the bytes of fp32 and runs on tensor cores; a new run, as the result changes"
        return Finding("memory-bound", share, evidence, "train.precision", advice)
    advice = "compiled layers read and write each activation less often (compile: true of the pair)"
    return Finding("memory-bound", share, evidence, "workload.options.compile", advice)


def _memory_traffic(figures: _Figures) -> tuple[float, str] | None:
    """How much the GPUs' memory has to do, in percent and in words; None where that is not much, or not known."""
    bandwidth = figures.mean("dram_bandwidth_percent")
    if bandwidth is not None:
        words = f"{bandwidth:.0f} % of the memory's bandwidth is used"
        return (bandwidth, words) if bandwidth >= FULL_BANDWIDTH_PERCENT else None
    busy = figures.mean("memory_busy_percent")
    if busy is None or busy < BUSY_MEMORY_PERCENT:
        return None
    return busy, f"the memory is busy for {busy:.0f} % of the time"


def _heat_throttled(figures: _Figures) -> Finding | None:
    advice = "leave this node out and tell its administrator: no setting of a run cools it"
    return _throttled(figures, "heat-throttled", HOT, "scheduler.exclude", advice)


def _power_throttled(figures: _Figures) -> Finding | None:
    advice = "ask for nodes whose GPUs may draw more; on this one the limit is the administrator's"
    return _throttled(figures, "power-throttled", POWER, "scheduler.constraint", advice)


def _throttled(figures: _Figures, verdict: str, reasons: Sequence[str], change: str, advice: str) -> Finding | None:
    readings = zip(figures.gpus, figures.gpu_seconds, strict=True)
    told = [(gpu, seconds) for gpu, seconds in readings if isinstance(gpu.get("throttle_reasons"), list)]
    slowed = [(gpu, _held_s(gpu, seconds, reasons)) for gpu, seconds in told]
    told_s, slowed_s = (sum(seconds for _, seconds in each) for each in (told, slowed))
    if not slowed_s or slowed_s < THROTTLED * told_s:
        return None
    share = slowed_s / told_s
    evidence = f"clocks are held down for {share:.0%} of the time"
    usual = _mean_over_time(slowed, "sm_clock_mhz")
    highest = max((clock for gpu, _ in told if (clock := figure_of(gpu, "sm_clock_mhz")) is not None), default=0.0)
    if usual is not None and highest:
        share *= 1 - usual / highest
        evidence += f", at {usual:.0f} MHz of the {highest:.0f} that were seen"
    power_w = _mean_over_time(slowed, "power_w")
    temperature_c = _mean_over_time(slowed, "temperature_c")
    evidence += f", at {power_w:.0f} W" if power_w is not None else ""
    evidence += f" and {temperature_c:.0f} °C" if temperature_c is not None else ""
    return Finding(verdict, share, evidence, change, advice)


def _held_s(gpu: Record, seconds: float, reasons: Sequence[str]) -> float:
    """How long the reasons held the clocks down: as long as the one that did longest, for they overlap."""
    held = throttled_s(dict(gpu), seconds)
    return min(seconds, max(held.get(reason, 0.0) for reason in reasons))


def _fragmented(figures: _Figures) -> Finding | None:
    """Held against the peaks: at the end of a step the allocator always holds more than is in use."""
    last = next((step for step in reversed(figures.steps) if figure_of(step, "memory_reserved_peak_bytes")), None)
    if last is None:
        return None
    reserved = figure_of(last, "memory_reserved_peak_bytes") or 0.0
    used = figure_of(last, "memory_allocated_peak_bytes") or 0.0
    retries = figure_of(last, "memory_retries") or 0.0
    share = 1 - used / reserved
    is_tight = retries > 0 or (figures.memory_percent or 0.0) >= TIGHT_PERCENT
    if share < FRAGMENTED or not is_tight:
        return None
    evidence = (
        f"of {reserved / 1e9:.3g} GB that the allocator took {share:.0%} were never in use; it had to give back what "
        f"was free and take it anew {retries:.0f} times"
    )
    advice = "expandable_segments:True, exported before you resume: PyTorch's allocator then leaves fewer gaps"
    return Finding("fragmentation", share, evidence, "PYTORCH_CUDA_ALLOC_CONF", advice)


_LOOKS: tuple[Callable[[_Figures], Finding | None], ...] = (
    _data_bound,
    _communication_bound,
    _uneven,
    _idle_in_saves,
    _host_bound,
    _too_small_batch,
    _memory_bound,
    _heat_throttled,
    _power_throttled,
    _fragmented,
)


def _per_step(figures: _Figures, name: str = "step_s") -> str:
    return f"{figures.total(name) / len(figures.steps):.3g} s"


def _stands_for(sample: Record) -> float:
    return figure_of(sample, "seconds") or 1.0


def _mean_over_time(readings: Iterable[tuple[Record, float]], name: str) -> float | None:
    """Each weighs as many seconds as it stands for; None without any."""
    known = [(value, seconds) for record, seconds in readings if (value := figure_of(record, name)) is not None]
    total_s = sum(seconds for _, seconds in known)
    return sum(value * seconds for value, seconds in known) / total_s if total_s else None
