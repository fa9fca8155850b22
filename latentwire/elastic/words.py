"""A plan in words: why this one, why not the others, and what to change where none fits. Pure."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from latentwire.elastic.candidates import Candidate, Job, candidates
from latentwire.elastic.inventory import GB
from latentwire.elastic.schedule import MAX_REPLICAS
from latentwire.errors import ConfigError

_NO_GAIN = "no faster, with more GPUs"
_WORTH_A_WORD = 1.1
_HIGHEST_TARGET = 0.85
"""That the config allows."""


def layout(candidate: Candidate) -> str:
    """``4 whole replicas``; ``2 replicas, llama 0 | qwen 1``: modules and their places within a replica."""
    number = f"{candidate.num_ranks} {{}}replica{'s' if candidate.num_ranks > 1 else ''}"
    places = candidate.modules.values()
    if len({place for each in places for place in each}) < 2:
        return number.format("whole ")
    at = {name: "-".join(str(p) for p in sorted({each[0], each[-1]})) for name, each in candidate.modules.items()}
    by_place: dict[str, list[str]] = {}
    for name, where in at.items():
        by_place.setdefault(where, []).append(name)
    parts = [f"{' + '.join(names)} {where}" for where, names in by_place.items()]
    return f"{number.format('')}, {' | '.join(parts)}"


def in_gb(num_bytes: int) -> str:
    """``70.1 GB``."""
    return f"{num_bytes / GB:.1f} GB"


def why_not(candidate: Candidate, chosen: Candidate | None) -> str:
    """Why a candidate was not chosen; None: none was."""
    if not candidate.fits or chosen is None:
        place = _worst_place(candidate)
        return f"{in_gb(candidate.missing_bytes[place])} too much on GPU {candidate.smallest_gpus[place]}"
    return f"{chosen.pace / candidate.pace:.2f} times slower" if _is_slower(candidate, chosen) else _NO_GAIN


def why(job: Job, chosen: Candidate, others: Sequence[Candidate]) -> str:
    """Why this one and none of the others."""
    computed = f"computed in {chosen.precision}"
    clauses = [_what(job, chosen), *_expected(job, chosen), computed, *_faster_with_less(job, chosen)]
    fitting = [each for each in others if each.fits]
    slower = [each for each in fitting if _is_slower(each, chosen)]
    for kind, named in (
        ("slower", [f"{layout(each)} ({chosen.pace / each.pace:.2f} times)" for each in slower]),
        (_NO_GAIN, [layout(each) for each in fitting if each not in slower]),
        ("does not fit", [f"{layout(each)} ({why_not(each, chosen)})" for each in others if not each.fits]),
    ):
        if named:
            clauses.append(f"{kind}: {' / '.join(named)}")
    if job.footprint is not None:
        clauses += job.footprint.notes
    if job.one_at_a_time:
        clauses.append("one micro-batch at a time, as the run went out of memory with two at once")
    if job.halvings:
        clauses.append(
            f"micro-batch halved {job.halvings} times after running out of memory, so bits may differ from there on"
        )
    return "; ".join(clauses)


def nothing_fits(job: Job, tried: Sequence[Candidate]) -> str:
    """How much is missing where, in the candidate that comes closest, and what would cure it."""
    closest = min(tried, key=lambda c: max(c.missing_bytes))
    place = _worst_place(closest)
    number, target = closest.smallest_gpus[place], closest.target_bytes[place]
    missing, gpu = closest.missing_bytes[place], job.gpus[number]
    checkpointing = "with" if closest.gradient_checkpointing else "without"
    return (
        f"the workload does not fit: closest is {layout(closest)} with a micro-batch of {closest.micro_batch} "
        f"{checkpointing} gradient checkpointing, which needs {in_gb(target + missing)} on GPU {number} ({gpu.name}). "
        f"elastic.memory_target lets {in_gb(target)} of its {in_gb(gpu.memory_bytes)} be filled: {in_gb(missing)} are "
        f"missing. {_cures(job)}"
    )


def _worst_place(candidate: Candidate) -> int:
    return candidate.missing_bytes.index(max(candidate.missing_bytes))


def _is_slower(candidate: Candidate, chosen: Candidate) -> bool:
    return chosen.pace / candidate.pace > 1.005


def _what(job: Job, chosen: Candidate) -> str:
    if not job.gpus:
        words = f"no GPU: {chosen.num_ranks} on the CPU"
    else:
        words = f"{chosen.num_gpus} of {len(job.gpus) * job.num_nodes} GPUs{_left_out(job, chosen)}"
    if job.num_nodes > MAX_REPLICAS:
        words += f", {MAX_REPLICAS} of {job.num_nodes} nodes (a run has at most {MAX_REPLICAS} ranks)"
    elif job.num_nodes > 1:
        words += f", {job.num_nodes} nodes"
    if job.gpus and job.gpus[0].is_mig:
        words += ", as a process sees one MIG slice"
    if chosen.modules:
        words += f": {layout(chosen)}"
    if chosen.gradient_checkpointing:
        words += ", with gradient checkpointing"
    if chosen.in_flight > 1:
        words += f", {chosen.in_flight} micro-batches at once"
    return words


def _left_out(job: Job, chosen: Candidate) -> str:
    """Where a node's GPUs are not alike, those that no rank uses: `` (not 3: L4)``."""
    used = {gpu for gpus in chosen.gpus for gpu in gpus}
    idle = [f"{number}: {gpu.name}" for number, gpu in enumerate(job.gpus) if number not in used]
    return f" (not {', '.join(idle)})" if idle and len(set(job.gpus)) > 1 else ""


