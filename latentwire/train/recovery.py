"""Finding what an attempt goes on from: the newest checkpoint that is whole and belongs to the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import psutil

from latentwire import __version__
from latentwire.checkpoint.manager import CheckpointManager
from latentwire.checkpoint.mirror import Mirror
from latentwire.checkpoint.reader import Loaded, Place
from latentwire.config import CheckpointSection, Config
from latentwire.errors import CheckpointMismatch, NoUsableCheckpoint
from latentwire.run.budget import committed_step
from latentwire.run.directory import Attempt, Run
from latentwire.train.ranks import Ranks
from latentwire.tree import differences


def make_manager(
    run: Run,
    attempt: Attempt,
    config: Config,
    ranks: Ranks,
    frozen_digests: Mapping[str, str],
    event: Callable[..., Any],
) -> CheckpointManager:
    """The attempt's manager, as the config's ``checkpoint`` section says. Touches the disk only to make its folder."""
    section = config.checkpoint
    return CheckpointManager(
        run.checkpoints,
        token=attempt.number,
        version=__version__,
        identity={"config": config.digest(), "frozen": dict(frozen_digests)},
        fence=attempt.assert_newest,
        event=event,
        rank=ranks.rank,
        world_size=ranks.world_size,
        keep=section.keep,
        best_metric=section.best_metric,
        best_mode=section.best_mode,
        shard_bytes=section.shard_mb << 20,
        threads=section.threads,
        link_unchanged=section.link_unchanged,
        max_unchanged=section.max_unchanged,
        mirror=_make_mirror(run, attempt, section, event) if ranks.rank == 0 else None,
    )


def _make_mirror(run: Run, attempt: Attempt, section: CheckpointSection, event: Callable[..., Any]) -> Mirror | None:
    if section.mirror is None:
        return None
    return Mirror(
        section.mirror,
        run.name,
        token=attempt.number,
        fence=attempt.assert_newest,
        event=event,
        options=section.mirror_options,
        keep=section.mirror_keep,
        best_metric=section.best_metric,
        best_mode=section.best_mode,
        threads=section.threads,
    )


def load_newest(
    manager: CheckpointManager, run: Run, attempt: Attempt, ranks: Ranks, place: Place, state_bytes: int
) -> Loaded | None:
    """The checkpoint to go on from, the same on every rank; None for a run that never committed. Collective; blocks.

    Args:
        manager: of this attempt.
        run: of this attempt.
        attempt: this one.
        ranks: all of them, of which 0 chooses.
        place: where the tensors belong.
        state_bytes: of the tracked tensors, of which an optimizer may not have all yet.

    Raises:
        NoUsableCheckpoint: there was one, and none can be used or all were removed.
        MirrorError: none is left here and the mirror cannot be read.
        CheckpointMismatch: it belongs to another config or to other frozen models.
        CheckpointTooNew: it was written by a newer program.
    """
    loaded = None
    if ranks.rank == 0:
        most = _most_bytes(state_bytes)
        loaded = manager.restore(run.deadly_checkpoints(), attempt.mark_restoring, place, most)
        _refuse_to_begin_again(manager, run, loaded)
    step = int(ranks.highest([-1.0 if loaded is None else float(loaded.manifest.step)])[0])
    if loaded is None and step >= 0:
        loaded = manager.load_chosen(step, place)
    if loaded is not None:
        _check_identity(manager, loaded)
    return loaded


def _most_bytes(state_bytes: int) -> int:
    """What no checkpoint of the run exceeds: far more than any optimizer adds, and what fits here cannot do harm."""
    return max(16 * state_bytes, psutil.virtual_memory().total)


def _refuse_to_begin_again(manager: CheckpointManager, run: Run, loaded: Loaded | None) -> None:
    """Earlier attempts committed and nothing is left: somebody removed the checkpoints, perhaps not on purpose."""
    committed = max((committed_step(attempt) for attempt in run.attempts()), default=0)
    if loaded is None and committed:
        raise NoUsableCheckpoint(
            f"step {committed} was committed and {manager.homes} is empty: put the checkpoints back, or, to begin "
            f"again at step 0, remove {run.path}"
        )


def _check_identity(manager: CheckpointManager, loaded: Loaded) -> None:
    for key, ours in manager.identity.items():
        theirs = loaded.manifest.identity.get(key)
        if theirs != ours:
            changed = "; ".join(differences(theirs, ours, f"{key}."))
            raise CheckpointMismatch(
                f"{manager.folder} was written with another {key}: {changed}. Bring back what the run was started "
                "with, or start a run of another name"
            )
