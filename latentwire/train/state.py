"""All that a checkpoint holds: tracked objects to and from host memory. No pickle in either direction.

A ``state_dict`` is taken apart into tensors, which go to a safetensors file of their own group, and a tree of JSON in
which ``{"__tensor__": name}`` stands where a tensor was.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from latentwire.checkpoint.layout import Snapshot
from latentwire.checkpoint.reader import Loaded, Place
from latentwire.checkpoint.tensor_file import Span
from latentwire.errors import CheckpointMismatch, RunError
from latentwire.train.staging import DTYPES, LiveTensor, Ring

_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_OPTIMIZER_STATE = re.compile(r"state\.(\d+)\.")


@runtime_checkable
class Stateful(Protocol):
    """What can be tracked: a module, an optimizer, a scheduler, anything with these two methods."""

    def state_dict(self) -> Mapping[str, Any]:
        """The whole state: tensors, numbers, strings, None, and dicts, lists and tuples of them."""

    def load_state_dict(self, state: dict[str, Any]) -> object:
        """Take over what ``state_dict`` returned."""


class TrainingState:
    """The objects that a session tracks, by name.

    Names become groups of files: ``model`` -> ``model.safetensors``.
    """

    def __init__(self) -> None:
        self._tracked: dict[str, Stateful] = {}
        self._ring = Ring()

    def track(self, name: str, stateful: Stateful) -> None:
        """Add an object.

        Raises:
            RunError: the name is taken or is no plain word, or the object has no state_dict.
        """
        if not (name.isidentifier() and name.isascii()) or name in self._tracked or name == "random":
            raise RunError(f"cannot track {name!r}: give each object a plain name of its own")
        if not isinstance(stateful, Stateful):
            raise RunError(
                f"cannot track {name!r}: {type(stateful).__name__} has no state_dict() and load_state_dict()"
            )
        self._tracked[name] = stateful

    def wait_for_devices(self) -> None:
        """Block until all that was queued on the tensors' GPUs is done, on whatever stream."""
        for device in {tensor.device for tensor in self._tensors() if tensor.is_cuda}:
            torch.cuda.synchronize(device)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those that are tracked."""
        return [s for s in self._tracked.values() if isinstance(s, torch.optim.Optimizer)]

    def refuse_nothing(self) -> None:
        """Called before training.

        Raises:
            RunError: nothing is tracked.
        """
        if not self._tracked:
            raise RunError(
                "nothing is tracked, so that a restart would begin with fresh weights: "
                "session.track(model=model, optimizer=optimizer) before the first batch"
            )

    def refuse_untracked(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Called after each step of any optimizer; one that some tracked object wraps is tracked.

        Raises:
            RunError: it trains tracked parameters and has a state that no checkpoint would hold.
        """
        if torch.compiler.is_compiling():  # a compiled step is traced through, this too
            return
        parts = itertools.chain.from_iterable(map(_parts, self._tracked.values()))
        if not optimizer.state or any(part is optimizer for part in parts):
            return
        modules = [s for s in self._tracked.values() if isinstance(s, torch.nn.Module)]
        tracked = {id(parameter) for module in modules for parameter in module.parameters()}
        if any(id(parameter) in tracked for group in optimizer.param_groups for parameter in group["params"]):
            raise RunError(
                f"{type(optimizer).__name__} trains what is tracked and is not tracked itself, so that a restart would "
                "lose its state: session.track(optimizer=...) before the first batch"
            )

    def snapshot(
        self, step: int, random: Mapping[str, Any], values: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> Snapshot:
        """The state as it is, no tensor copied: they are to be staged, or written while nobody changes them.

        Args:
            step: completed steps.
            random: the generators at the boundary after that step.
            values: JSON that goes along.
            metrics: measured with exactly these weights.
        """
        trees: dict[str, Any] = {}
        tensors: dict[str, dict[str, LiveTensor]] = {}
        for name, state in [*self._states(), ("random", random)]:
            found: dict[str, torch.Tensor] = {}
            trees[name] = _take_apart(state, "", found)
            if found:
                tensors[name] = {key: LiveTensor(tensor.detach(), self._ring) for key, tensor in found.items()}
        updated = self._updated_by_optimizers()
        late = {(g, n) for g, ts in tensors.items() for n, t in ts.items() if t.tensor.data_ptr() in updated}
        for group, name in late:
            tensors[group][name] = LiveTensor(tensors[group][name].tensor, self._ring, late=True)
        own = copy.deepcopy(dict(values))  # the loop counts on while this is written
        return Snapshot(step, tensors, {"trees": trees, **own}, dict(metrics), replicated=frozenset(late))

    def place(self) -> Place:
        """Where a checkpoint's tensors belong: into the tracked ones themselves.

        An optimizer has no state before its first step: each tensor of it goes beside its parameter.
        """
        live: dict[tuple[str, str], torch.Tensor] = {}
        for name, state in self._states():
            found: dict[str, torch.Tensor] = {}
            _take_apart(state, "", found)
            live |= {(name, key): tensor.detach() for key, tensor in found.items()}

        def place(group: str, span: Span) -> LiveTensor:
            tensor = live.get((group, span.name))
            dtype = _TORCH_DTYPES[span.dtype]
            if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != span.shape or not _is_plain(tensor):
                tensor = torch.empty(span.shape, dtype=dtype, device=self._home(group, span))
            return LiveTensor(tensor, self._ring)

        return place

    def apply(self, loaded: Loaded) -> dict[str, Any]:
        """Put a checkpoint's state into the tracked objects; returns the generators' state.

        Raises:
            CheckpointMismatch: it does not hold the same objects, or one does not take its state.
        """
        trees = loaded.values["trees"]
        if set(trees) != {*self._tracked, "random"}:
            raise CheckpointMismatch(
                f"{loaded.path} holds {', '.join(sorted(trees))}; this program tracks "
                f"{', '.join(sorted(self._tracked)) or 'nothing'}: track the same objects under the same names"
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
        return tuple(tensor._version for tensor in self._tensors())

    def num_bytes(self) -> int:
        """Bytes of all tracked tensors now; an optimizer's grow with its first step."""
        return sum(t.numel() * t.element_size() for t in self._tensors())

    def is_on_gpu(self) -> bool:
        """Whether any tracked tensor is."""
        return any(tensor.is_cuda for tensor in self._tensors())

    def _states(self) -> list[tuple[str, Mapping[str, Any]]]:
        return [(name, stateful.state_dict()) for name, stateful in self._tracked.items()]

    def _tensors(self) -> list[torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, state in self._states():
            _take_apart(state, name, found)
        return list(found.values())

    def _updated_by_optimizers(self) -> set[int]:
        """Addresses of what only a tracked optimizer's step changes."""
        updated = set()
        for optimizer in self.optimizers():
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            states = [v for p in parameters for v in optimizer.state.get(p, {}).values() if isinstance(v, torch.Tensor)]
            updated |= {tensor.data_ptr() for tensor in [*parameters, *states] if tensor.numel()}
        return updated

    def _home(self, group: str, span: Span) -> torch.device:
        """The device of the parameter that this is an optimizer's state of; the CPU for anything else."""
        optimizer = self._tracked.get(group)
        match = _OPTIMIZER_STATE.match(span.name)
        if isinstance(optimizer, torch.optim.Optimizer) and match and span.shape:  # counters stay on the CPU
            parameters = [p for g in optimizer.param_groups for p in g["params"]]
            index = int(match.group(1))
            if index < len(parameters) and tuple(parameters[index].shape) == span.shape:
                return parameters[index].device
        return torch.device("cpu")


def _take_apart(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        if value.dtype not in DTYPES or value.layout != torch.strided:
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


def _put_together(tree: Any, tensors: Mapping[str, LiveTensor]) -> Any:
    if isinstance(tree, list):
        return [_put_together(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "__tensor__" in tree:
        return tensors[tree["__tensor__"]].tensor
    if "__tuple__" in tree:
        return tuple(_put_together(item, tensors) for item in tree["__tuple__"])
    if "__dict__" in tree:
        return {key: _put_together(item, tensors) for key, item in tree["__dict__"]}
    if "__float__" in tree:
        return float(tree["__float__"])
    return {key: _put_together(item, tensors) for key, item in tree.items()}


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and tensor.device.type in ("cpu", "cuda")


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _parts(stateful: Stateful) -> list[object]:
    """It and what it wraps; a scheduler knows its optimizer, and does not save it."""
    is_scheduler = isinstance(stateful, torch.optim.lr_scheduler.LRScheduler)
    return [stateful, *([] if is_scheduler else getattr(stateful, "__dict__", {}).values())]
