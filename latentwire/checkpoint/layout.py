"""What a checkpoint looks like on disk: names, manifest, tensor files. Pure: nothing here touches the disk.

::

    step-00001200/
      manifest.json          format, step, attempt, identity, metrics, every file with its bytes and SHA-256
      SHA256SUMS             the same digests and the manifest's own, for `sha256sum -c SHA256SUMS`
      state.json             everything that is not a tensor
      model.safetensors      one or several files per group of tensors
      verified.json          added after the read-back; the only file that may come later

Tensor files follow the safetensors format (https://github.com/huggingface/safetensors#format): eight bytes with the
length of a JSON header, the header, the bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from latentwire.errors import CheckpointCorrupt, CheckpointError, CheckpointTooNew, CheckpointUnsafe
from latentwire.run.atomic import json_safe

FORMAT = 1
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
STATE = "state.json"
VERIFIED = "verified.json"
METADATA = "__metadata__"
"""In a tensor file's header, a key that names no tensor."""
SAVING_PREFIX = ".saving-"
DELETING_PREFIX = ".deleting-"
QUARANTINE = "quarantine"

MAX_JSON_BYTES = 64 << 20
MAX_HEADER_BYTES = 64 << 20
MAX_FILES = 100_000
MAX_DIMENSIONS = 64

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

_STEP_NAME = re.compile(r"step-(\d{8,})")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class HostTensor:
    """A tensor as bytes in host memory.

    Attributes:
        dtype: its safetensors name, a key of ``DTYPE_BYTES``.
        shape: sizes.
        data: contiguous little-endian bytes, ``prod(shape)`` items.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @property
    def num_bytes(self) -> int:
        """Bytes of the data."""
        return self.data.nbytes


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """One step's state, staged in memory that nobody else will touch.

    Attributes:
        step: completed optimizer steps.
        tensors: group (``model``, ``optimizer``...) -> name -> tensor; a group becomes one or several files.
        values: everything else, as JSON.
        metrics: what was measured with exactly these weights.
    """

    step: int
    tensors: Mapping[str, Mapping[str, HostTensor]]
    values: Mapping[str, Any]
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.num_bytes for group in self.tensors.values() for t in group.values())


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
    return int(match.group(1)) if match else None


def parse_manifest(text: str, where: str) -> Manifest:
    """Check and read manifest.json.

    Raises:
        CheckpointTooNew: its format is newer than ours.
        CheckpointUnsafe: it names a file that is not a plain name in its own folder.
        CheckpointCorrupt: anything else that is not as we write it.
    """
    try:
        tree = json.loads(text)
        if int(tree["format"]) > FORMAT:
            raise CheckpointTooNew(
                f"{where} has format {tree['format']}, this latentwire reads up to {FORMAT}: upgrade latentwire"
            )
        files = {check_name(n, where): FileRecord(int(r["bytes"]), _sha(r["sha256"])) for n, r in tree["files"].items()}
        groups = {str(g): tuple(check_name(n, where) for n in names) for g, names in tree["groups"].items()}
        manifest = Manifest(
            step=int(tree["step"]),
            attempt=int(tree["attempt"]),
            created=float(tree["created"]),
            version=str(tree["version"]),
            identity=dict(tree["identity"]),
            metrics={str(k): float(v) for k, v in tree["metrics"].items()},
            groups=groups,
            files=files,
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointCorrupt(f"{where} is not a manifest: {type(error).__name__}: {error}") from None
    missing = [n for names in groups.values() for n in names if n not in files]
    if missing or STATE not in files or len(files) > MAX_FILES:
        raise CheckpointCorrupt(f"{where} is not whole: no record of {', '.join(missing) or STATE}")
    return manifest


def check_name(name: str, where: str) -> str:
    """The name if it is a plain file name that may stand in a checkpoint.

    Raises:
        CheckpointUnsafe: it is not (a path, ``..``, a hidden name, one of ours that may not be listed).
    """
    if not isinstance(name, str) or not is_plain_name(name):
        raise CheckpointUnsafe(
            f"{where} names the file {name!r}: only plain names in its own folder are allowed. "
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
        sums[check_name(name, where)] = digest
    return sums


def split_into_files(
    group: str, tensors: Mapping[str, HostTensor], shard_bytes: int
) -> dict[str, dict[str, HostTensor]]:
    """Divide a group into files of at most ``shard_bytes``, or of one tensor where one is larger."""
    shards: list[dict[str, HostTensor]] = [{}]
    size = 0
    for name in sorted(tensors):
        num_bytes = tensors[name].num_bytes
        if size and size + num_bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensors[name]
        size += num_bytes
    if len(shards) == 1:
        return {f"{group}.safetensors": shards[0]}
    return {f"{group}-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def encode_tensors(tensors: Mapping[str, HostTensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, piece by piece: the same tensors always give the same bytes.

    Raises:
        CheckpointError: a tensor has the one name that the format keeps for itself.
    """
    if METADATA in tensors:
        raise CheckpointError(f"a tensor cannot be named {METADATA}, which safetensors keeps for itself: rename it")
    order = sorted(tensors, key=lambda name: (-DTYPE_BYTES[tensors[name].dtype], name))  # keeps every tensor aligned
    header: dict[str, Any] = {METADATA: {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        assert tensor.num_bytes == DTYPE_BYTES[tensor.dtype] * math.prod(tensor.shape), name
        end = offset + tensor.num_bytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield tensors[name].data


def decode_tensors(data: memoryview, where: str) -> dict[str, HostTensor]:
    """The tensors of a safetensors file, as views into ``data``.

    Raises:
        CheckpointCorrupt: the header is too long, does not parse, or its offsets do not tile the data exactly.
    """
    length = int.from_bytes(data[:8], "little")
    if data.nbytes < 8 or length > min(MAX_HEADER_BYTES, data.nbytes - 8):
        raise CheckpointCorrupt(f"{where}: its header claims {length} bytes of a file of {data.nbytes}")
    body = data[8 + length :]
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
        header.pop(METADATA, None)
        spans = sorted((*map(int, e["data_offsets"]), name) for name, e in header.items())
        tensors, position = {}, 0
        for begin, end, name in spans:
            dtype, shape = header[name]["dtype"], tuple(int(n) for n in header[name]["shape"])
            if len(shape) > MAX_DIMENSIONS or not all(0 <= n < 1 << 63 for n in shape):
                raise ValueError(f"tensor {name!r} has no possible shape")
            if not begin == position <= end or end - begin != DTYPE_BYTES[dtype] * math.prod(shape):
                raise ValueError(f"tensor {name!r} does not fit its place")
            tensors[name] = HostTensor(dtype, shape, body[begin:end])
            position = end
        if position != body.nbytes:
            raise ValueError(f"{body.nbytes - position} bytes belong to no tensor")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointCorrupt(f"{where} is not a safetensors file: {type(error).__name__}: {error}") from None
    return tensors


def _sha(value: Any) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"{value!r} is not a SHA-256")
    return value
