"""A plan in words: why this one, why not the others, and what to change where none fits. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from latentwire.elastic.candidates import Candidate, Job, candidates
from latentwire.elastic.inventory import GB
from latentwire.elastic.schedule import MAX_REPLICAS
from latentwire.errors import ConfigError


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


def missing(candidate: Candidate) -> str:
    """Where most is missing of what a candidate that does not fit needs."""
    place = max(range(len(candidate.missing_bytes)), key=lambda p: candidate.missing_bytes[p])
    return f"{in_gb(candidate.missing_bytes[place])} too much on GPU {candidate.gpus[0][place]}"


def why_not(candidate: Candidate, chosen: Candidate) -> str:
    """Why a candidate was not chosen."""
    if not candidate.fits:
        return missing(candidate)
    slower = chosen.pace / candidate.pace
    return f"{slower:.2f} times slower" if slower > 1.005 else "no faster, and more GPUs"


def why(job: Job, chosen: Candidate, others: Sequence[Candidate]) -> str:
    """Why this one and none of the others."""
    sentences = [_what(job, chosen), *_expected(job, chosen)]
    if others:
        sentences.append("not " + "; not ".join(f"{layout(each)}: {why_not(each, chosen)}" for each in others))
    if job.footprint is not None:
        sentences += job.footprint.notes
    if job.halvings:
        sentences.append(
            f"micro-batch halved {job.halvings} times after running out of memory, so bits may differ from there on"
        )
    return ". ".join(sentences)


def nothing_fits(job: Job, tried: Sequence[Candidate]) -> str:
    """How much is missing where, in the candidate that comes closest, and what would cure it."""
    closest = min(tried, key=lambda c: max(c.missing_bytes))
    missing_bytes, target_bytes = closest.missing_bytes, closest.target_bytes
    assert closest.peak_bytes is not None
    place = max(range(len(missing_bytes)), key=lambda p: missing_bytes[p])
    gpu = job.gpus[closest.gpus[0][place]]
    return (
        f"the workload does not fit: closest is {layout(closest)} with a micro-batch of {closest.micro_batch}, which "
        f"needs {in_gb(closest.peak_bytes[place])} on GPU {closest.gpus[0][place]} ({gpu.name}), where elastic."
        f"memory_target lets {in_gb(target_bytes[place])} of {in_gb(gpu.memory_bytes)} be filled: "
        f"{in_gb(missing_bytes[place])} are missing. {_cures(job)}"
    )


def _what(job: Job, chosen: Candidate) -> str:
    if not job.gpus:
        words = f"no GPU: {chosen.num_ranks} on the CPU"
    else:
        words = f"{chosen.num_gpus} of {len(job.gpus) * job.num_nodes} GPUs"
    if job.num_nodes > 1:
        words += f", {job.num_nodes} nodes"
    if job.gpus and job.gpus[0].is_mig:
        words += ", as a process sees one MIG slice"
    if chosen.modules:
        words += f": {layout(chosen)}"
    if chosen.gradient_checkpointing:
        words += ", with gradient checkpointing"
    return words


def _expected(job: Job, chosen: Candidate) -> list[str]:
    if chosen.peak_bytes is None:
        return ["the workload gives no footprint, so nothing is expected"] if job.gpus else []
    fullest = max(range(len(chosen.peak_bytes)), key=lambda p: chosen.peak_bytes[p] / chosen.target_bytes[p])
    peak, target = chosen.peak_bytes[fullest], chosen.target_bytes[fullest]
    memory = f"at most {in_gb(peak)} of the {in_gb(target)} that may be filled"
    if chosen.samples_per_s is not None:
        return [f"expected: {chosen.samples_per_s:.3g} samples/s, {memory}"]
    unknown = sorted({gpu.name for gpu in job.gpus if gpu.flops_per_s is None})
    reason = f"the speed of {', '.join(unknown)} is not known" if unknown else "the speed in fp32 is not known"
    return [f"expected: {memory}; {reason}, so no samples/s"]


def _cures(job: Job) -> str:
    train, elastic = job.config.train, job.config.elastic
    cures = []
    if train.gradient_checkpointing is False:
        section = train.model_copy(update={"gradient_checkpointing": "auto"})
        if _fits(dataclasses.replace(job, config=job.config.model_copy(update={"train": section}))):
            cures.append("train.gradient_checkpointing: auto")
    smaller = _smaller_micro_batch(job)
    if smaller is not None:
        cures.append(f"train.micro_batch: {smaller}")
    more = next((n for n in range(len(job.gpus) + 1, MAX_REPLICAS + 1) if _fits(_with_gpus(job, n))), None)
    if more is not None and not job.gpus[0].is_mig:
        cures.append(f"{more} such GPUs")
    if elastic.num_ranks is not None or elastic.gpus_per_replica is not None:
        cures.append("elastic.num_ranks and elastic.gpus_per_replica: null")
    if not cures:
        return "Use larger GPUs, or lower what a sample takes" + (
            f", or raise elastic.memory_target ({elastic.memory_target:g})" if elastic.memory_target < 0.85 else ""
        )
    return f"Any of these helps: {', '.join(cures)}"


def _smaller_micro_batch(job: Job) -> int | None:
    """The largest that would fit; None where none would, or the planner has been free to choose it."""
    train = job.config.train
    if train.micro_batch == "auto" or job.halvings:
        return None
    for divisor in range(train.micro_batch - 1, 0, -1):
        if train.global_batch % divisor == 0:
            section = train.model_copy(update={"micro_batch": divisor})
            if _fits(dataclasses.replace(job, config=job.config.model_copy(update={"train": section}))):
                return divisor
    return None


def _with_gpus(job: Job, num_gpus: int) -> Job:
    smallest = min(job.gpus, key=lambda gpu: gpu.memory_bytes)
    return dataclasses.replace(job, gpus=(*job.gpus, *[smallest] * (num_gpus - len(job.gpus))))


def _fits(job: Job) -> bool:
    try:
        return any(candidate.fits for candidate in candidates(job))
    except ConfigError:
        return False
