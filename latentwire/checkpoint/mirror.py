"""The second home: committed checkpoints copied to another disk or an object store, and brought back from there.

::

    <url>/<run's name>/step-00001200.attempt-0003/     the files of step-00001200, manifest.json last

A copy is visible once it has a manifest. Its folder carries the number of the attempt that copied it, so that no
attempt ever writes where another one has: a stale one (given up, still running) that is held up between a look at the
fence and its next write spoils nothing but its own folder. It also looks before it deletes; what it could delete
unnoticed is what the newer attempt would let go too: copies older than a whole one that is there.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from threading import Condition, Thread
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from latentwire.checkpoint import layout, reader
from latentwire.checkpoint.layout import Manifest, step_name
from latentwire.checkpoint.retention import Kept, to_delete
from latentwire.checkpoint.store import Stopped, Store
from latentwire.checkpoint.writer import write_file
from latentwire.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointMismatch,
    CheckpointUnsafe,
    Fenced,
    MirrorError,
)
from latentwire.run.atomic import fsync_directory
from latentwire.tree import differences

if TYPE_CHECKING:
    from latentwire.checkpoint.manager import CheckpointManager

_STUCK_S = 300.0
"""A copy of which no piece has moved for so long is not waited for at the end."""

_FOLDER = re.compile(r"step-(\d{8,})\.attempt-(\d{4,})")


class Copy(NamedTuple):
    """A mirrored checkpoint. Of two of a step the later attempt's is the newer."""

    step: int
    attempt: int
    folder: str
    files: Mapping[str, int]

    def is_whole(self, manifest: Manifest) -> bool:
        """Whether all files are there in their sizes; that takes a listing, the digests would take a download."""
        expected = {name: record.num_bytes for name, record in manifest.files.items()}
        return expected.items() <= self.files.items()


