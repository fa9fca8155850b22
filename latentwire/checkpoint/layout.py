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
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

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

# Bounds of what is read, all far above what is written: whoever made the files, reading takes bounded time and memory.
MAX_MANIFEST_BYTES = 8 << 20
MAX_JSON_BYTES = 64 << 20
MAX_HEADER_BYTES = 32 << 20
MAX_JSON_VALUES = 2_000_000
MAX_DIGITS = 4300
MAX_FILES = 10_000
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 64

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

_STEP_NAME = re.compile(r"step-([0-9]{8,18})")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class TensorSource(Protocol):
    """A tensor that can be written, wherever its bytes are."""

    @property
    def dtype(self) -> str:
        """Its safetensors name, a key of ``DTYPE_BYTES``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""

    def pieces(self) -> Iterator[memoryview]:
        """Its contiguous little-endian bytes, in order. Each piece is valid until the next is asked for."""


class Destination(Protocol):
    """Memory that a tensor is read into, wherever it is."""

    def fill(self) -> Iterator[memoryview]:
        """Places for its bytes, in order: each is full when the next is asked for, the last when the iterator ends."""


@dataclasses.dataclass(frozen=True)
class HostTensor:
    """A tensor as bytes in host memory: a source and a destination.

    Attributes:
        dtype: its safetensors name, a key of ``DTYPE_BYTES``.
        shape: sizes.
        data: contiguous little-endian bytes, ``prod(shape)`` items.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @classmethod
    def empty(cls, dtype: str, shape: tuple[int, ...]) -> HostTensor:
        """Room for a tensor."""
        return cls(dtype, shape, memoryview(bytearray(tensor_bytes(dtype, shape))))

    def pieces(self) -> Iterator[memoryview]:
        """See ``TensorSource``."""
        yield self.data

    def fill(self) -> Iterator[memoryview]:
        """See ``Destination``."""
        yield self.data


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


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of that type and shape."""
    return DTYPE_BYTES[dtype] * math.prod(shape)


def num_bytes_of(tensor: TensorSource) -> int:
    """Bytes of a tensor."""
    return tensor_bytes(tensor.dtype, tensor.shape)


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
        if _whole(tree["format"]) > FORMAT:
            raise CheckpointTooNew(
                f"{where} has format {tree['format']}, this latentwire reads up to {FORMAT}: upgrade latentwire"
            )
        files = {check_name(name, where): _record(record) for name, record in tree["files"].items()}
        groups = {str(g): tuple(check_name(n, where) for n in names) for g, names in tree["groups"].items()}
        manifest = Manifest(
            step=_whole(tree["step"]),
            attempt=_whole(tree["attempt"]),
            created=float(tree["created"]),
            version=str(tree["version"]),
            identity=dict(tree["identity"]),
            metrics={str(k): float(v) for k, v in tree["metrics"].items()},
            groups=groups,
            files=files,
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointCorrupt(f"{where} is not a manifest: {_short(error)}") from None
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


def parse_json(text: str | bytes, where: str, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The value in a text that anybody may have written. Time and memory are bounded, whatever it holds.

    Raises:
        CheckpointCorrupt: it is not JSON, is larger or deeper than what we write, or names something twice.
    """
    if len(text) > max_bytes:
        raise CheckpointCorrupt(f"{where} has {len(text)} bytes, more than any that latentwire writes")
    try:
        text = text if isinstance(text, str) else text.decode()
        if not _is_small(text, max_bytes):
            raise ValueError(f"more than {MAX_JSON_VALUES} values")
        return json.loads(text, object_pairs_hook=_each_once, parse_int=_digits)
    except (ValueError, RecursionError) as error:
        raise CheckpointCorrupt(f"{where} is not JSON: {_short(error)}") from None


def encode_json(value: Any, where: str) -> bytes:
    """The text of a file of JSON that ``parse_json`` will take.

    Raises:
        CheckpointError: it would not.
    """
    text = json.dumps(json_safe(value), indent=1, sort_keys=True, allow_nan=False) + "\n"
    if not _is_small(text, MAX_JSON_BYTES):
        raise CheckpointError(
            f"{where} would take {len(text)} bytes: put large values into tensors, or out of the state"
        )
    return text.encode()


