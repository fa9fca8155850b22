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
        header = parse_json(bytes(data[8 : 8 + length]), where, MAX_HEADER_BYTES)
        header.pop(METADATA, None)
        if len(header) > MAX_TENSORS:
            raise ValueError(f"{len(header)} tensors are more than latentwire ever writes")
        spans = sorted((*map(_whole, e["data_offsets"]), name) for name, e in header.items())
        tensors, position = {}, 0
        for begin, end, name in spans:
            dtype, shape = header[name]["dtype"], tuple(map(_whole, header[name]["shape"]))
            if len(shape) > MAX_DIMENSIONS or math.prod(n or 1 for n in shape) >= 1 << 63:
                raise ValueError(f"tensor {name!r} has no possible shape")
            if not begin == position <= end or end - begin != DTYPE_BYTES[dtype] * math.prod(shape):
                raise ValueError(f"tensor {name!r} does not fit its place")
            tensors[name] = HostTensor(dtype, shape, body[begin:end])
            position = end
        if position != body.nbytes:
            raise ValueError(f"{body.nbytes - position} bytes belong to no tensor")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointCorrupt(f"{where} is not a safetensors file: {_short(error)}") from None
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
