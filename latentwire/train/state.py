"""All that a checkpoint holds: tracked objects to and from host memory. No pickle in either direction.

A ``state_dict`` is taken apart into tensors, which go to a safetensors file of their own group, and a tree of JSON in
which ``{"__tensor__": name}`` stands where a tensor was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from latentwire.checkpoint.layout import HostTensor, Snapshot
from latentwire.checkpoint.reader import Loaded
from latentwire.errors import CheckpointMismatch, RunError

_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16", torch.int16: "I16",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.uint32: "U32", torch.int32: "I32", torch.float32: "F32",
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}


@runtime_checkable
class Stateful(Protocol):
    """What can be tracked: a module, an optimizer, a scheduler, anything with these two methods."""

    def state_dict(self) -> Mapping[str, Any]:
        """The whole state: tensors, numbers, strings, None, and dicts, lists and tuples of them."""

    def load_state_dict(self, state: dict[str, Any]) -> object:
        """Take over what ``state_dict`` returned."""


class StagingBuffers:
    """Host memory that snapshots are copied into, used again for the next one; pinned where there is a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def copy(self, key: str, tensor: torch.Tensor) -> HostTensor:
        """Copy a tensor from wherever it is. The copy is valid until the next one under the same key."""
        source = tensor.detach()
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[key] = buffer
        buffer.copy_(source)
        flat = buffer.reshape(-1).view(torch.uint8) if buffer.numel() else torch.empty(0, dtype=torch.uint8)
        return HostTensor(_DTYPES[source.dtype], tuple(source.shape), flat.numpy().data)


class TrainingState:
    """The objects that a session tracks, by name.

    Names become groups of files: ``model`` -> ``model.safetensors``.
    """

    def __init__(self) -> None:
        self._tracked: dict[str, Stateful] = {}
        self._buffers = StagingBuffers()

    def track(self, name: str, stateful: Stateful) -> None:
        """Add an object.

        Raises:
            RunError: the name is taken or is no plain word, or the object has no state_dict.
        """
        if not name.isidentifier() or name in self._tracked or name == "random":
            raise RunError(f"cannot track {name!r}: give each object a plain name of its own")
        if not isinstance(stateful, Stateful):
            raise RunError(
                f"cannot track {name!r}: {type(stateful).__name__} has no state_dict() and load_state_dict()"
            )
        self._tracked[name] = stateful

    def capture(
        self, step: int, random: Mapping[str, Any], values: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> Snapshot:
        """Copy everything to host memory. Blocks until the copies are done; nobody may save from them meanwhile.

        Args:
            step: completed steps.
            random: the generators at the boundary after that step.
            values: JSON that goes along.
            metrics: measured with exactly these weights.
        """
        trees: dict[str, Any] = {}
        tensors: dict[str, dict[str, HostTensor]] = {}
        for name, state in [*((n, s.state_dict()) for n, s in self._tracked.items()), ("random", random)]:
            found: dict[str, torch.Tensor] = {}
            trees[name] = _take_apart(state, "", found)
            staged = {key: self._buffers.copy(f"{name}/{key}", tensor) for key, tensor in found.items()}
            if staged:
                tensors[name] = staged
        return Snapshot(step, tensors, {"trees": trees, **values}, metrics)

    def apply(self, loaded: Loaded) -> dict[str, Any]:
        """Put a checkpoint's state into the tracked objects; returns the generators' state.

        Raises:
            CheckpointMismatch: it does not hold the same objects, or one does not take its state.
        """
        trees = loaded.values["trees"]
        if set(trees) != {*self._tracked, "random"}:
            raise CheckpointMismatch(
                f"{loaded.path} holds {', '.join(sorted(trees))}; this program tracks "
                f"{', '.join(sorted(self._tracked))}: track the same objects under the same names"
            )
        states = {name: _put_together(tree, loaded.tensors.get(name, {})) for name, tree in trees.items()}
        for name, stateful in self._tracked.items():
            try:
                stateful.load_state_dict(states[name])
            except (RuntimeError, ValueError, KeyError) as error:
                raise CheckpointMismatch(f"{loaded.path}: {name!r} does not take its state: {error}") from error
        random: dict[str, Any] = states["random"]
        return random

    def versions(self) -> tuple[int, ...]:
        """Autograd's change counters of all tracked tensors: equal if nothing was written to in between."""
        found: dict[str, torch.Tensor] = {}
        for name, stateful in self._tracked.items():
            _take_apart(stateful.state_dict(), name, found)
        return tuple(tensor._version for tensor in found.values())

    def num_bytes(self) -> int:
        """Bytes of all tracked tensors now; an optimizer's grow with its first step."""
        found: dict[str, torch.Tensor] = {}
        for name, stateful in self._tracked.items():
            _take_apart(stateful.state_dict(), name, found)
        return sum(t.numel() * t.element_size() for t in found.values())


def _take_apart(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        if value.dtype not in _DTYPES or value.layout != torch.strided:
            raise RunError(f"{path}: a {value.layout} tensor of {value.dtype} cannot be saved")
        tensors[path] = value
        return {"__tensor__": path}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("__") for key in value):
            return {key: _take_apart(item, _join(path, key), tensors) for key, item in value.items()}
        return {"__dict__": [[key, _take_apart(item, _join(path, key), tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_take_apart(item, _join(path, index), tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"__tuple__": items}
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": str(value)}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise RunError(f"{path}: a {type(value).__name__} cannot be saved without pickle; keep it out of state_dict()")


def _put_together(tree: Any, tensors: Mapping[str, HostTensor]) -> Any:
    if isinstance(tree, list):
        return [_put_together(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "__tensor__" in tree:
        return _as_tensor(tensors[tree["__tensor__"]])
    if "__tuple__" in tree:
        return tuple(_put_together(item, tensors) for item in tree["__tuple__"])
    if "__dict__" in tree:
        return {key: _put_together(item, tensors) for key, item in tree["__dict__"]}
    if "__float__" in tree:
        return float(tree["__float__"])
    return {key: _put_together(item, tensors) for key, item in tree.items()}


def _as_tensor(host: HostTensor) -> torch.Tensor:
    dtype = _TORCH_DTYPES[host.dtype]
    if not host.num_bytes:
        return torch.empty(host.shape, dtype=dtype)
    return torch.frombuffer(host.data, dtype=torch.uint8).view(dtype).reshape(host.shape)


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
