"""Session: what makes any PyTorch loop survive preemption. The built-in loop is its first user.

::

    with latentwire.Session("runs/experiment_mine", seed=7) as session:
        model, optimizer = ...
        session.track(model=model, optimizer=optimizer)
        for batch in session.batches(data, batch_size=32, steps=1000):
            loss = ...
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            session.log(loss=loss)

The program is started again after a preemption and goes on where it was; nothing in the loop changes.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from latentwire.checkpoint.reader import Loaded
from latentwire.config import Config
from latentwire.errors import CheckpointError, LatentWireError, RunError
from latentwire.preemption.deadline import Pace, deadline, step_fits
from latentwire.preemption.handler import Preempted, PreemptionHandler
from latentwire.run.budget import History
from latentwire.run.directory import Attempt, Run
from latentwire.run.disk import complain
from latentwire.run.journal import Journal
from latentwire.train import data as data_module
from latentwire.train import randomness, recovery
from latentwire.train.feed import Data, Feeds
from latentwire.train.order import derive_seed
from latentwire.train.outlook import Outlook
from latentwire.train.progress import Progress
from latentwire.train.ranks import Ranks
from latentwire.train.saving import REASONS, Saving
from latentwire.train.script import Script
from latentwire.train.share import Share
from latentwire.train.state import Stateful, TrainingState

_OURS = ("step", "time", *(f"{clock}_s" for clock in ("step", "data", "forward_backward", "reduction", "optimizer")))
_OURS += ("save_s", "deaf_s")
"""Figures of a step's line in metrics.jsonl that the session measures itself."""