def _is_small(text: str, max_bytes: int) -> bool:
    """Every value but the first comes after one of these: so their number is known before any is made."""
    return len(text) <= max_bytes and sum(map(text.count, ",[{")) <= MAX_JSON_VALUES


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
    What is replicated goes, largest first, to the rank that has least to write (Graham's rule); the rest to rank 0.
    """
    files = [f for group in sorted(snapshot.tensors) for f in _split(group, snapshot.tensors[group], shard_bytes)]
    free = [f for f in files if all((f.group, name) in snapshot.replicated for name in f.tensors)]
    loads = [0] * world_size
    loads[0] = sum(f.num_bytes for f in files) - sum(f.num_bytes for f in free)
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


def encode_tensors(tensors: Mapping[str, TensorSource]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, piece by piece: the same tensors always give the same bytes.

    Raises:
        CheckpointError: a tensor has the one name that the format keeps for itself, or they are more than are read.
    """
    if METADATA in tensors:
        raise CheckpointError(f"a tensor cannot be named {METADATA}, which safetensors keeps for itself: rename it")
    if len(tensors) > MAX_TENSORS:
        raise CheckpointError(f"{len(tensors)} tensors are more than the {MAX_TENSORS} that a checkpoint may hold")
    order = sorted(tensors, key=lambda name: (-DTYPE_BYTES[tensors[name].dtype], name))  # keeps every tensor aligned
    header: dict[str, Any] = {METADATA: {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + num_bytes_of(tensor)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield from tensors[name].pieces()


@dataclasses.dataclass(frozen=True)
class Span:
    """Where a tensor lies in its file, without its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def header_bytes(first: bytes, num_bytes: int, where: str) -> int:
    """The length of a tensor file's header from its first eight bytes.

    Raises:
        CheckpointCorrupt: it claims more than the file has, or than we ever write.
    """
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > min(MAX_HEADER_BYTES, num_bytes - 8):
        raise CheckpointCorrupt(f"{where}: its header claims {length} bytes of a file of {num_bytes}")
    return length


def parse_header(text: bytes, body_bytes: int, where: str) -> list[Span]:
    """The tensors of a file in the order of their bytes, which they tile without a gap.

    Raises:
        CheckpointCorrupt: the header does not parse, or its offsets do not tile the body exactly.
    """
    try:
        header = parse_json(text, where, MAX_HEADER_BYTES)
        header.pop(METADATA, None)
        if len(header) > MAX_TENSORS:
            raise ValueError(f"{len(header)} tensors are more than latentwire ever writes")
        found = sorted((*map(_whole, e["data_offsets"]), name) for name, e in header.items())
        spans, position = [], 0
        for begin, end, name in found:
            dtype, shape = header[name]["dtype"], tuple(map(_whole, header[name]["shape"]))
            if len(shape) > MAX_DIMENSIONS or math.prod(n or 1 for n in shape) >= 1 << 63:
                raise ValueError(f"tensor {name!r} has no possible shape")
            if not begin == position <= end or end - begin != tensor_bytes(dtype, shape):
                raise ValueError(f"tensor {name!r} does not fit its place")
            spans.append(Span(name, dtype, shape))
            position = end
        if position != body_bytes:
            raise ValueError(f"{body_bytes - position} bytes belong to no tensor")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointCorrupt(f"{where} is not a safetensors file: {_short(error)}") from None
    return spans


def decode_tensors(data: memoryview, where: str) -> dict[str, HostTensor]:
    """The tensors of a safetensors file, as views into ``data``.

    Raises:
        CheckpointCorrupt: see ``header_bytes`` and ``parse_header``.
    """
    length = header_bytes(bytes(data[:8]), data.nbytes, where)
    tensors, position = {}, 8 + length
    for span in parse_header(bytes(data[8:position]), data.nbytes - position, where):
        end = position + tensor_bytes(span.dtype, span.shape)
        tensors[span.name] = HostTensor(span.dtype, span.shape, data[position:end])
        position = end
    return tensors


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("a name is there twice")
    return tree


def _digits(text: str) -> int:
    """Python's own limit, also where somebody has switched it off: the time grows with the square."""
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _whole(value: Any) -> int:
    """A number that can count bytes or steps."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r:.100} is not a count")
    return value


def _short(error: Exception) -> str:
    """What is said of an error: it may repeat what it met, however long."""
    return f"{type(error).__name__}: {error!s:.200}"


def _record(value: Any) -> FileRecord:
    return FileRecord(_whole(value["bytes"]), _sha(value["sha256"]))


def _sha(value: Any) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"{value!r:.100} is not a SHA-256")
    return value
