"""Summing gradients over micro-batches and ranks in one fixed order, whatever the number of ranks.

A rank adds up the blocks of the canonical sum that lie within it (``elastic/schedule.py``). Then every rank is sent the
same 1/D of all blocks, adds them in canonical order, and hands the total round: an all-to-all and an all-gather, which
together carry what a ring all-reduce carries where each rank has one block. Only copies travel; every addition is one
of float32 numbers in the order of the schedule. Gradients go in buckets, those of the last layers first, because the
backward pass makes them first: what a rank's last micro-batch has finished is sent while it goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from latentwire.elastic import schedule
from latentwire.errors import WorkloadError
from latentwire.train.exchange import ExactExchange, Exchange, PlainExchange, UnderWay
from latentwire.train.ranks import Ranks
from latentwire.train.side_streams import let_go

_ALIGNED = 64
"""Every parameter begins at a multiple of so many numbers, so that kernels read all alike."""


class Reduction:
    """Leaves the gradient of the whole batch in ``.grad``. Made on every rank with the same arguments.

    For each micro-batch of the rank: ``begin``, one or more times ``backward``, ``end``; after the last: ``finish``.

    Args:
        parameters: on one device, in the same order on every rank. Those that take no gradient are left alone; those
            that are never reached get zeros.
        ranks: who computes.
        num_micro_batches: M.
        exact: one order of additions for any number of ranks; else each rank adds up all of its own, and an
            all-reduce adds the ranks in an order of its own.
        bucket_bytes: gradients that travel together.

    Raises:
        WorkloadError: there are no parameters, or they are on several devices.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        ranks: Ranks,
        num_micro_batches: int,
        exact: bool = True,
        bucket_bytes: int = 32 << 20,
    ) -> None:
        self._ranks = ranks
        mine = schedule.micro_batches_of(ranks.rank, ranks.world_size, num_micro_batches)
        spans = schedule.segments(num_micro_batches) if exact else [mine]
        self._ends = {span[-1]: span for span in spans if span and span[-1] in mine}
        self._last = mine[-1] if mine else None
        # a rank with fewer micro-batches than others meets them at more safe points, and may have to leave at one
        is_longest = len(mine) == schedule.num_slots(ranks.world_size, num_micro_batches)
        self._overlaps = is_longest and ranks.world_size > 1
        exchange = ExactExchange(ranks, num_micro_batches) if exact else PlainExchange(ranks, mine)
        members = list(dict.fromkeys(p for p in parameters if p.requires_grad))  # tied ones come twice
        devices = sorted({str(p.device) for p in members})
        if len(devices) != 1:
            raise WorkloadError(
                f"{len(members)} parameters to train, on devices {devices}: there must be some, all on session.device"
            )
        self._device = members[0].device
        self._buckets = [_Bucket(some, exchange) for some in _divide(members, bucket_bytes)]
        self._launched = 0
        self.exchange_s: float | None = None
        """What the GPU waited for other ranks and the exchange in the last ``finish``; None on a CPU or one rank."""
        self._fired: list[Counter[torch.nn.Parameter]] = []  # of each backward pass: how often autograd added to each
        self._usual: list[Counter[torch.nn.Parameter]] = []
        self._now: int | None = None
        if self._overlaps:
            for bucket in self._buckets:
                for parameter in bucket.parameters:
                    parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def begin(self, micro_batch: int | None) -> None:
        """Before a micro-batch; None: one whose gradients are thrown away."""
        self._now = micro_batch
        self._fired = []

    def backward(self, loss: Tensor) -> None:
        """Instead of ``loss.backward()``.

        Raises:
            WorkloadError: this step's gradients are on their way already.
        """
        self._fired.append(Counter())
        self._refuse_if_launched()
        loss.backward()

    def end(self) -> None:
        """After a micro-batch's last backward pass; takes the gradients away where a segment ends."""
        span = self._ends.get(-1 if self._now is None else self._now)
        self._usual = self._fired
        if span is not None and self._now != self._last:
            for bucket in self._buckets:
                bucket.take(span)

    def finish(self) -> None:
        """Exchange what is not under way yet and leave the total in ``.grad``. Collective; every rank."""
        computed = self._mark()
        self._launch(len(self._buckets))
        for bucket in self._buckets:
            bucket.add_up()
        for bucket in self._buckets:
            bucket.give_back()
        self._launched = 0
        self._now, self._fired = None, []
        exchanged = self._mark()
        self._ranks.wait_for_gpu(self._device)
        if computed is not None and exchanged is not None:
            self.exchange_s = computed.elapsed_time(exchanged) / 1000

    def _mark(self) -> torch.cuda.Event | None:
        """A moment of the GPU's own time. The host runs ahead: by its clock, computing and waiting are the same."""
        if self._device.type != "cuda" or self._ranks.world_size == 1:
            return None
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(self._device))
        return mark

    def _on_gradient(self, parameter: torch.nn.Parameter) -> None:
        """Autograd has finished one parameter's gradient in this backward pass."""
        if not self._fired:
            return  # a backward pass that is none of ours
        self._fired[-1][parameter] += 1
        if self._now is None or self._now != self._last or len(self._fired) != len(self._usual):
            return
        expected, fired = self._usual[-1], self._fired[-1]
        if fired[parameter] > expected[parameter]:
            self._refuse_if_launched()
        ready = self._launched
        while ready < len(self._buckets) and self._buckets[ready].is_complete(fired, expected):
            ready += 1
        self._launch(ready)

    def _launch(self, until: int) -> None:
        """In order of the buckets, as on all other ranks."""
        span = None if self._last is None else self._ends[self._last]
        for bucket in self._buckets[self._launched : until]:
            if span is not None:
                bucket.take(span)
            bucket.launch()
        self._launched = max(self._launched, until)

    def _refuse_if_launched(self) -> None:
        if self._launched:
            raise WorkloadError(
                "a backward pass came after those that this workload's micro-batches had before, or reached other "
                "parameters: the gradients were on their way to the other ranks. Call backward equally often in every "
                "micro-batch and reach the same parameters, or multiply by zero what a micro-batch has no use for"
            )


