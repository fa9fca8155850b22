"""Tensors as bytes, and the files that hold them. Pure: nothing here touches the disk.

The files follow the safetensors format (https://github.com/huggingface/safetensors#format): eight bytes with the length
of a JSON header, the header, the bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from latentwire.checkpoint.bounded import parse_json, short, whole
from latentwire.errors import CheckpointCorrupt, CheckpointError

METADATA = "__metadata__"
"""In a tensor file's header, a key that names no tensor."""

# Far above what is written.
MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 64

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


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


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of that type and shape."""
    return DTYPE_BYTES[dtype] * math.prod(shape)


def num_bytes_of(tensor: TensorSource) -> int:
    """Bytes of a tensor."""
    return tensor_bytes(tensor.dtype, tensor.shape)


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
        found = sorted((*map(whole, e["data_offsets"]), name) for name, e in header.items())
        spans, position = [], 0
        for begin, end, name in found:
            dtype, shape = header[name]["dtype"], tuple(map(whole, header[name]["shape"]))
            if len(shape) > MAX_DIMENSIONS or math.prod(n or 1 for n in shape) >= 1 << 63:
                raise ValueError(f"tensor {name!r} has no possible shape")
            if not begin == position <= end or end - begin != tensor_bytes(dtype, shape):
                raise ValueError(f"tensor {name!r} does not fit its place")
            spans.append(Span(name, dtype, shape))
            position = end
        if position != body_bytes:
            raise ValueError(f"{body_bytes - position} bytes belong to no tensor")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointCorrupt(f"{where} is not a safetensors file: {short(error)}") from None
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
