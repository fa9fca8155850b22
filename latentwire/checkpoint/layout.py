"""What a checkpoint looks like on disk: names, manifest, which file holds what. Pure: nothing here touches the disk.

::

    step-00001200/
      manifest.json          format, step, attempt, identity, metrics, every file with its bytes and SHA-256
      SHA256SUMS             the same digests and the manifest's own, for `sha256sum -c SHA256SUMS`
      state.json             everything that is not a tensor
      model.safetensors      one or several files per group of tensors
      verified.json          added after the read-back; the only file that may come later
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from latentwire.checkpoint.bounded import MAX_JSON_BYTES, parse_json, short, whole
from latentwire.checkpoint.tensor_file import TensorSource, num_bytes_of
from latentwire.errors import CheckpointCorrupt, CheckpointTooNew, CheckpointUnsafe
from latentwire.run.atomic import json_safe

FORMAT = 1
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
STATE = "state.json"
VERIFIED = "verified.json"
SAVING_PREFIX = ".saving-"
DELETING_PREFIX = ".deleting-"
QUARANTINE = "quarantine"

# Far above what is written: whoever made the files, reading them takes bounded time and memory.
MAX_MANIFEST_BYTES = 8 << 20
MAX_FILES = 10_000

_STEP_NAME = re.compile(r"step-([0-9]{8,18})")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """One step's state; nobody changes its bytes until it is written.

    Attributes:
        step: completed optimizer steps.
        tensors: group (``model``, ``optimizer``...) -> name -> tensor; a group becomes one or several files.
        values: everything else, as JSON.
        metrics: what was measured with exactly these weights.
        replicated: (group, name) of tensors that are the same on every rank, so that any rank may write them.
        settle: called on the saving thread before the first byte is read; blocks until all bytes are staged. Raises
            ``CheckpointTorn`` where they are not those of one step.
    """

    step: int
    tensors: Mapping[str, Mapping[str, TensorSource]]
    values: Mapping[str, Any]
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    replicated: frozenset[tuple[str, str]] = frozenset()
    settle: Callable[[], None] = lambda: None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(num_bytes_of(tensor) for group in self.tensors.values() for tensor in group.values())


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """Size and digest of one file."""

    num_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json.

    Attributes:
        identity: what the checkpoint belongs to: the config's digest and the frozen models' digests.
        groups: group -> its tensor files in order.
    """

    step: int
    attempt: int
    created: float
    version: str
    identity: Mapping[str, Any]
    metrics: Mapping[str, float]
    groups: Mapping[str, tuple[str, ...]]
    files: Mapping[str, FileRecord]

    def group_sha256(self, group: str) -> str | None:
        """The digest of a group's tensors: its file's SHA-256, or that of the listing of its files."""
        names = self.groups.get(group)
        if not names:
            return None
        if len(names) == 1:
            return self.files[names[0]].sha256
        return hashlib.sha256(format_sums({name: self.files[name] for name in names}).encode()).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Bytes of all listed files."""
        return sum(record.num_bytes for record in self.files.values())

    def to_json(self) -> str:
        """The text of manifest.json."""
        tree = {"format": FORMAT} | dataclasses.asdict(self)
        tree["files"] = {name: {"bytes": r.num_bytes, "sha256": r.sha256} for name, r in self.files.items()}
        return json.dumps(json_safe(tree), indent=1, sort_keys=True, allow_nan=False) + "\n"


def step_name(step: int) -> str:
    """``step-00001200``."""
    return f"step-{step:08d}"


def parse_step_name(name: str) -> int | None:
    """The step in a checkpoint's folder name, None for any other name."""
    match = _STEP_NAME.fullmatch(name)
    step = int(match.group(1)) if match else None
    return step if step is not None and step_name(step) == name else None


