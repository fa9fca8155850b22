"""The directory of a run, and of each of its attempts.

::

    runs/experiment_<name>/
      config.yaml                  the resolved config
      orchestrator.json            who submits jobs for it (a lease)
      events.orchestrator.jsonl    what was submitted, seen and decided
      cancel.json                  present: do not start it again
      jobs/0001.json  submitit/    what was submitted, and submitit's own files
      jobs/ended-8841-0.json       of a job of several nodes: its leader has left
      cache/                       what attempts need not compute again
      attempts/0003/               claimed by an exclusive rename: the number is the fencing token
        attempt.json               job id, how often Slurm had restarted it, node, pid
        events.agent.jsonl  events.rank0.jsonl  metrics.jsonl  gpu_stats.jsonl
        stdout.log  stderr.log  monitor.log  environment.json  placement.json
        grace.json                 what the scheduler gives at preemption, where that is known
        deadline.json              after a notice: when the scheduler ends the job
        restoring.json             present while a checkpoint is being loaded
        rank0.json                 how the rank ended
        rendezvous.json            on several nodes: where their ranks meet
        *.node1.*                  what the second node's agent and monitor write
      checkpoints/step-00001200/   see latentwire.checkpoint
      metrics.json  gpu_stats.json roll-ups over all attempts
      report.html                  the run on one page
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import itertools
import os
import re
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentwire.errors import Fenced, RunConflict, RunError, RunNotFound
from latentwire.run.atomic import fsync_directory, make_directory, open_to_read, read_json, write_json, write_text
from latentwire.run.figures import number
from latentwire.run.journal import newest_first, read_journal, time_of
from latentwire.run.process import ProcessIdentity

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from latentwire.config import Config

PREFIX = "experiment_"
REWRITE = "submit the run's config again to write it anew"
"""The cure for a config.yaml that is damaged or lost."""
_RECENT_STEPS = 20
_PARTS = {"config.yaml", "attempts", "checkpoints"}
"""What is in no other folder."""
_ATTEMPT = re.compile(r"\d{4,}")

Mark = tuple[int, int] | None
"""Of a file: inode, which a new file may get again, and time of change, nanoseconds; None where there is no file."""


@dataclasses.dataclass(frozen=True)
class Run:
    """An experiment and its directory. Cheap: holds a path and reads the disk when asked."""

    path: Path

    @property
    def name(self) -> str:
        """The name in the config."""
        return self.path.name.removeprefix(PREFIX)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def config_path(self) -> Path:
        """Its resolved config."""
        return self.path / "config.yaml"

    @property
    def cancel_path(self) -> Path:
        """Present while the run must not be started again."""
        return self.path / "cancel.json"

    @property
    def lease_path(self) -> Path:
        """Names the orchestrator that looks after the run."""
        return self.path / "orchestrator.json"

    @property
    def orchestrator_events(self) -> Path:
        """The orchestrator's own journal."""
        return self.path / "events.orchestrator.jsonl"

    def own_events(self) -> list[dict[str, Any]]:
        """The events of its orchestrators, in the order in which they were written."""
        return list(read_journal(self.orchestrator_events))

    def is_cancelled(self) -> bool:
        """Whether nobody is to start it any more."""
        return self.cancel_path.exists()

    def config(self) -> Config:
        """The run's resolved config, as it was written when the run was made. Reads the file and nothing else.

        Raises:
            ConfigError, RunError: it is missing or was damaged.
        """
        import yaml  # with pydantic it takes longer than all of `latentwire status`, which needs neither

        from latentwire.config import sections_of

        try:
            with open_to_read(self.config_path) as file:
                tree = yaml.safe_load(file.read().decode())
        except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
            raise RunError(f"{self.config_path} cannot be read ({error}); {REWRITE}") from None
        return sections_of(tree, where=str(self.config_path))

    def checked_config(self) -> Config:
        """The same for whoever trains it or changes it: the workload is imported, to check its options once more.

        Raises:
            ConfigError, RunError, WorkloadError: it is missing or was damaged, or the workload does not take it.
        """
        from latentwire.config import with_checked_options

        return with_checked_options(self.config(), where=str(self.config_path))

    def mark(self) -> Mark:
        """Another one once the run was removed and made again under its name, or a setting was changed. Readers ask.

        None: it has lost its config.
        """
        return _mark(self.config_path)

    def attempts(self) -> list[Attempt]:
        """All attempts, oldest first."""
        try:
            names = [n for n in os.listdir(self.path / "attempts") if _ATTEMPT.fullmatch(n)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [Attempt(self, number) for number in sorted(map(int, names))]

    def claim_attempt(
        self, job_id: str, scheduler: str, restart: int = 0, after: Attempt | None = None, gpus: int | None = None
    ) -> Attempt:
        """Start a new attempt: its number is larger than any other's, and only ours. Called by the leading agent.

        The folder appears by one rename, with attempt.json inside: it is never seen empty, and a rename onto a folder
        that is not empty fails, so that of two claims of a number one goes on to the next.

        Args:
            job_id: the scheduler's name for the job.
            scheduler: ``local`` or ``slurm``.
            restart: how often the scheduler had started this job again.
            after: the claimer's own last attempt. The number is the next one or none: an agent that was given up would
                else supersede the one that took its place.
            gpus: that the scheduler gave the job on all its nodes; None: it does not say.

        Raises:
            Fenced: somebody else has claimed an attempt since ``after``.
        """
        parent = self.path / "attempts"
        make_directory(parent)
        aside = parent / f".claim-{uuid.uuid4().hex[:12]}"
        aside.mkdir()
        number = (self.newest_number() if after is None else after.number) + 1
        while True:
            job = {"job_id": job_id, "scheduler": scheduler, "restart": restart, "gpus": gpus}
            mine = {"claimed": time.time(), "agent": dataclasses.asdict(ProcessIdentity.of())}
            write_json(aside / "attempt.json", {"number": number} | job | mine)
            try:
                os.rename(aside, parent / f"{number:04d}")
                break
            except OSError as error:
                taken = error.errno in (errno.EEXIST, errno.ENOTEMPTY)
                if taken and after is None:
                    number += 1
                    continue
                shutil.rmtree(aside, ignore_errors=True)
                if taken:
                    raise Fenced(f"attempt {number} of {self.name} belongs to another agent") from None
                raise
        fsync_directory(parent)
        return Attempt(self, number)

    def running_attempt(self) -> Attempt | None:
        """The newest attempt, if its agent is alive on this host."""
        attempts = self.attempts()
        agent = attempts[-1].agent() if attempts else None
        return attempts[-1] if agent is not None and agent.is_alive() else None

    def end_job(self, job_id: str, restart: int, outcome: str) -> None:
        """Say to a job's other nodes that no attempt follows in this start of it. Called by the leader, last."""
        path = self._job_end_path(job_id, restart)
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"time": time.time(), "outcome": outcome})

    def job_end(self, job_id: str, restart: int) -> str | None:
        """The outcome with which the leader left; None while it is there."""
        path = self._job_end_path(job_id, restart)
        if path not in path.parent.glob("ended-*"):  # a listing: a network file system then looks anew
            return None
        record = read_json(path)
        return str(record["outcome"]) if isinstance(record, dict) else None

    def _job_end_path(self, job_id: str, restart: int) -> Path:
        return self.path / "jobs" / f"ended-{job_id}-{restart}.json"

    def mark_cancelled(self, **who: Any) -> None:
        """Say that nobody is to start it any more. Called before whatever ends the job.

        Args:
            who: cancelled it, or by what that is known: ``user``, ``host`` and ``pid``, or ``by``.
        """
        write_json(self.cancel_path, {"time": time.time(), **who})

    def deadly_checkpoints(self) -> set[str]:
        """Names of checkpoints that two attempts or more began to load and were not heard of again."""
        names = [attempt.restoring() for attempt in self.attempts()]
        return {name for name in names if name is not None and names.count(name) >= 2}

    def newest_number(self) -> int:
        """The highest attempt number so far, 0 before the first."""
        attempts = self.attempts()
        return attempts[-1].number if attempts else 0


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One start of a run."""

    run: Run
    number: int

    @functools.cached_property
    def path(self) -> Path:
        """The attempt's folder."""
        return self.run.path / "attempts" / f"{self.number:04d}"

    def record(self) -> dict[str, Any]:
        """attempt.json: job id, scheduler, restart, agent; empty if it cannot be read."""
        record = read_json(self.path / "attempt.json")
        return record if isinstance(record, dict) else {}

    def claimed(self) -> float:
        """When, unix seconds; 0 where its record has no time that a calendar knows."""
        return time_of({"time": self.record().get("claimed")})

    def mark(self) -> Mark:
        """Another one once the attempt was removed and claimed again under its number."""
        return _mark(self.path / "attempt.json")

    def agent(self) -> ProcessIdentity | None:
        """The process that runs the attempt; of several nodes the leader's."""
        return ProcessIdentity.from_json(self.record().get("agent"))

    @property
    def metrics_path(self) -> Path:
        """The journal of its steps and evaluations."""
        return self.path / "metrics.jsonl"

    def placement(self) -> dict[str, Any]:
        """placement.json: the devices of each rank, and what is where on them; empty before it is written."""
        placement = read_json(self.path / "placement.json")
        return placement if isinstance(placement, dict) else {}

    def environments(self) -> list[dict[str, Any]]:
        """environment.json of each node whose agent has written it."""
        found = [read_json(path) for path in sorted(self.path.glob("environment*.json"))]
        return [environment for environment in found if isinstance(environment, dict)]

    def is_newest(self) -> bool:
        """False once a newer attempt has been claimed."""
        return self.run.newest_number() == self.number

    def assert_newest(self) -> None:
        """The fence: called right before anything that readers will believe.

        Raises:
            Fenced: a newer attempt exists.
        """
        newest = self.run.newest_number()
        if newest != self.number:
            raise Fenced(
                f"attempt {self.number} of {self.run.name} was superseded by attempt {newest}: it commits nothing more"
            )

    def set_grace(self, seconds: float) -> None:
        """Write down what the scheduler gives at preemption. Called by the agent."""
        write_json(self.path / "grace.json", {"seconds": seconds})

    def grace_s(self) -> float | None:
        """What the scheduler gives at preemption, where that is known."""
        record = read_json(self.path / "grace.json")
        return number(record.get("seconds")) if isinstance(record, dict) else None

    def set_end(self, unix_s: float) -> None:
        """Write down when the scheduler means to end the job. Called by an agent after a notice; all write the same."""
        write_json(self.path / "deadline.json", {"unix_s": unix_s})

    def end_unix_s(self) -> float | None:
        """When the scheduler means to end the job, where that is known."""
        record = read_json(self.path / "deadline.json")
        return number(record.get("unix_s")) if isinstance(record, dict) else None

    def mark_restoring(self, checkpoint: str) -> None:
        """Say which checkpoint is about to be loaded. A mark that is never taken back means: died of it."""
        write_json(self.path / "restoring.json", {"checkpoint": checkpoint})

    def unmark_restoring(self) -> None:
        """The load is over, or was given up politely."""
        (self.path / "restoring.json").unlink(missing_ok=True)

    def restoring(self) -> str | None:
        """The checkpoint under the mark."""
        record = read_json(self.path / "restoring.json")
        return record.get("checkpoint") if isinstance(record, dict) else None

    def event_files(self) -> list[Path]:
        """The journals of its writers."""
        try:
            names = sorted(os.listdir(self.path))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [self.path / name for name in names if name.startswith("events.") and name.endswith(".jsonl")]

    def events(self) -> list[dict[str, Any]]:
        """The events of all its writers, in order of time; each has ``attempt`` and ``writer``."""
        merged = [record for path in self.event_files() for record in self._signed(read_journal(path), path)]
        return sorted(merged, key=time_of)

    def _signed(self, records: Iterable[dict[str, Any]], path: Path) -> Iterator[dict[str, Any]]:
        origin = {"attempt": self.number, "writer": path.name.split(".")[1]}
        return (record | origin for record in records)

    def ended(self) -> dict[str, Any] | None:
        """The agent's last word on how the attempt ended, or None: still running, or lost without a word."""
        ends = [r for r in read_journal(self.path / "events.agent.jsonl") if r.get("event") == "attempt_ended"]
        return ends[-1] if ends else None

    def last_step(self) -> dict[str, Any]:
        """The line of its last step, and in ``pace_s`` what a step takes, with all that lies between two.

        Empty before the first.
        """
        steps = filter(is_step, newest_first(self.metrics_path))
        recent = list(itertools.islice(steps, _RECENT_STEPS))
        return recent[0] | {"pace_s": _pace_s(recent)} if recent else {}

    def reached_at(self, step: int) -> float | None:
        """When it had completed so many steps, unix seconds; of a long file only the lines up to there are read."""
        for record in read_journal(self.metrics_path):
            completed = record.get("step")
            if is_step(record) and isinstance(completed, int) and completed >= step:
                return time_of(record)
        return None


