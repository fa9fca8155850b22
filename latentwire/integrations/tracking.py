"""The one curve of a run, handed to an experiment tracker (TensorBoard, W&B, MLflow, ...) by accelerate's classes.

A tracker cannot take a step back. Redone steps have the bits of the first time, so each is sent once, whichever attempt
made it; how far that got is kept in ``trackers/<name>.json``, so that a restart goes on from there.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from latentwire.errors import ConfigError, RunBusy
from latentwire.run.atomic import make_directory, read_json, write_json
from latentwire.run.curve import Curve, place_of
from latentwire.run.directory import Run
from latentwire.run.journal import newest_first

_KEEP_EVERY_S = 2.0
_MOST_AT_ONCE = 500
_ASK_AGAIN_S = 0.2
_NOT_SENT = ("step", "time", "attempt")
_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

log = logging.getLogger(__name__)


class Tracking:
    """Sends what is new on the curve to one tracker. Made by :func:`tracking`.

    Args:
        run: whose curve.
        name: of the tracker, as accelerate calls it.

    Attributes:
        num_sent: records that were sent since the start.
    """

    def __init__(self, run: Run, name: str) -> None:
        self._run, self._name = run, name
        self._path = run.path / "trackers" / f"{name}.json"
        kept = read_json(self._path)
        self._kept: dict[str, Any] = {"next": 0, "attempt": 0, "id": uuid.uuid4().hex}
        self._kept |= kept if isinstance(kept, dict) else {}
        if name == "tensorboard":  # the step under way when it was killed may be there already: it is sent again
            self._kept["next"] = self._kept["next"] // 2 * 2
        self._kept_at = time.monotonic()
        self.num_sent = 0
        self._tracker = self._start()
        self._waiting: Iterator[dict[str, Any]] = iter(())
        self._curve = Curve(run)
        self._redone = _Redone(run, self._kept["attempt"])

    def send_new(self) -> bool:
        """Send some of what is waiting; False where nothing is. Blocks for as long as the tracker takes."""
        sent = False
        for record in self._next_records():
            sent = True
            place = place_of(record)
            if place < self._kept["next"]:
                self._redone.check(record, place)
                continue
            when = {"walltime": record.get("time")} if self._name == "tensorboard" else {}
            self._tracker.log(_numbers(record), step=record["step"], **when)
            self.num_sent += 1
            self._kept |= {"next": place + 1, "attempt": record["attempt"]}
        if time.monotonic() - self._kept_at > _KEEP_EVERY_S:
            self._keep()
        return sent

    def close(self) -> None:
        """Let the tracker send the rest and end; blocks until it has."""
        self._tracker.finish()
        self._keep()

    def _next_records(self) -> list[dict[str, Any]]:
        records = list(itertools.islice(self._waiting, _MOST_AT_ONCE))
        if not records:
            self._waiting = iter(self._curve.read()[0])
            records = list(itertools.islice(self._waiting, _MOST_AT_ONCE))
        return records

    def _keep(self) -> None:
        write_json(self._path, self._kept)
        self._kept_at = time.monotonic()

    def _start(self) -> GeneralTracker:
        config = self._run.config()
        options = dict(config.monitor.tracker_options.get(self._name, {}))
        project = options.pop("project", self._run.name)
        kind = LOGGER_TYPE_TO_CLASS[self._name]
        if kind.requires_logging_directory:
            options = {"logging_dir": str(self._path.parent / self._name)} | options
        if self._name == "tensorboard":
            options["purge_step"] = (
                self._kept["next"] // 2
            )  # its readers drop what an earlier process sent from here on
        elif self._name == "wandb":
            described = {"name": config.name, **config.identity()}  # the rest may hold a webhook's URL
            options = {"name": self._run.name, "config": described} | options
            options |= {"id": self._kept["id"], "resume": "allow"}
        elif self._name == "comet_ml":
            options["experiment_key"] = self._kept["id"]
        elif self._name == "mlflow":
            options = {"run_name": self._run.name, "run_id": self._kept.get("run_id")} | options
        tracker = kind(project, **options)
        try:
            tracker.start()
        except ModuleNotFoundError as error:
            raise ConfigError(f"{self._name} needs the package {error.name}: pip install {error.name}") from None
        if self._name == "mlflow":
            self._kept["run_id"] = tracker.tracker.info.run_id  # the server gives it
        self._keep()
        return tracker


@contextmanager
def tracking(run: Run, name: str, give_up: Callable[[], bool] = lambda: True) -> Iterator[Tracking]:
    """A tracker of the run, ended at the end of the block; one process at a time has it.

    Args:
        run: whose curve it is sent.
        name: of the tracker, as accelerate calls it.
        give_up: asked again and again while another process has it; to wait no longer is the default.

    Raises:
        ConfigError: the tracker's package is not installed.
        RunBusy: another process sends the run's curve to this tracker.
    """
    make_directory(run.path / "trackers")
    for variable in _LAUNCHERS:  # accelerate would take this process for one of the ranks
        os.environ.pop(variable, None)
    PartialState(cpu=True)
    with _only_one(run.path / "trackers" / f"{name}.lock", give_up):
        tracker = Tracking(run, name)
        try:
            yield tracker
        finally:
            tracker.close()


class _Redone:
    """Holds steps that are not sent again against what was sent; says once for each attempt that they differ.

    What was sent is looked for in the end of the attempt before, which is where redone steps are.
    """

    def __init__(self, run: Run, attempt: int) -> None:
        self._run, self._attempt = run, attempt
        self._sent: dict[int, Any] = {}

    def check(self, record: dict[str, Any], place: int) -> None:
        number = record["attempt"]
        if number > self._attempt:
            self._attempt = number
            before = [a for a in self._run.attempts() if a.number < number][-1:]
            records = [r for a in before for r in newest_first(a.metrics_path)]
            self._sent = {place_of(r): _loss(r) for r in records}
        sent = self._sent.get(place) if number == self._attempt else None
        if sent is not None and sent != _loss(record):
            what = f"step {record['step']}: {_loss(record)!r} in attempt {number}, {sent!r} was sent"
            log.warning("redone steps have other values than those that were sent, which stand: %s", what)
            self._sent = {}


def _loss(record: dict[str, Any]) -> Any:
    return record.get("loss", record.get("eval/loss"))


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """The figures of a record; NaN and infinities stand in journals as words."""
    figures: dict[str, float] = {}
    for key, value in record.items():
        with suppress(TypeError, ValueError, OverflowError):
            if key not in _NOT_SENT and not isinstance(value, bool):
                figures[key] = float(value)
    return figures


@contextmanager
def _only_one(path: Path, give_up: Callable[[], bool]) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while not _could_lock(descriptor):
            if give_up():
                raise RunBusy(f"another process holds {path}: it sends the curve already, leave it to that one")
            time.sleep(_ASK_AGAIN_S)
        yield
    finally:
        os.close(descriptor)


def _could_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system mounted without locks
    return True