def parse_manifest(text: str, where: str) -> Manifest:
    """Check and read manifest.json.

    Raises:
        CheckpointTooNew: its format is newer than ours.
        CheckpointUnsafe: it names a file that is not a plain name in its own folder.
        CheckpointCorrupt: anything else that is not as we write it.
    """
    tree = parse_json(text, where, MAX_MANIFEST_BYTES)
    try:
        if whole(tree["format"]) > FORMAT:
            raise CheckpointTooNew(
                f"{where} has format {tree['format']}, this latentwire reads up to {FORMAT}: upgrade latentwire"
            )
        files = {check_name(name, where): _record(record) for name, record in tree["files"].items()}
        groups = {str(g): tuple(check_name(n, where) for n in names) for g, names in tree["groups"].items()}
        manifest = Manifest(
            step=whole(tree["step"]),
            attempt=whole(tree["attempt"]),
            created=float(tree["created"]),
            version=str(tree["version"]),
            identity=dict(tree["identity"]),
            metrics={str(k): float(v) for k, v in tree["metrics"].items()},
            groups=groups,
            files=files,
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointCorrupt(f"{where} is not a manifest: {short(error)}") from None
    listed = [n for names in groups.values() for n in names]
    missing = [n for n in [*listed, STATE] if n not in files]
    if missing:
        raise CheckpointCorrupt(f"{where} is not whole: no record of {', '.join(missing[:3])}")
    if len(listed) != len(set(listed)) or STATE in listed:
        raise CheckpointCorrupt(f"{where} lists a file twice")
    if len(files) != len(listed) + 1:
        raise CheckpointCorrupt(f"{where} lists a file that belongs to nothing")
    if len(files) > MAX_FILES or files[STATE].num_bytes > MAX_JSON_BYTES:
        raise CheckpointCorrupt(f"{where} lists more, or a larger {STATE}, than latentwire ever writes")
    return manifest


def check_name(name: str, where: str) -> str:
    """The name if it is a plain file name that may stand in a checkpoint.

    Raises:
        CheckpointUnsafe: it is not (a path, ``..``, a hidden name, one of ours that may not be listed).
    """
    if not isinstance(name, str) or not is_plain_name(name):
        raise CheckpointUnsafe(
            f"{where} names the file {name!r:.100}: only plain names in its own folder are allowed. "
            "It was not written by latentwire; do not use it"
        )
    return name


def is_plain_name(name: str) -> bool:
    """Whether a file of a checkpoint may have this name."""
    return _FILE_NAME.fullmatch(name) is not None and name not in (SUMS, VERIFIED)


def format_sums(files: Mapping[str, FileRecord]) -> str:
    """SHA256SUMS in the format of coreutils."""
    return "".join(f"{files[name].sha256}  {name}\n" for name in sorted(files))


def parse_sums(text: str, where: str) -> dict[str, str]:
    """Name -> digest.

    Raises:
        CheckpointUnsafe, CheckpointCorrupt: a line names no plain file, or is not a line of SHA256SUMS.
    """
    sums = {}
    *lines, rest = text.split("\n")
    if rest:
        raise CheckpointCorrupt(f"{where} ends in the middle of a line: {rest[:100]!r}")
    for line in lines:
        digest, separator, name = line.partition("  ")
        if not separator or not _SHA256.fullmatch(digest):
            raise CheckpointCorrupt(f"{where}: {line[:100]!r} is not a line of SHA256SUMS")
        if check_name(name, where) in sums:
            raise CheckpointCorrupt(f"{where} lists {name} twice")
        sums[name] = digest
    return sums


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """One file of a checkpoint to be: the names of its tensors, and the rank that writes it."""

    name: str
    group: str
    tensors: tuple[str, ...]
    num_bytes: int
    rank: int = 0


def plan_files(snapshot: Snapshot, shard_bytes: int, world_size: int = 1) -> list[TensorFile]:
    """Divide a snapshot's groups into files and these over the ranks.

    It goes by names, types and shapes alone, so that every rank comes to the same plan without a word.
    What is replicated goes, largest first, to the rank that has least of it (Graham's rule); the rest, of which the
    other ranks may have other sizes, to rank 0.
    """
    files = [f for group in sorted(snapshot.tensors) for f in _split(group, snapshot.tensors[group], shard_bytes)]
    free = [f for f in files if all((f.group, name) in snapshot.replicated for name in f.tensors)]
    loads = [0] * world_size
    ranks: dict[str, int] = {}
    for file in sorted(free, key=lambda f: (-f.num_bytes, f.name)):
        rank = min(range(world_size), key=lambda r: loads[r])
        loads[rank] += file.num_bytes
        ranks[file.name] = rank
    return [dataclasses.replace(f, rank=ranks.get(f.name, 0)) for f in files]


def _split(group: str, tensors: Mapping[str, TensorSource], shard_bytes: int) -> list[TensorFile]:
    """Divide a group into files of at most ``shard_bytes``, or of one tensor where one is larger."""
    shards: list[list[str]] = [[]]
    sizes = [0]
    for name in sorted(tensors):
        num_bytes = num_bytes_of(tensors[name])
        if sizes[-1] and sizes[-1] + num_bytes > shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += num_bytes
    count = len(shards)
    names = [f"{group}-{i:05d}-of-{count:05d}" for i in range(1, count + 1)] if count > 1 else [group]
    return [
        TensorFile(f"{name}.safetensors", group, tuple(shard), size)
        for name, shard, size in zip(names, shards, sizes, strict=True)
    ]


def _record(value: Any) -> FileRecord:
    return FileRecord(whole(value["bytes"]), _sha(value["sha256"]))


def _sha(value: Any) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"{value!r:.100} is not a SHA-256")
    return value