def is_step(record: Mapping[str, Any]) -> bool:
    """Whether a line of metrics.jsonl is a step's. Its time always stands there, a loss only where a loop logs one."""
    return record.get("step_s") is not None


def _pace_s(recent: Sequence[dict[str, Any]]) -> Any:
    """Of one step, what that took; of more the mean, from the end of the first to the end of the last."""
    last, first = recent[0], recent[-1]
    seconds = time_of(last) - time_of(first)
    num_steps = last["step"] - first["step"] if {type(last.get("step")), type(first.get("step"))} == {int} else 0
    return seconds / num_steps if num_steps > 0 and seconds > 0 else last["step_s"]


def _mark(path: Path) -> Mark:
    try:
        stat = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat.st_ino, stat.st_mtime_ns


def open_run(name_or_path: str, runs_dir: Path) -> Run:
    """The run of that name, directory name or path.

    Raises:
        RunNotFound: there is none; names those that there are.
    """
    for path in (Path(name_or_path), runs_dir / name_or_path, runs_dir / f"{PREFIX}{name_or_path}"):
        if _is_run(path):
            return Run(path.absolute())
    names = ", ".join(run.name for run in list_runs(runs_dir))
    raise RunNotFound(f"there is no run {name_or_path!r} in {runs_dir.absolute()}; it has: {names or 'none yet'}")


