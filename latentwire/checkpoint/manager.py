"""CheckpointManager: saves in the background, rotates, recovers.

Safety against a second writer (a node that was given up but still runs) rests on two facts. Every attempt has a
number, and a newer attempt, before it chooses what to resume from, removes the hidden folders of all older ones
(``sweep``). A writer looks whether it is still the newest right before its rename (``fence``). So a stale writer either
renamed before the newer attempt chose, and its checkpoint is whole and visible like any other, or finds itself
superseded, or finds its folder gone: in no case does anything appear or vanish behind the newer attempt's back.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import stamina

from latentwire.checkpoint import layout, reader, shares, writer
from latentwire.checkpoint.folder import CheckpointFolder
from latentwire.checkpoint.layout import FileRecord, Manifest, Snapshot, step_name
from latentwire.checkpoint.reader import Loaded, Place
from latentwire.checkpoint.unchanged import Unchanged
from latentwire.checkpoint.writer import Writer
from latentwire.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointTorn,
    CheckpointUnsafe,
    NoUsableCheckpoint,
)
from latentwire.run.atomic import fsync_directory, json_safe, make_directory, read_json, write_json
from latentwire.run.disk import told

if TYPE_CHECKING:
    from latentwire.checkpoint.mirror import Mirror

_FULL = (errno.ENOSPC, errno.EDQUOT)
_MARGIN_S = 2.0
"""Left over of a grace for closing files and the exit."""


class CheckpointManager(CheckpointFolder):
    """The checkpoints of one run, as seen by one attempt on one rank. Used from one thread.

    Every rank saves at the same steps and writes its share of the files; only rank 0 commits, recovers and deletes.

    Args:
        folder: ``runs/<run>/checkpoints``; made if missing.
        token: the attempt's number.
        version: of the program, for the manifest.
        identity: what the checkpoints belong to; compared on restore by the caller.
        fence: raises ``Fenced`` once the attempt is superseded.
        event: called as ``event(name, **fields)`` from the saving thread too.
        rank, world_size: which part is this one's to write.
        keep, best_metric, best_mode: retention.
        shard_bytes, threads: how it is written.
        link_unchanged: give a file that is equal to the last verified checkpoint's a second name instead of writing it;
            one bad byte of it then spoils both.
        max_unchanged: so many saves in a row with the same ``watched`` group raise an alarm.
        watched: the group of tensors that training is to change.
        mirror: where verified checkpoints are copied to, and brought back from.
    """

    def __init__(
        self,
        folder: Path,
        *,
        token: int,
        version: str,
        identity: Mapping[str, Any],
        fence: Callable[[], None],
        event: Callable[..., Any],
        rank: int = 0,
        world_size: int = 1,
        keep: int = 3,
        best_metric: str | None = None,
        best_mode: Literal["min", "max"] = "min",
        shard_bytes: int = 512 << 20,
        threads: int = 8,
        link_unchanged: bool = False,
        max_unchanged: int = 3,
        watched: str = "model",
        mirror: Mirror | None = None,
    ) -> None:
        super().__init__(folder, token, fence, event, keep, best_metric, best_mode)
        self.identity = dict(identity)
        self._version = version
        self._rank = rank
        self._threads = threads
        self._writer = Writer(threads, shard_bytes, link_unchanged, rank, world_size)
        self._unchanged = Unchanged(watched, max_unchanged)
        self._num_saves = 0
        self._leave_by: float | None = None
        self._read_back_s = 0.0
        self._mirror = mirror
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-save")
        self._in_flight: Future[None] | None = None
        self.failure: OSError | CheckpointTorn | None = None
        """Why the last save failed, None if it did not."""
        self._made_room = False
        self.committed_step: int | None = None
        """The step of the newest checkpoint that this attempt committed or restored."""
        self._last_save_s: float | None = None
        self._unreadable: str | None = None

    # --- saving ---------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """A save is under way."""
        return self._in_flight is not None and not self._in_flight.done()

    def save(self, snapshot: Snapshot, may_give_up_older: bool = False) -> None:
        """Begin to write a snapshot in the background; first waits for the save before it, if any. Every rank.

        The snapshot's bytes must not change until ``busy`` is False. A disk error is kept in ``failure`` and told by
        an event; the next save is the retry.

        Args:
            snapshot: of this rank.
            may_give_up_older: where the disk is full the oldest checkpoint goes, one for each save, but never the
                newest verified one nor the best; ``made_room`` tells.

        Raises:
            Fenced, CheckpointError: what the save before this one ran into, other than a disk error.
        """
        self.wait()
        self._num_saves += 1
        self._made_room = False
        hidden = self.folder / f"{layout.SAVING_PREFIX}{self._token:04d}-{snapshot.step:08d}-{self._num_saves:04d}"
        if self._rank == 0:
            self._event("save_started", step=snapshot.step, bytes=snapshot.num_bytes)
        if self._rank == 0:
            self._in_flight = self._saver.submit(self._save, snapshot, hidden, may_give_up_older)
        else:
            self._in_flight = self._saver.submit(self._save_share, snapshot, hidden)

    def share_of(self, snapshot: Snapshot) -> list[tuple[str, str]]:
        """(group, name) of the tensors that this rank writes."""
        return [(file.group, name) for file in self._writer.share(snapshot) for name in file.tensors]

    def leave_by(self, monotonic_s: float) -> None:
        """From now on nothing is read back that would not be done by then; the next attempt makes it good.

        Called when a notice has come, also while a save is under way.
        """
        self._leave_by = monotonic_s

    def wait(self) -> None:
        """Block until no save is under way.

        Raises:
            Fenced, CheckpointError: what the save ran into, other than a disk error.
        """
        if self._in_flight is not None:
            future, self._in_flight = self._in_flight, None
            future.result()

    def made_room(self) -> bool:
        """Block until no save is under way. True on rank 0: it found a full disk and gave up an older checkpoint.

        The next one may fit then. Raises nothing, and leaves what the save ran into to ``wait``.
        """
        if self._in_flight is not None:
            futures.wait([self._in_flight])
        return self._made_room

    def poll(self) -> None:
        """Surface what a finished save ran into, without waiting. Called at every step."""
        if self._in_flight is not None and self._in_flight.done():
            self.wait()

    def take_last_save_s(self) -> float | None:
        """Seconds from the start of the last save to its commit; None where it made none, or was asked for before."""
        seconds = self._last_save_s
        if seconds is not None:  # else the saving thread may be about to set it
            self._last_save_s = None
        return seconds

    def close(self) -> None:
        """Wait for the last save and say if it failed. Called at exit.

        Raises:
            CheckpointError: the last save failed; what was committed before it stands.
        """
        try:
            self.wait()
        finally:
            self._saver.shutdown()
            if self._mirror is not None:
                self._mirror.stop()
        if self.failure is not None:
            raise CheckpointError(
                f"the last checkpoint could not be written: {self._said(self.failure)}; then resume. "
                f"Step {self.committed_step} is the newest committed one"
            ) from self.failure

    def _said(self, failure: OSError | CheckpointTorn) -> str:
        return told(failure, self.folder) if isinstance(failure, OSError) else str(failure)

    def wait_for_mirror(self, timeout_s: float) -> bool:
        """Block until the mirror has what it was given, or could not take it; False if that took too long."""
        return self._mirror is None or self._mirror.wait(timeout_s)

    def _save(self, snapshot: Snapshot, hidden: Path, may_give_up_older: bool) -> None:
        started = time.monotonic()
        final = self.folder / step_name(snapshot.step)
        before = self.committed_step
        try:
            self._fence()
            make_directory(self.folder)  # somebody may have removed it
            self._clear_remains(hidden)
            self._write_and_commit(snapshot, hidden, final)
            seconds = time.monotonic() - started
            self._last_save_s = seconds
            self.committed_step = snapshot.step
            self._event("save_committed", step=snapshot.step, path=final.name, seconds=round(seconds, 4))
            verified = self._read_back(final, seconds)
            self.failure = None
        except CheckpointTorn as error:
            shutil.rmtree(hidden, ignore_errors=True)
            self.failure = error
            self._event("save_torn", step=snapshot.step, error=str(error))
        except OSError as error:
            shutil.rmtree(hidden, ignore_errors=True)
            if not os.path.lexists(final):  # unlike Path.exists it raises nothing on a failing disk
                self.committed_step = before
            self.failure = error
            self._writer.forget()
            said = {"error": told(error, self.folder), "errno": errno.errorcode.get(error.errno or 0)}
            self._event("save_failed", step=snapshot.step, **said)
            if may_give_up_older and error.errno in _FULL:
                self._made_room = self._give_up_oldest()
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise
        else:
            if verified:
                self._push(final)
                self._prune()

    def _clear_remains(self, hidden: Path) -> None:
        """Remove what a rank that came late wrote into the folder of an earlier save, which had been given up."""
        for remains in self.folder.glob(f"{layout.SAVING_PREFIX}{self._token:04d}-*"):
            if remains != hidden:
                shutil.rmtree(remains, ignore_errors=True)

    def _save_share(self, snapshot: Snapshot, hidden: Path) -> None:
        """The part of a rank other than 0. What the disk refuses is told to rank 0, which has the say."""
        try:
            self._fence()
            hidden.mkdir(exist_ok=True)
            shares.tell_written(hidden, self._rank, self._writer.write_share(hidden, snapshot))
            self.failure = None
        except (OSError, CheckpointTorn) as error:
            self.failure = error
            self._event("share_failed", step=snapshot.step, error=self._said(error))
            with contextlib.suppress(OSError):  # where the disk refuses this too, rank 0 learns it from the clock
                for file in self._writer.share(snapshot):  # makes room on a full disk
                    (hidden / file.name).unlink(missing_ok=True)
                shares.tell_failed(hidden, self._rank, error)

    def _write_and_commit(self, snapshot: Snapshot, hidden: Path, final: Path) -> None:
        try:
            hidden.mkdir(exist_ok=True)  # another rank may have been faster
            self._write(snapshot, hidden)
        except FileNotFoundError as error:  # a newer attempt swept our folder away
            self._fence()
            raise error
        self._fence()
        if final.exists() and not self._replaceable(final):
            fsync_directory(self.folder)  # whoever renamed it may have died before this
            self._writer.forget()  # that one may hold other bytes than ours
            shutil.rmtree(hidden)
            return
        try:
            os.rename(hidden, final)
        except FileNotFoundError as error:
            self._fence()
            raise error
        fsync_directory(self.folder)

    def _write(self, snapshot: Snapshot, hidden: Path) -> None:
        files = self._writer.write_all(hidden, snapshot, self._fence)
        files[layout.STATE] = writer.write_state(hidden, snapshot)
        manifest = self._manifest(snapshot, files)
        writer.seal(hidden, manifest)
        alarm = self._unchanged.seen(manifest)
        if alarm is not None:
            self._event("weights_unchanged", step=snapshot.step, **alarm)

    def _manifest(self, snapshot: Snapshot, files: Mapping[str, FileRecord]) -> Manifest:
        plan = self._writer.plan(snapshot)
        groups = {group: tuple(f.name for f in plan if f.group == group) for group in sorted(snapshot.tensors)}
        return Manifest(
            step=snapshot.step,
            attempt=self._token,
            created=time.time(),
            version=self._version,
            identity=self.identity,
            metrics=dict(snapshot.metrics),
            groups=groups,
            files=files,
        )

    def _replaceable(self, final: Path) -> bool:
        """Whether the checkpoint that already has this name is bad; then it is moved away."""
        try:
            reader.verify(final, self._threads)
        except (CheckpointCorrupt, CheckpointUnsafe) as error:
            self.quarantine(final, str(error))
            return True
        return False

    def _read_back(self, path: Path, save_s: float) -> bool:
        """Verify what was just committed; False if a notice leaves no time for it."""
        started = time.monotonic()
        expected_end = started + (self._read_back_s or save_s)
        try:
            reader.verify(
                path,
                self._threads,
                lambda: self._leave_by is None or max(expected_end, time.monotonic()) < self._leave_by - _MARGIN_S,
            )
        except reader.Interrupted:
            self._event("read_back_skipped", step=layout.parse_step_name(path.name), path=path.name)
            return False
        except (CheckpointCorrupt, CheckpointUnsafe) as error:
            self.quarantine(path, str(error))
            raise OSError(
                errno.EIO, f"the disk gave back other bytes than were written ({error})", str(path)
            ) from error
        self._read_back_s = time.monotonic() - started
        self._writer.may_link_to(path)
        self._try_to_mark(path, self._read_back_s)
        return True

    def _try_to_mark(self, path: Path, seconds: float) -> None:
        """A full disk costs the mark, and not what is whole without it."""
        try:
            self.mark_verified(path, seconds)
        except OSError as error:
            self._event("mark_failed", path=path.name, error=told(error, path))

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add what was measured with a committed checkpoint's weights only after its commit, in verified.json.

        So an evaluation that a notice interrupted still makes the checkpoint of that step the best one.
        """
        self.wait()
        path = self.folder / step_name(step) / layout.VERIFIED
        try:
            record = read_json(path)
            if isinstance(record, dict):
                self._fence()
                write_json(path, record | {"metrics": json_safe(metrics)})
                self._push(path.parent)
        except OSError as error:  # retention knows less; training goes on
            self._event("mark_failed", path=path.parent.name, error=told(error, path))

    def _push(self, path: Path) -> None:
        if self._mirror is not None:
            self._mirror.push(path)

    def _prune(self) -> None:
        """Delete what retention lets go."""
        self._delete_old(keep=None, most=None)

    def _give_up_oldest(self) -> bool:
        """Delete one checkpoint more than retention lets go; False where none can be spared."""
        given_up = self._delete_old(keep=1, most=1)
        for path in given_up:
            self._event("checkpoint_given_up", step=layout.parse_step_name(path.name))
        return bool(given_up)

    def _delete_old(self, keep: int | None, most: int | None) -> list[Path]:
        """Delete what may go and no copy to the mirror needs; a disk that refuses is told of, and asked again later."""
        gone: list[Path] = []
        try:
            free = (p for p in self.expendable(keep) if self._mirror is None or not self._mirror.is_copying(p))
            for path in itertools.islice(free, most):
                self.delete(path)
                gone.append(path)
        except OSError as error:
            self._event("prune_failed", error=told(error, self.folder))
        return gone

    # --- recovering -----------------------------------------------------------------------------------------------

    def restore(
        self,
        skip: Collection[str] = (),
        attempting: Callable[[str], None] = lambda name: None,
        place: Place = reader.in_host_memory,
        max_bytes: int | None = None,
    ) -> Loaded | None:
        """Load the newest checkpoint that is whole; None where the run has never committed one. Blocks.

        What does not verify is moved to quarantine and the next older one is taken; where none is left, the mirror's.

        Args:
            skip: names of checkpoints that earlier attempts died of: taken only where no other can be used.
            attempting: called with the name before each is read.
            place: where the tensors are to be; half overwritten where this raises.
            max_bytes: what claims more is moved to quarantine unread.

        Raises:
            NoUsableCheckpoint: there are checkpoints and none can be used. Never starts over in silence.
            CheckpointTooNew: the newest was written by a newer program.
            MirrorError, CheckpointMismatch: the mirror was needed; it cannot be read, or has another run's checkpoints.
        """
        self._unreadable = None
        candidates = self.committed()
        skipped = [path for path in candidates if path.name in skip]
        for path in skipped:
            self._event("checkpoint_skipped", path=path.name, reason="two attempts died while loading it")
        rest = [path for path in candidates if path not in skipped]
        for path in [*reversed(rest), *reversed(skipped)]:  # the suspicious ones only where nothing else is left
            attempting(path.name)
            loaded = self._load(path, place, max_bytes)
            if loaded is not None:
                return self._go_on_from(loaded)
        for path in () if self._mirror is None else self._mirror.bring_back(self, skip, attempting):
            loaded = self._load(path, place, max_bytes)
            if loaded is not None:
                return self._go_on_from(loaded)
        quarantined = self.quarantined()
        if self._unreadable is not None:
            raise NoUsableCheckpoint(
                f"{self.folder} has {len(candidates)} checkpoints and the disk lets none be read: {self._unreadable}. "
                "Then resume; remove nothing"
            )
        if candidates or quarantined:
            raise NoUsableCheckpoint(
                f"{self.homes} has {len(self.committed())} checkpoints and {len(quarantined)} in quarantine, and none "
                "can be used; the reasons are in `latentwire events`. Put a good copy of one back, or, to begin again "
                f"at step 0, remove the whole run: {self._whole_run}"
            )
        return None

    def load_chosen(self, step: int, place: Place) -> Loaded:
        """Load what rank 0 chose. Called on the other ranks; blocks.

        Raises:
            OSError: this node cannot read what rank 0 read whole. The checkpoint is not to blame: the attempt is.
        """
        path = self.folder / step_name(step)
        again = stamina.retry_context(on=(OSError, CheckpointCorrupt), attempts=3, wait_initial=0.2, wait_max=2.0)
        try:
            for retry in again:
                with retry:
                    loaded = reader.load(path, self._threads, place)
        except CheckpointCorrupt as error:
            raise OSError(errno.EIO, f"rank 0 read it whole, and this rank cannot ({error})", str(path)) from error
        self.committed_step = step
        return loaded

    @property
    def homes(self) -> str:
        """Where checkpoints may be, in words."""
        return str(self.folder) if self._mirror is None else f"{self.folder} (with its mirror {self._mirror.url})"

    @property
    def _whole_run(self) -> str:
        run = str(self.folder.parent)
        return run if self._mirror is None else f"{run} and {self._mirror.url}"

    def _go_on_from(self, loaded: Loaded) -> Loaded:
        self.committed_step = loaded.manifest.step
        self._push(loaded.path)  # the attempt before may have had no time to
        return loaded

    def _load(self, path: Path, place: Place, max_bytes: int | None) -> Loaded | None:
        started = time.monotonic()
        try:
            for retry in stamina.retry_context(on=OSError, attempts=3, wait_initial=0.2, wait_max=2.0):
                with retry:
                    loaded = reader.load(path, self._threads, place, max_bytes)
        except (CheckpointCorrupt, CheckpointUnsafe) as error:
            self.quarantine(path, str(error))
            return None
        except OSError as error:
            self._unreadable = told(error, path)
            self._event("checkpoint_unreadable", path=path.name, error=self._unreadable)
            return None
        if not reader.is_verified(path):
            self._try_to_mark(path, time.monotonic() - started)
        return loaded

    def group_sha256(self, group: str) -> str | None:
        """SHA-256 of a group's tensors in the newest checkpoint that this attempt committed or restored."""
        if self.committed_step is None:
            return None
        return reader.read_manifest(self.folder / step_name(self.committed_step)).group_sha256(group)
