"""A tiny workload that behaves badly on demand.

A file ``hold-<where>`` in the run's directory holds a number: from that visit on the toy stands still there, until the
file is gone or names a later visit; a ``holding`` event says that it does. At ``step-rank1`` only rank 1 is held.
``troubles`` happen in a training step, each once in a run unless told otherwise.
"""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic

import latentwire
from latentwire.errors import WorkloadError
from latentwire.run.atomic import write_text
from latentwire.workloads.base import BuildContext, StepReport

if TYPE_CHECKING:
    import torch


class Trouble(pydantic.BaseModel):
    """Something that goes wrong at the micro-batch before which so many training samples were seen."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    kind: Literal["oom", "network", "bug", "nan", "explode", "exit", "kill", "segfault", "late_oom"]
    after_samples: int
    once: bool = True
    rank: int | None = None


class Options(pydantic.BaseModel):
    """The toy's options."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    width: int = pydantic.Field(default=16, ge=1)
    counts: bool = True
    """Keep running statistics and the number of samples in buffers. Every rank has its own, so off for several."""
    pause_s: float = pydantic.Field(default=0.0, ge=0)
    """Sleep so long in every micro-batch."""
    sample_pause_s: float = pydantic.Field(default=0.0, ge=0)
    """Sleep so long over every training sample."""
    no_data: bool = False
    num_shards: int = 0
    """Train from a stream of so many files, which are made in the run's directory."""
    depends_on_attempt: bool = False
    """Break the law on purpose: the loss follows the number of attempts on disk."""
    troubles: tuple[Trouble, ...] = ()


class Points(Sequence[Any]):
    """Noisy samples of a plane; what is added to a training sample is drawn anew in each epoch."""

    def __init__(self, num_samples: int, noisy: bool, pause_s: float = 0.0) -> None:
        import torch

        self._pause_s = pause_s

        self._inputs = torch.randn(num_samples, 8, generator=torch.Generator().manual_seed(num_samples))
        self._noisy = noisy

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, index: Any) -> Any:
        import numpy
        import torch

        time.sleep(self._pause_s)
        clean = self._inputs[index]
        noise = torch.randn(8) * random.random() * float(numpy.random.rand()) if self._noisy else torch.zeros(8)
        return clean + noise, clean.sum(dim=0, keepdim=True)


class Lines:
    """The same from JSON lines files of different lengths, that can only be read forward."""

    def __init__(self, folder: Path, num_shards: int) -> None:
        import torch

        generator = torch.Generator().manual_seed(num_shards)
        folder.mkdir(exist_ok=True)
        for shard in range(num_shards):  # every rank writes the same
            rows = torch.randn(3 + shard % 4, 8, generator=generator).tolist()
            write_text(folder / f"{shard:02}.jsonl", "".join(json.dumps({"point": row}) + "\n" for row in rows))
        self._files = latentwire.JsonlShards(folder.glob("*.jsonl"))
        self.shards = self._files.shards

    def read(self, shard: str, offset: int) -> Iterator[tuple[Any, int]]:
        import torch

        for row, after in self._files.read(shard, offset):
            clean = torch.tensor(row["point"])
            yield (clean + torch.randn(8) * random.random(), clean.sum(dim=0, keepdim=True)), after