def list_runs(runs_dir: Path) -> list[Run]:
    """All runs in a folder, by name: also those that have lost their config.yaml, or that we may not look into."""
    try:
        names = sorted(n for n in os.listdir(runs_dir) if n.startswith(PREFIX))
    except (FileNotFoundError, NotADirectoryError):
        return []
    folder = runs_dir.absolute()
    return [Run(folder / n) for n in names if _is_run(folder / n)]


def _is_run(path: Path) -> bool:
    if os.path.isfile(os.path.join(path, "config.yaml")):
        return True
    if not path.name.startswith(PREFIX):
        return False
    try:
        return not _PARTS.isdisjoint(os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # another user's: nobody can tell, and whoever reads it is told why
        return True


def create_run(config: Config, runs_dir: Path) -> Run:
    """The run of a config: made, or found if it is there. Called by the orchestrator, which must hold no other.

    An existing run must have the same identity; settings that cannot change the result are taken from ``config``.

    Raises:
        RunConflict: the directory belongs to a config that gives another result; the message shows the difference.
        RunError: the directory cannot be written.
    """
    run = run_of(config, runs_dir)
    try:
        make_directory(run.path)
        if refuse_another_identity(run, config) and run.checked_config() == config:
            return run
        write_text(run.config_path, config.to_yaml())
    except OSError as error:
        raise RunError(f"cannot write {run.path} ({error.strerror}): put the runs where you may write") from error
    return run


def run_of(config: Config, runs_dir: Path) -> Run:
    """Where the run of a config is, or would be."""
    return Run((runs_dir / f"{PREFIX}{config.name}").absolute())


def refuse_another_identity(run: Run, config: Config) -> bool:
    """Whether the run exists; reads only.

    Raises:
        RunConflict: it exists and belongs to a config that gives another result; the message shows the difference.
    """
    from latentwire.tree import differences

    if not run.config_path.exists():
        return False
    changed = differences(run.checked_config().identity(), config.identity())
    if changed:
        raise RunConflict(
            f"{run.path} was made by another config:\n  "
            + "\n  ".join(changed)
            + f"\ngive this one another name (name={config.name}-2), or remove the directory if it is not needed"
        )
    return True
