"""Every error that LatentWire raises for a user.

    LatentWireError
    ├── ConfigError            a config file, key, value or override is wrong
    ├── RunError               a run directory cannot be used as asked
    │   ├── RunNotFound        no such run
    │   ├── RunConflict        the directory belongs to another config
    │   └── RunBusy            another orchestrator or attempt holds the run
    ├── Fenced                 a newer attempt of the run exists; this one may commit nothing
    ├── CheckpointError        a checkpoint cannot be written or read
    │   ├── CheckpointCorrupt  its bytes are not those that were committed
    │   ├── CheckpointUnsafe   its manifest points outside its own folder
    │   ├── CheckpointTorn     its bytes are not those of one step
    │   ├── CheckpointTooNew   its format is newer than this program
    │   ├── CheckpointMismatch it belongs to another config or other frozen models
    │   ├── NoUsableCheckpoint checkpoints exist and none can be used
    │   ├── NoSpace            a checkpoint would not fit on the disk
    │   └── MirrorError        the second home of the checkpoints cannot be read or written
    ├── WorkloadError          a model, data file or workload class cannot be used
    ├── SchedulerError         a job could not be submitted, found or cancelled
    ├── TrainingDiverged       more non-finite or exploding steps than allowed
    └── TerminalNeeded         a command draws on a terminal, and there is none

Each message says what is wrong, where, and what to do about it.
"""

from __future__ import annotations


class LatentWireError(Exception):
    """Base of all errors that are the user's or the machine's, not ours."""


class ConfigError(LatentWireError):
    """A config file, key, value or override is wrong."""


class RunError(LatentWireError):
    """A run directory cannot be used as asked."""


class RunNotFound(RunError):
    """There is no run of that name."""


class RunConflict(RunError):
    """The run directory was made by a config that would give another result."""


class RunBusy(RunError):
    """Another orchestrator or another attempt holds the run right now."""


class Fenced(LatentWireError):
    """A newer attempt of the same run exists; this one may commit nothing."""


class CheckpointError(LatentWireError):
    """A checkpoint cannot be written or read."""


class CheckpointCorrupt(CheckpointError):
    """The bytes on disk are not the bytes that were committed."""


class CheckpointUnsafe(CheckpointError):
    """The manifest names a file outside the checkpoint's own folder."""


class CheckpointTorn(CheckpointError):
    """The training loop changed a tensor while it was being staged."""


class CheckpointTooNew(CheckpointError):
    """The checkpoint was written by a newer format than this program reads."""


class CheckpointMismatch(CheckpointError):
    """The checkpoint belongs to another config or to other frozen models."""


class NoUsableCheckpoint(CheckpointError):
    """Checkpoints exist, and none of them can be used."""


class NoSpace(CheckpointError):
    """A checkpoint would not fit on the disk."""


class MirrorError(CheckpointError, ConnectionError):
    """The second home of the checkpoints cannot be read or written; tried again as any failure of the network is."""


class WorkloadError(LatentWireError):
    """A model, a data file or a workload class cannot be used."""


class SchedulerError(LatentWireError):
    """A job could not be submitted, found or cancelled."""


class TrainingDiverged(LatentWireError):
    """More non-finite or exploding steps in a run than the config allows."""


class TerminalNeeded(LatentWireError):
    """A command draws on a terminal, and there is none."""