class Toy:
    """A small network that learns to add."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = Options.model_validate(options)
        self._visits: collections.Counter[str] = collections.Counter()
        self._fails_late = False

    def build(self, context: BuildContext) -> None:
        import torch

        self.context = context
        _leave_out_the_compiler()
        print("the toy is built")
        print("the toy complains", file=sys.stderr)
        print("Loading weights:  50%|##   |\rLoading weights: 100%|#####|", file=sys.stderr)
        self._hold("build")
        context.safe_point()
        if self.options.no_data:
            raise WorkloadError(f"there is no data file {context.run_path / 'points.json'}")
        torch.manual_seed(context.seed)
        width = self.options.width
        layers: list[torch.nn.Module] = [torch.nn.Linear(8, width), torch.nn.Dropout(0.1), torch.nn.GELU()]
        layers += [torch.nn.Linear(width, width), torch.nn.Tanh(), torch.nn.Linear(width, 1)]
        self.model = torch.nn.Sequential(*layers).to(context.device)
        self._seen = 0
        if self.options.counts:
            self.model.register_buffer("num_seen", torch.zeros((), dtype=torch.int64))
            self.model.register_buffer("running_mean", torch.zeros(8))
        shards = self.options.num_shards
        self._points = (
            Lines(context.run_path / "shards", shards) if shards else Points(101, True, self.options.sample_pause_s)
        )
        self._held_out = Points(16, noisy=False)
        self._shift = len(os.listdir(context.run_path / "attempts")) * 0.01 if self.options.depends_on_attempt else 0.0

    @property
    def trainable(self) -> torch.nn.Module:
        return self.model

    @property
    def train_data(self) -> Sequence[Any] | latentwire.ShardedSource:
        return self._points

    @property
    def eval_data(self) -> Sequence[Any]:
        return self._held_out

    def collate(self, samples: list[Any]) -> Any:
        import numpy
        import torch

        inputs, targets = (torch.stack(column) for column in zip(*samples, strict=True))
        kept = torch.rand_like(inputs) < 0.9 + 0.1 * random.random() * float(numpy.random.rand())
        return inputs * kept, targets

    def step(self, batch: Any, backward: Callable[[torch.Tensor], None]) -> StepReport:
        import torch

        self._hold("step")
        self._hold(f"step-rank{self._rank()}")
        time.sleep(self.options.pause_s)
        factor = self._trouble()
        inputs, targets = batch
        self._count(inputs)
        dtype = self.context.compute_dtype
        with torch.autocast(self.context.device.type, dtype=dtype, enabled=dtype != torch.float32):
            outputs = self.model(inputs)
        loss = torch.nn.functional.mse_loss(outputs.float(), targets + self._shift)
        backward(loss * factor)
        if self._fails_late:
            raise MemoryError("no memory left at the end of the backward pass")
        return StepReport({"loss": loss.detach() * factor, "plane": loss.detach()}, len(inputs), num_tokens=len(inputs))

    def evaluate(self, batch: Any) -> StepReport:
        import torch

        self._hold("evaluate")
        time.sleep(self.options.pause_s)
        loss = torch.nn.functional.mse_loss(self.model(batch[0]), batch[1])
        return StepReport({"loss": loss, "plane": loss}, len(batch[0]))

    def frozen_digests(self) -> Mapping[str, str]:
        return {"nothing": "0" * 64}

    def _count(self, inputs: torch.Tensor) -> None:
        self._seen += len(inputs)
        if self.options.counts:
            self.model.num_seen += len(inputs)
            self.model.running_mean.lerp_(inputs.mean(dim=0), 0.1)

    def _hold(self, where: str) -> None:
        visit = self._visits[where]
        self._visits[where] += 1
        if self._is_held(where, visit):
            self.context.event("holding", where=where)
        while self._is_held(where, visit):
            time.sleep(0.005)

    def _is_held(self, where: str, visit: int) -> bool:
        try:
            return visit >= int((self.context.run_path / f"hold-{where}").read_text())
        except FileNotFoundError:
            return False

    def _trouble(self) -> float:
        """Misbehave if it is time to; returns what the loss is multiplied by."""
        seen = int(self.model.num_seen) if self.options.counts else self._seen
        for trouble in self.options.troubles:
            if trouble.after_samples == seen and trouble.rank in (None, self._rank()) and self._is_due(trouble):
                self.context.event("trouble", kind=trouble.kind)
                return self._misbehave(trouble.kind)
        return 1.0

    def _is_due(self, trouble: Trouble) -> bool:
        try:
            (self.context.run_path / f"did-{trouble.kind}-{trouble.after_samples}").touch(exist_ok=not trouble.once)
        except FileExistsError:
            return False
        return True

    def _misbehave(self, kind: str) -> float:
        if kind == "oom":
            raise MemoryError("no memory left for this toy")
        if kind == "late_oom":
            self._fails_late = True
            return 1.0
        if kind == "network":
            raise ConnectionError("the cable was pulled")
        if kind == "bug":
            raise RuntimeError("a bug in the toy")
        if kind == "exit":
            os._exit(3)
        if kind in ("kill", "segfault"):
            os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSEGV)
        return {"nan": float("nan"), "explode": 1e9}[kind]

    def _rank(self) -> int:
        return int(os.environ.get("RANK", "0"))


def _leave_out_the_compiler() -> None:
    """Half of what the start of a rank costs: an optimizer imports torch's compiler, only to be left alone by it."""
    import torch

    nothing = types.ModuleType("torch._dynamo")
    vars(nothing).update(graph_break=lambda: None, disable=lambda function, *_, **__: function)
    vars(torch)["_dynamo"] = sys.modules["torch._dynamo"] = nothing
