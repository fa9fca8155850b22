"""What came of a drill: its rows, the digests of both runs, and the hardware that they met."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from latentwire.elastic.inventory import Inventory
from latentwire.run.atomic import read_json
from latentwire.run.directory import Attempt, Run


@dataclasses.dataclass(frozen=True)
class Row:
    """What came of a disturbance.

    Attributes:
        name: of the disturbance.
        hit: it fell where it was meant to.
        recovered: the run trained on.
        steps_lost: steps that were done again.
        may_lose: as many were allowed.
        resume_s: from the disturbance to the next trained step.
        epoch: where it fell.
        jobs: of Slurm, before and after.
        passed: hit, and lost no more than allowed.
    """

    name: str
    hit: bool
    recovered: bool
    steps_lost: int
    may_lose: int
    resume_s: float
    epoch: int
    jobs: str
    passed: bool


@dataclasses.dataclass(frozen=True)
class Result:
    """The drill's outcome.

    Attributes:
        rows: one for each disturbance.
        undisturbed, disturbed: digests by group of the last checkpoint.
        undisturbed_attempts: 1, or somebody else disturbed the run that was to be undisturbed.
        attempts: of the disturbed run.
        other_hardware: which attempts ran on other hardware or versions than the first, in words.
        seconds: all of it.
    """

    rows: tuple[Row, ...]
    undisturbed: dict[str, str]
    disturbed: dict[str, str]
    undisturbed_attempts: int
    attempts: int
    other_hardware: tuple[str, ...]
    seconds: float

    @property
    def identical(self) -> bool:
        """Whether every group of tensors has the same SHA-256 in both runs."""
        return bool(self.undisturbed) and self.undisturbed == self.disturbed

    @property
    def passed(self) -> bool:
        """All of it."""
        return self.identical and self.undisturbed_attempts == 1 and all(row.passed for row in self.rows)


def final_digests(run: Run) -> dict[str, str]:
    """SHA-256 of each group of tensors in the newest checkpoint, read back from the disk."""
    from latentwire.checkpoint import layout, reader

    paths = [p for p in run.checkpoints.iterdir() if layout.parse_step_name(p.name) is not None]
    manifest = reader.verify(max(paths, key=lambda p: p.name))
    return {group: str(manifest.group_sha256(group)) for group in manifest.groups}


def other_hardware(*runs: Run) -> tuple[str, ...]:
    """Attempts whose chips or versions are not those of the first: the bits may differ between them."""
    environments = [(attempt, environment) for run in runs for attempt, environment in _environments(run)]
    return tuple(
        f"attempt {attempt.number} of the {attempt.run.name} run, on {environment['host']}: {change}"
        for attempt, environment in environments
        for change in Inventory.from_json(environment).changes_since(environments[0][1])
    )


def _environments(run: Run) -> Iterator[tuple[Attempt, dict[str, Any]]]:
    for attempt in run.attempts():
        environment = read_json(attempt.path / "environment.json")
        if isinstance(environment, dict):
            yield attempt, environment


def table(result: Result) -> str:
    """The result for people."""
    lines = [f"{'disturbance':32} {'recovered':9} {'steps lost':>10} {'allowed':>7} {'resumed in':>10}"]
    for row in result.rows:
        recovered = ("yes" if row.recovered else "NO") + ("" if row.hit else " (missed)")
        figures = f"{row.steps_lost:>10} {row.may_lose:>7} {row.resume_s:>8.1f} s"
        jobs = f"  job {row.jobs}" if row.jobs else ""
        lines.append(f"{row.name:32} {recovered:9} {figures}{jobs}  {'' if row.passed else 'FAILED'}".rstrip())
    lines.append(f"\n{'final SHA-256':16} {'undisturbed':20} {'disturbed':20}")
    for group in sorted(result.undisturbed | result.disturbed):
        ours, theirs = result.undisturbed.get(group, "-"), result.disturbed.get(group, "-")
        lines.append(f"{group:16} {ours[:18]:20} {theirs[:18]:20} {'equal' if ours == theirs else 'DIFFERENT'}")
    lines += _remarks(result)
    verdict = "passed" if result.passed else "FAILED"
    lines.append(f"\ndrill {verdict}: {len(result.rows)} disturbances, {result.attempts} attempts, {result.seconds} s")
    return "\n".join(lines)


def _remarks(result: Result) -> list[str]:
    """What a person has to know to judge the digests."""
    lines = []
    if result.other_hardware:
        lines += ["\nnot everything ran on the same hardware and versions:", *result.other_hardware]
        if not result.identical:
            lines.append(
                "the same bits are promised on the same kind of chip only, so this difference says nothing: run the "
                "drill on one kind (scheduler.constraint=..., scheduler.extra.nodelist=...)"
            )
    if result.undisturbed_attempts != 1:
        lines.append(
            f"\nthe undisturbed run took {result.undisturbed_attempts} attempts, so it was disturbed too (preempted by "
            "somebody else?): run the drill again"
        )
    return lines