def _expected(job: Job, chosen: Candidate) -> list[str]:
    if chosen.peak_bytes is None:
        return ["the workload gives no footprint, so nothing is expected"] if job.gpus else []
    of_places = zip(chosen.peak_bytes, chosen.target_bytes, strict=True)
    peak, target = max(of_places, key=lambda each: each[0] / each[1])
    memory = f"at most {in_gb(peak)} of the {in_gb(target)} that may be filled"
    if chosen.samples_per_s is not None:
        return [f"expected {round(chosen.samples_per_s, 1):g} samples/s, {memory}"]
    return [f"expected {memory}", f"no samples/s, as {job.why_no_pace}"]


def _faster_with_less(job: Job, chosen: Candidate) -> list[str]:
    """Of a divided replica the largest micro-batch that is faster than the config's own, as two at once fit."""
    if len(chosen.smallest_gpus) < 2 or job.one_at_a_time or job.halvings:
        return []
    for smaller in _smaller_divisors(job):
        faster = _pace(_with(job, "train.micro_batch", smaller)) / chosen.pace
        if faster > _WORTH_A_WORD:
            return [f"train.micro_batch: {smaller}, in a new run, would be {faster:.2f} times as fast"]
    return []


def _cures(job: Job) -> str:
    """What would make it fit, the fastest first; two changes together where none helps alone."""
    cures = _helpful(job, 1) or _helpful(job, 2)
    if not job.gpus[0].is_mig:
        larger = [_with_gpus(job, number) for number in range(len(job.gpus) + 1, MAX_REPLICAS + 1)]
        such = "such GPUs" + (" on each node" if job.num_nodes > 1 else "")
        cures += next(([f"{len(more.gpus)} {such}"] for more in larger if _pace(more)), [])
        if not cures:
            found = ((len(more.gpus), cure) for more in larger for cure in _helpful(more, 1)[:1])
            cures += next(([f"{number} {such} and {cure}"] for number, cure in found), [])
    if not cures:
        return "Use larger GPUs, or shorter samples"
    return f"What helps: {', or '.join(cures)}"


def _helpful(job: Job, num_changes: int) -> list[str]:
    """So many changes of the config at a time: those with which it fits, in words, the fastest first."""
    paces = {}
    for keys in itertools.combinations(_CURES, num_changes):
        steps = [job]
        for key in keys:
            steps.append(_with(steps[-1], key, _CURES[key](steps[-1])))
        if all(before != after for before, after in itertools.pairwise(steps)) and (pace := _pace(steps[-1])):
            paces[" and ".join(f"{key}: {_value(steps[-1], key)}" for key in keys)] = pace
    return sorted(paces, key=lambda words: -paces[words])


def _value(job: Job, key: str) -> object:
    """As it stands in the config's YAML."""
    section, name = key.split(".")
    value = getattr(getattr(job.config, section), name)
    return "null" if value is None else value


def _smaller_micro_batch(job: Job) -> int | Literal["auto"]:
    """The fastest that would fit; what it is where none would, or where the planner was free to choose."""
    given = job.config.train.micro_batch
    if given == "auto" or job.halvings:
        return given
    paces = {divisor: _pace(_with(job, "train.micro_batch", divisor)) for divisor in _smaller_divisors(job)}
    fastest = max(paces, key=lambda divisor: paces[divisor], default=given)
    return fastest if paces.get(fastest) else given


_CURES: Mapping[str, Callable[[Job], object]] = {
    "train.gradient_checkpointing": lambda job: "auto",
    "elastic.num_ranks": lambda job: None,
    "elastic.gpus_per_replica": lambda job: None,
    "elastic.memory_target": lambda job: _HIGHEST_TARGET,
    "train.micro_batch": _smaller_micro_batch,
}
"""What a key may be set to; the micro-batch last, as the fastest that fits depends on the others."""


def _smaller_divisors(job: Job) -> list[int]:
    """Micro-batches below the config's own, the largest first; none below ``auto``."""
    train = job.config.train
    if train.micro_batch == "auto":
        return []
    return [d for d in range(train.micro_batch - 1, 0, -1) if train.global_batch % d == 0]


def _with(job: Job, key: str, value: object) -> Job:
    """The job with another value in its config."""
    section, name = key.split(".")
    changed = getattr(job.config, section).model_copy(update={name: value})
    return dataclasses.replace(job, config=job.config.model_copy(update={section: changed}))


def _with_gpus(job: Job, num_gpus: int) -> Job:
    smallest = min(job.gpus, key=lambda gpu: gpu.memory_bytes)
    return dataclasses.replace(job, gpus=(*job.gpus, *[smallest] * (num_gpus - len(job.gpus))))


def _pace(job: Job) -> float:
    """Of the fastest candidate that fits; 0 where none does."""
    try:
        return max((candidate.pace for candidate in candidates(job) if candidate.fits), default=0.0)
    except ConfigError:
        return 0.0