class _Bucket:
    """Parameters whose gradients travel together, as one row of float32 numbers."""

    def __init__(self, parameters: list[torch.nn.Parameter], exchange: Exchange) -> None:
        self._exchange = exchange
        self._starts: dict[torch.nn.Parameter, int] = {}
        self._numel = 0
        for parameter in parameters:
            self._starts[parameter] = self._numel
            self._numel += -(-parameter.numel() // _ALIGNED) * _ALIGNED
        self._device = parameters[0].device
        self._sums: dict[range, Tensor] = {}
        self._under_way: UnderWay | None = None

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Those in it."""
        return list(self._starts)

    def is_complete(self, fired: Counter[torch.nn.Parameter], expected: Counter[torch.nn.Parameter]) -> bool:
        """Whether autograd has added to each of them as often as it will."""
        return all(fired[parameter] >= expected[parameter] for parameter in self._starts)

    def take(self, span: range) -> None:
        """Take the gradients away as the sum of these micro-batches."""
        flat = torch.zeros(self._exchange.padded(self._numel), device=self._device)
        for parameter, start in self._starts.items():
            if parameter.grad is not None:
                _view(flat, start, parameter).copy_(parameter.grad)
                let_go(parameter.grad)
                parameter.grad = None
        self._sums[span] = flat
        self._exchange.fold(self._sums)

    def launch(self) -> None:
        """Send the sums off. Does not block."""
        self._under_way = self._exchange.launch(self._sums, self._exchange.padded(self._numel), self._device)
        self._sums = {}

    def add_up(self) -> None:
        """Wait for the others' sums, add them, and send the total off."""
        assert self._under_way is not None
        self._under_way = self._exchange.add_up(self._under_way)

    def give_back(self) -> None:
        """Wait for the total and leave it in ``.grad``."""
        assert self._under_way is not None
        flat = self._exchange.wait(self._under_way)
        self._under_way = None
        for parameter, start in self._starts.items():
            parameter.grad = _view(flat, start, parameter).to(parameter.dtype)


def _view(flat: Tensor, start: int, parameter: torch.nn.Parameter) -> Tensor:
    return flat[start : start + parameter.numel()].view(parameter.shape)


def _divide(parameters: list[torch.nn.Parameter], bucket_bytes: int) -> Iterator[list[torch.nn.Parameter]]:
    """Buckets of about this size, the last parameters first."""
    bucket: list[torch.nn.Parameter] = []
    num_bytes = 0
    for parameter in reversed(parameters):
        bucket.append(parameter)
        num_bytes += 4 * parameter.numel()
        if num_bytes >= bucket_bytes:
            yield bucket
            bucket, num_bytes = [], 0
    if bucket:
        yield bucket