class Mirror:
    """The second home of one run's checkpoints, as seen by one attempt. Used by the CheckpointManager of rank 0.

    Args:
        url: ``file:///folder``, ``s3://bucket/prefix`` or ``gs://bucket/prefix``; must exist.
        name: the run's, a folder under the URL.
        token: the attempt's number.
        fence: raises ``Fenced`` once the attempt is superseded.
        event: called as ``event(name, **fields)``, mostly from the mirror's own thread.
        options: for fsspec.
        keep, best_metric, best_mode: retention.
        threads: files copied side by side.

    Raises:
        ConfigError: the client of that URL is not installed.
    """

    def __init__(
        self,
        url: str,
        name: str,
        *,
        token: int,
        fence: Callable[[], None],
        event: Callable[..., Any],
        options: Mapping[str, Any],
        keep: int = 3,
        best_metric: str | None = None,
        best_mode: Literal["min", "max"] = "min",
        threads: int = 4,
    ) -> None:
        self.url = f"{url.rstrip('/')}/{name}"
        self._token = token
        self._fence = fence
        self._event = event
        self._keep = keep
        self._best_metric = best_metric
        self._best_mode: Literal["min", "max"] = best_mode
        self._store = Store(self.url, options, threads, self._on_chunk)
        self._changed = Condition()
        self._waiting: Path | None = None
        self._copying: Path | None = None
        self._stopping = False
        self._moved_at = 0.0
        self._thread: Thread | None = None

    # --- copying ------------------------------------------------------------------------------------------------------

    def push(self, checkpoint: Path) -> None:
        """Have a verified checkpoint copied in the background, unless it is there; takes the place of one that waits.

        Returns at once. A failure is told by the event ``mirror_failed``; the next checkpoint is the retry.
        """
        with self._changed:
            if self._stopping:
                return
            self._waiting, self._moved_at = checkpoint, time.monotonic()
            self._changed.notify_all()
            if self._thread is None:  # a daemon: to leave must never wait for it
                self._thread = Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()

    def is_copying(self, checkpoint: Path) -> bool:
        """Whether the checkpoint is being read and must stay; thread-safe."""
        return self._copying == checkpoint

    def wait(self, timeout_s: float) -> bool:
        """Block until nothing is being copied or waits to be, or the copy is stuck; False if that took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_idle() or self._is_stuck(), timeout_s)

    def stop(self) -> None:
        """Call off what is being copied, without waiting; the next attempt copies what is missing."""
        if not self._is_idle():
            self._event("mirror_called_off", path=(self._waiting or self._copying or Path()).name)
        self._end()

    def _is_idle(self) -> bool:
        return self._waiting is None and self._copying is None

    def _is_stuck(self) -> bool:
        return time.monotonic() - self._moved_at > _STUCK_S

    def _on_chunk(self) -> None:
        if self._stopping:
            raise Stopped
        self._moved_at = time.monotonic()

    def _end(self) -> None:
        with self._changed:
            self._stopping, self._waiting = True, None
            self._changed.notify_all()

    def _work(self) -> None:
        try:
            while (checkpoint := self._next()) is not None:
                self._copy_and_prune(checkpoint)
        finally:
            self._end()  # after a mistake of ours too: nobody may wait for this thread
            self._done()

    def _next(self) -> Path | None:
        """The checkpoint to copy next, when there is one; None when it is time to end."""
        self._done()
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._stopping)
            self._copying, self._waiting = self._waiting, None
            self._moved_at = time.monotonic()
            return self._copying

    def _done(self) -> None:
        with self._changed:
            self._copying = None
            self._changed.notify_all()

    def _copy_and_prune(self, checkpoint: Path) -> None:
        try:
            manifest = self._copy(checkpoint)
            self._prune(manifest)
        except Stopped:
            return
        except Fenced as fenced:  # the manager meets the same fence and raises
            self._event("mirror_stopped", path=checkpoint.name, reason=str(fenced))
            self._end()
        except (CheckpointError, OSError) as error:
            cure = f"see that {self.url} is there, has space and may be written to; the next checkpoint is the retry"
            self._event("mirror_failed", path=checkpoint.name, error=str(error), cure=cure)
        except Exception as error:  # a mistake of ours, or of the store's client: this thread ends, and not in silence
            cure = "nothing more is copied by this attempt; see stderr.log"
            self._event("mirror_failed", path=checkpoint.name, error=f"{type(error).__name__}: {error}", cure=cure)
            raise

    def _copy(self, checkpoint: Path) -> Manifest:
        started = time.monotonic()
        manifest = reader.read_manifest(checkpoint)
        folders = self._store.folders()
        self._fence()
        measured = [path for path in (checkpoint / layout.VERIFIED,) if path.exists()]
        twin = self._twin(checkpoint, manifest, folders)
        if twin is not None:
            self._store.upload(measured, twin.folder, {})  # perhaps more than when it was copied
            return manifest
        folder = f"{checkpoint.name}.attempt-{self._token:04d}"
        if folder in folders:
            self._store.delete(folder, folders[folder])
        self._event("mirror_started", step=manifest.step, bytes=manifest.num_bytes, to=f"{self.url}/{folder}")
        self._store.upload([checkpoint / name for name in manifest.files], folder, manifest.files)
        self._store.upload([checkpoint / layout.SUMS, *measured], folder, {})
        self._fence()
        self._store.upload([checkpoint / layout.MANIFEST], folder, {})
        seconds = round(time.monotonic() - started, 4)
        self._event("mirror_committed", step=manifest.step, bytes=manifest.num_bytes, seconds=seconds)
        return manifest

    def _twin(self, checkpoint: Path, manifest: Manifest, folders: Mapping[str, Mapping[str, int]]) -> Copy | None:
        """A whole copy of exactly this checkpoint."""
        sums = (checkpoint / layout.SUMS).read_bytes()
        same_step = [copy for copy in _copies(folders) if copy.step == manifest.step and copy.is_whole(manifest)]
        return next((copy for copy in same_step if self._store.read(copy.folder, layout.SUMS) == sums), None)

    # --- retention ----------------------------------------------------------------------------------------------------

    def _prune(self, ours: Manifest) -> None:
        """Delete what retention lets go, and remains of copies that never ended; another run's are left alone."""
        folders = self._store.folders()
        newest: dict[int, Copy] = {}
        kept, unwanted = [], [f for f in folders if _FOLDER.fullmatch(f) and layout.MANIFEST not in folders[f]]
        for copy in _copies(folders):
            manifest, metrics = self._describe(copy)
            if manifest is None or manifest.identity != ours.identity:
                continue
            if copy.step in newest:
                unwanted.append(copy.folder)
                continue
            newest[copy.step] = copy
            kept.append(Kept(copy.step, copy.is_whole(manifest), metrics.get(self._best_metric or "")))
        unwanted += [newest[step].folder for step in to_delete(kept, self._keep, self._best_mode)]
        for folder in unwanted:
            self._fence()
            self._store.delete(folder, folders[folder])
            self._event("mirror_pruned", folder=folder)

    def _describe(self, copy: Copy) -> tuple[Manifest | None, Mapping[str, float]]:
        """What a copy says of itself; of one that cannot be read, nothing."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            try:
                for name in {layout.MANIFEST, layout.SUMS, layout.VERIFIED} & copy.files.keys():
                    (path / name).write_bytes(self._store.read(copy.folder, name))
                return reader.read_manifest(path), reader.read_metrics(path)
            except MirrorError:
                raise
            except CheckpointError as error:
                self._event("mirror_skipped", folder=copy.folder, reason=str(error))
                return None, {}

    # --- bringing back ------------------------------------------------------------------------------------------------

    def bring_back(
        self, manager: CheckpointManager, skip: Collection[str], attempting: Callable[[str], None]
    ) -> Iterator[Path]:
        """Copies committed in the run's own folder, the newest first, each fetched when it is asked for. Blocks.

        One that does not have the bytes of its commit is passed over.

        Args:
            manager: of the folder that they go to.
            skip: names of checkpoints that attempts died of: they come last.
            attempting: called with the name before each is fetched.

        Raises:
            MirrorError: the mirror cannot be read; whether it has a checkpoint is not known.
            CheckpointMismatch: the newest belongs to another config or to other frozen models.
            NoSpace: it would not fit.
        """
        copies = sorted(_copies(self._store.folders()), key=lambda copy: step_name(copy.step) in skip)
        for copy in copies:
            attempting(step_name(copy.step))
            hidden = manager.folder / f"{layout.SAVING_PREFIX}{self._token:04d}-{copy.step:08d}"
            try:
                path = self._commit(copy, hidden, manager)
            except (CheckpointCorrupt, CheckpointUnsafe) as error:
                self._event("mirror_skipped", folder=copy.folder, reason=str(error))
                continue
            finally:
                shutil.rmtree(hidden, ignore_errors=True)
            yield path

    def _commit(self, copy: Copy, hidden: Path, manager: CheckpointManager) -> Path:
        """Fetch one and make it visible as a save does: all of it fsynced under a hidden name, then one rename."""
        started = time.monotonic()
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir()
        for name in (layout.MANIFEST, layout.SUMS):
            write_file(hidden / name, [self._store.read(copy.folder, name)])
        manifest = reader.read_manifest(hidden)
        if manifest.step != copy.step:
            raise CheckpointCorrupt(f"{self.url}/{copy.folder} holds step {manifest.step}")
        self._refuse_another_run(copy, manifest, manager)
        manager.check_space(manifest.num_bytes)
        self._store.download(copy.folder, manifest.files, hidden)
        fsync_directory(hidden)
        self._fence()
        final = manager.folder / step_name(copy.step)
        if final.exists():
            manager.quarantine(final, f"it cannot be read; {self.url}/{copy.folder} takes its place")
        os.rename(hidden, final)
        fsync_directory(manager.folder)
        seconds = round(time.monotonic() - started, 4)
        origin = f"{self.url}/{copy.folder}"
        self._event("mirror_restored", step=copy.step, origin=origin, bytes=manifest.num_bytes, seconds=seconds)
        return final

    def _refuse_another_run(self, copy: Copy, manifest: Manifest, manager: CheckpointManager) -> None:
        changed = differences(dict(manifest.identity), manager.identity)
        if changed:
            raise CheckpointMismatch(
                f"{self.url}/{copy.folder} belongs to another config or other models: {'; '.join(changed)}. Bring back "
                "what the run was started with, give this run another name, or another checkpoint.mirror"
            )


def _copies(folders: Mapping[str, Mapping[str, int]]) -> list[Copy]:
    """The visible copies, newest first."""
    found = [(match, files) for folder, files in folders.items() if (match := _FOLDER.fullmatch(folder))]
    copies = [Copy(int(m[1]), int(m[2]), m[0], files) for m, files in found if layout.MANIFEST in files]
    return sorted(copies, key=lambda copy: (copy.step, copy.attempt), reverse=True)