class Session:
    """One attempt's training, on one rank. Use as a context manager, from the main thread.

    Args:
        path: the run's directory, ``runs/experiment_<name>``; made if missing.
        seed: all generators start from it, also those that initialise a model after this call.
        settings: sections of the config by name, for example ``checkpoint={"interval_s": 60}``.

    Raises:
        ConfigError: the settings are wrong.
        RunConflict: the directory belongs to another seed.
        RunBusy: the same script is already running on this host.
    """

    def __init__(self, path: str | Path, seed: int = 0, **settings: Mapping[str, Any]) -> None:
        self._script: Script | None = (script := Script(Path(path).absolute(), seed, settings))
        ranks = Ranks(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        journal = Journal(script.attempt.path / "events.rank0.jsonl")
        self._start(script.run, script.attempt, script.config, script.handler, ranks, journal)

    @classmethod
    def attach(
        cls, run: Run, attempt: Attempt, config: Config, handler: PreemptionHandler, ranks: Ranks, journal: Journal
    ) -> Session:
        """The session of a rank that an agent started: attempt, handlers and journal are there already."""
        session = cls.__new__(cls)
        session._script = None
        session._start(run, attempt, config, handler, ranks, journal)
        return session

    def _start(
        self, run: Run, attempt: Attempt, config: Config, handler: PreemptionHandler, ranks: Ranks, journal: Journal
    ) -> None:
        self.run = run
        self.attempt = attempt
        self.config = config
        self.ranks = ranks
        randomness.seed_everything(derive_seed(config.seed, "session"))  # for what the user makes: weights, data
        self.step = 0
        """Completed optimizer steps."""
        self.frozen_digests: dict[str, str] = {}
        """SHA-256 of frozen models by name; set it before ``restore``."""
        self._progress = Progress(config.checkpoint)
        self.step_pace = Pace()
        self._handler = handler
        self._state = TrainingState()
        self._journal = journal
        self._metrics = Journal(attempt.metrics_path) if ranks.rank == 0 else None
        self._saving: Saving | None = None
        self._shares: list[Share] = []
        self._feeds = Feeds(config, ranks)
        self._outlook = Outlook(attempt, config, self.event)
        self._is_looping = False
        self._left_with: tuple[int, ...] | None = None
        """Versions of what is tracked when the loop was left."""
        self._in_step = False
        self._told_notice = False
        self._step_started = 0.0
        self._clocks: dict[str, float] = {}
        self._record: dict[str, Any] = {}

    # --- set up -----------------------------------------------------------------------------------------------------

    def track(self, **objects: Stateful) -> None:
        """Name what belongs to the state: modules, optimizers, schedulers, anything with a state_dict.

        Raises:
            RunError: a name that cannot be one, an object without state_dict, or training has begun.
        """
        if self._saving is not None:
            raise RunError(f"track {', '.join(objects)} before the first batch: what is restored must be known by then")
        for name, stateful in objects.items():
            self._state.track(name, stateful)

    def restore(self) -> int:
        """Load the newest usable checkpoint into the tracked objects; returns completed steps. Blocks. Every rank.

        Called by ``steps`` and ``batches`` if it was not before.

        Raises:
            NoUsableCheckpoint, CheckpointMismatch, NoSpace: see there. Nothing was changed on disk.
            RunError: nothing is tracked.
        """
        assert self._saving is None, "restore() once, before the first step"
        self._state.refuse_nothing()
        started = time.monotonic()
        manager = recovery.make_manager(
            self.run, self.attempt, self.config, self.ranks, self.frozen_digests, self.event
        )
        if self.ranks.rank == 0:
            manager.sweep()
        self.ranks.highest([0.0])  # no rank reads before rank 0 has cleaned up
        try:
            place, num_bytes = self._state.place(), self._state.num_bytes()
            loaded = recovery.load_newest(manager, self.run, self.attempt, self.ranks, place, num_bytes)
            if loaded is not None:
                self._take_over(loaded)
            # a fresh optimizer has no state yet: AdamW will have twice the parameters
            num_bytes = self._state.num_bytes() * (3 if loaded is None else 1)
            if self.ranks.rank == 0:
                manager.check_space(num_bytes)
        except LatentWireError:
            self.attempt.unmark_restoring()  # refused, and not died of
            raise
        self.ranks.highest([0.0])  # all have loaded
        self.attempt.unmark_restoring()
        is_auto = self.config.checkpoint.interval_s == "auto"  # else nobody asks, and it reads every journal
        history = History.before(self.run, self.attempt) if is_auto else History(0.0, 0)
        self._saving = Saving(manager, self._state, self.config.checkpoint, self.ranks, history, self.event)
        self._saving.reserve(num_bytes)
        self._saving.remember_boundary()
        self.event("restored", step=self.step, seconds=round(time.monotonic() - started, 4))
        return self.step

    # --- the loop -----------------------------------------------------------------------------------------------------

    def batches(
        self,
        data: Data,
        *,
        batch_size: int,
        steps: int,
        collate: Callable[[list[Any]], Any] | None = None,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        evaluate_every: int | None = None,
    ) -> Iterator[Any]:
        """One batch for each step that is still to be done, in the run's own order; see ``steps``. For one rank.

        Args:
            data: map-style data set, or a stream (``ShardedSource``).
            batch_size: samples of one step over all ranks.
            steps: optimizer steps in all.
            collate: samples -> batch; None: torch's default.
            evaluate: see ``steps``.
            evaluate_every: see ``steps``.

        Raises:
            RunError: there are several ranks, which would each train on their own.
        """
        if self.ranks.world_size > 1:
            raise RunError("batches() is for one rank: use share(), which sums gradients up over all of them")
        if self._saving is None:
            self.restore()
        self._settle_step()
        batches = self._feeds.add(data, batch_size, batch_size, collate).batches(self.step)
        for step in self.steps(steps, evaluate, evaluate_every):
            with self.clock("data"):
                batch = next(batches)
            randomness.seed_everything(derive_seed(self.config.seed, "step", step, 0))
            self.counters["samples"] += batch_size  # a step that is dropped takes it back
            yield batch

    def share(
        self,
        parameters: Iterable[torch.nn.Parameter],
        data: Data,
        *,
        global_batch: int,
        micro_batch: int,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> Share:
        """This rank's part of each step, for a loop that gives the same bits on any number of GPUs; see ``Share``.

        ::

            share = session.share(model.parameters(), data, global_batch=64, micro_batch=8)
            for step in session.steps(1000):
                for batch in share:
                    share.backward(loss_of(model, batch))
                share.reduce()
                optimizer.step()
                optimizer.zero_grad()

        Args:
            parameters: the trained ones, on one device.
            data: map-style data set, or a stream (``ShardedSource``).
            global_batch: samples of one step over all ranks.
            micro_batch: samples of one forward pass; divides the global batch. Bits depend on it.
            collate: samples -> batch; None: torch's default.
        """
        share = Share(self, parameters, self._feeds.add(data, global_batch, micro_batch, collate))
        self._shares.append(share)
        return share

    def fetch(
        self,
        data: Sequence[Any],
        addresses: Iterator[list[data_module.Address]],
        collate: Callable[[list[Any]], Any] | None,
    ) -> Iterator[Any]:
        """Batches of the samples at these addresses, fetched as the config's ``data`` section says."""
        section = self.config.data
        return data_module.fetch(data, self.config.seed, addresses, collate, section.workers, section.prefetch)

    def steps(
        self,
        total: int,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        evaluate_every: int | None = None,
    ) -> Iterator[int]:
        """Number each step that is still to be done; between steps save, evaluate and act on notices. Every rank.

        Args:
            total: optimizer steps in all.
            evaluate: returns metrics; called after every ``evaluate_every`` steps and after the last, again if it was
                interrupted. Call ``safe_point`` in it now and then. It must not change tracked objects.
            evaluate_every: steps between evaluations.

        Raises:
            Preempted: the state is on disk; let it pass.
            RunError: nothing is tracked, an optimizer makes steps that is not, or ``total`` is no number of steps.
        """
        if not isinstance(total, int | numpy.integer) or total < 0:
            raise RunError(f"steps is {total!r}: give how many optimizer steps the run has in all, a whole number")
        if self._saving is None:
            self.restore()
        self._settle_step()
        self.event("training_started", step=self.step, total_steps=total)
        looking = register_optimizer_step_post_hook(self._state.refuse_untracked)
        self._is_looping, self._left_with = True, None
        try:
            while True:
                self._evaluate_if_due(total, evaluate, evaluate_every)
                self._act_at_boundary(last=self.step >= total)
                if self.step >= total:
                    break
                self._begin_step()
                yield self.step
                self._end_step()
        except GeneratorExit:  # by ``break``, or because an error unwinds: ``end`` is called after the first only
            self._left_with = self._state.versions()
            raise
        finally:
            looking.remove()
            for share in self._shares:
                share.close()
        self._finish()

    def end(self) -> None:
        """Save where the program left its loop early, by ``break``. Called when it ended without an error; every rank.

        Raises:
            RunError: what is tracked has been changed since then.
            Preempted: while the disk refused.
        """
        if not self._is_looping:
            return
        changed = self._left_with not in (None, self._state.versions())
        self._settle_step()
        if self.ranks.highest([float(changed)])[0]:
            raise RunError(
                f"the loop was left after step {self.step}, and what is tracked has been changed since: that step "
                "cannot be saved any more. Change a copy instead (copy.deepcopy), or let the loop end by itself"
            )
        self._act_at_boundary(last=True)
        self._finish()

    def _settle_step(self) -> None:
        """Of a loop that was left in the midst of a step: it counts if it has changed the state."""
        if self._in_step and not self.saving.is_boundary_intact():
            self._end_step()
        self._in_step = False

    def _finish(self) -> None:
        self.saving.finish(lambda: self._save("last"), self.safe_point)
        sha256 = self.saving.manager.group_sha256("model") if self.ranks.rank == 0 else None
        self.event("training_finished", step=self.step, weights_sha256=sha256)
        self._is_looping = False

    def safe_point(self) -> None:
        """Leave here if the machine is about to be taken away and the step does not fit any more. Every rank together.

        Call it between micro-batches (before ``optimizer.step()``), in evaluation, and before anything long.

        Raises:
            Preempted: the last completed step is on disk; let it pass.
        """
        self._outlook.safe_point()
        noticed = self._handler.notice is not None
        unfit = noticed and not (self._in_step and self._step_still_fits())
        leave_now = self._handler.leave_now
        noticed_anywhere, unfit_anywhere, now_anywhere = self.ranks.highest(
            [float(noticed), float(unfit), float(leave_now)]
        )
        if now_anywhere or (noticed_anywhere and (unfit_anywhere or not self._in_step)):
            self._leave(without_saving=bool(now_anywhere))

    def log(self, **metrics: float | torch.Tensor) -> None:
        """Add figures to this step's line in metrics.jsonl. Waits for the device if a tensor is given.

        Raises:
            RunError: a value that is no number, or a name that the session gives to figures of its own.
        """
        for name, value in metrics.items():
            if name in _OURS:
                raise RunError(f"log({name}=...): {', '.join(_OURS)} are measured by the session; take another name")
            if isinstance(value, torch.Tensor) and value.numel() != 1:
                raise RunError(f"log({name}=...): a tensor of shape {tuple(value.shape)} is no single number")
            try:
                self._record[name] = float(value.detach() if isinstance(value, torch.Tensor) else value)
            except (TypeError, ValueError, OverflowError) as error:
                raise RunError(f"log({name}=...): {value!r} is no number that fits a float") from error

    def seconds_in_step(self) -> float:
        """Seconds since the present step began."""
        return time.monotonic() - self._step_started

    def event(self, name: str, /, **fields: Any) -> None:
        """Add a line to this rank's journal."""
        self._journal.event(name, **fields)

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Add the seconds inside to ``<name>_s`` of this step's line."""
        started = time.monotonic()
        self.ranks.standing.place = name
        try:
            yield
        finally:
            self.ranks.standing.place = None
            self._clocks[name] = self._clocks.get(name, 0.0) + time.monotonic() - started

    @property
    def counters(self) -> dict[str, float]:
        """Totals over the whole run: samples, tokens, skipped steps; saved and restored."""
        return self._progress.counters

    @property
    def device(self) -> torch.device:
        """Where this rank computes, and where what it trains belongs."""
        return self.ranks.device

    @property
    def saving(self) -> Saving:
        """The saves of this attempt; there from ``restore`` on."""
        assert self._saving is not None, "restore() comes first"
        return self._saving

    # --- inside -------------------------------------------------------------------------------------------------------

    def _take_over(self, loaded: Loaded) -> None:
        randomness.restore(self._state.apply(loaded))
        progress = loaded.values["progress"]
        self.step = int(loaded.values["step"])
        self._progress.resume(progress)
        self._feeds.resume(progress)

    def _begin_step(self) -> None:
        self.saving.remember_boundary()
        self._progress.begin_step()
        self._in_step = True
        self._step_started = time.monotonic()
        self._outlook.step_begins()
        self._record, self._clocks = {}, {"save": self._clocks.get("save", 0.0)}

    def _end_step(self) -> None:
        seconds = self.seconds_in_step()
        self._in_step = False
        self.step += 1
        self.step_pace.add(seconds)
        self._clocks["deaf"] = self._outlook.step_ended(seconds)
        self.saving.remember_boundary()
        if self._metrics is not None:
            timings = {f"{name}_s": round(s, 6) for name, s in self._clocks.items()}
            self._metrics.record(step=self.step, **self._record, step_s=round(seconds, 6), **timings)
        self._clocks = {}

    def _evaluate_if_due(
        self, total: int, evaluate: Callable[[], Mapping[str, float]] | None, every: int | None
    ) -> None:
        due = every is not None and self.step > 0 and (self.step % every == 0 or self.step == total)
        if evaluate is None or not due or self._progress.is_evaluated(self.step):
            return
        self.event("evaluation_started", step=self.step)
        started = time.monotonic()
        with randomness.isolated(derive_seed(self.config.seed, "evaluation")):
            metrics = {name: float(value) for name, value in evaluate().items()}
        is_best = self._progress.evaluated(self.step, metrics)
        self.event("evaluation_finished", step=self.step, seconds=round(time.monotonic() - started, 4), **metrics)
        if self._metrics is not None:
            self._metrics.record(step=self.step, **metrics)
        if is_best:
            self.saving.new_best()

    def _act_at_boundary(self, last: bool) -> None:
        saving = self.saving
        saving.poll()
        if self.ranks.rank == 0:
            self._outlook.update(saving.pace)
        reason = saving.reason(self.step, last, self._handler.take_save_request())
        is_saved = self.ranks.rank == 0 and saving.manager.committed_step == self.step
        flags = [self._handler.notice is not None, self._handler.leave_now, reason, is_saved]
        noticed, leave_now, agreed, saved = self.ranks.highest([float(flag) for flag in flags])
        if (noticed or leave_now) and not last:
            self._leave(without_saving=bool(leave_now))
        if agreed and not saved:
            self._save(REASONS[int(agreed)])
        elif agreed and self._progress.is_evaluated(self.step) and self.ranks.rank == 0:
            # its commit came first: a notice cut in
            saving.manager.add_metrics(self.step, self._progress.evaluation_of(self.step))

    def _save(self, reason: str) -> None:
        values = {"step": self.step, "progress": self._progress.values(self._in_step) | self._feeds.progress(self.step)}
        with self.clock("save"):
            self.saving.save(self.step, reason, values, self._progress.evaluation_of(self.step))

    def _step_still_fits(self) -> bool:
        left = max(0.0, self.step_pace.p95 - self.seconds_in_step())
        return step_fits(time.monotonic(), self._notice_deadline(), left, self.saving.pace.p95)

    def _notice_deadline(self) -> float:
        notice = self._handler.notice
        assert notice is not None
        end_unix_s = self.attempt.end_unix_s()  # the agent asks the scheduler; until it answers the grace counts
        when = deadline(notice, self.config.preemption.grace_s, os.environ, end_unix_s)
        if not self._told_notice:
            self._told_notice = True
            left = round(when - time.monotonic(), 3)
            self.event("draining", signal=notice.signal, received=round(notice.unix_s, 3), deadline_in_s=left)
        return when

    def _leave(self, without_saving: bool) -> None:
        """Save the last boundary if it is not on disk yet, then go. Every rank."""
        if self._handler.notice is not None:
            self._notice_deadline()
        self.attempt.unmark_restoring()
        if self._saving is None or without_saving:
            self.event("left", step=None, dropped_partial_step=False, saved=False)
            raise Preempted(None)
        started = time.monotonic()
        manager = self._saving.manager
        left_s = self._notice_deadline() - time.monotonic() if self._handler.notice is not None else math.inf
        manager.leave_by(time.monotonic() - self.ranks.highest([-left_s])[0])  # one rank's notice is everybody's
        manager.wait()
        is_missing = self.ranks.rank == 0 and self.step > 0 and manager.committed_step != self.step
        missing, broken = self.ranks.highest([float(is_missing), float(not self._saving.is_boundary_intact())])
        if missing:
            if not broken:
                self._save("notice")
                self._saving.save_where_room_was_made(lambda: self._save("notice"))
            else:  # the loop has begun to change the state: what is in memory is no step's state
                self.event("partial_step_not_saved", step=self.step)
        unsaved = None
        try:
            manager.close()
        except CheckpointError as error:  # to be preempted is no failure: the next attempt goes on from the last commit
            unsaved = str(error)
            complain(f"latentwire: left at step {self.step} without saving it: {error}")
            self.event("left_unsaved", step=self.step, error=unsaved)
        self.event(
            "left",
            step=manager.committed_step,
            dropped_partial_step=self._in_step,
            saved=unsaved is None,
            seconds=round(time.monotonic() - started, 4),
        )
        raise Preempted(manager.committed_step, unsaved)

    # --- as a context manager, in a user's own script -----------------------------------------------------------------

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None and self._saving is not None:
                self.end()
                self._saving.manager.close()
        except BaseException as failed:
            error = failed
            raise
        finally:
            if self._script is not None:
                self._script.end(error, self.step)
