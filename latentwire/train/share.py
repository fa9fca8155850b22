"""A rank's share of every global batch: what makes a loop give the same bits on 1, 2, 3 or 4 GPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from latentwire.elastic import schedule
from latentwire.errors import RunError
from latentwire.train import randomness
from latentwire.train.feed import Feed
from latentwire.train.order import derive_seed
from latentwire.train.reduction import Reduction
from latentwire.train.side_streams import SideStreams

if TYPE_CHECKING:
    from latentwire.train.session import Session


class Share:
    """The micro-batches of each step that are this rank's, and the gradient of the whole step. Made by Session.share.

    Iterate over it once in each step of ``session.steps``, call ``backward`` for the loss of each batch, then
    ``reduce`` before the optimizer. Samples, their order and the random generators depend on the step and the
    micro-batch alone, never on the rank.
    """

    def __init__(self, session: Session, parameters: Iterable[torch.nn.Parameter], feed: Feed) -> None:
        ranks = session.ranks
        self.feed = feed
        self.num_micro_batches = feed.num_micro_batches
        self.index = 0
        """The micro-batch of the step that is being computed."""
        self.num_slots = schedule.num_slots(ranks.world_size, self.num_micro_batches)
        """Safe points that every rank passes in a step."""
        self._session = session
        self._reduction = Reduction(parameters, ranks, self.num_micro_batches, session.config.elastic.exact)
        self._streams = SideStreams(())
        self._batches: Iterator[Any] | None = None
        self._next_step = 0
        self._is_reduced = True

    def lay_over(self, devices: Sequence[torch.device], in_flight: int) -> None:
        """Compute micro-batches over these GPUs, so many at once. Called before the first; the placement decides."""
        self._streams = SideStreams(devices, in_flight)

    def __iter__(self) -> Iterator[Any]:
        """This rank's micro-batches of the present step; on some ranks possibly none. Every rank.

        Raises:
            Preempted: see ``Session.safe_point``.
        """
        session = self._session
        if not self._is_reduced:
            raise RunError("the gradients of the last step were not summed up: call reduce() before optimizer.step()")
        if self._batches is None:
            self._batches, self._next_step = self.feed.batches(session.step), session.step
        if session.step != self._next_step:
            raise RunError(f"step {session.step}: go over a share once in each step; its next is {self._next_step}")
        self._is_reduced, self._next_step = False, session.step + 1
        for slot in range(self.num_slots):
            session.safe_point()  # every rank passes as many, also one with fewer micro-batches
            if slot >= len(self.feed.mine):
                continue
            self.index = self.feed.mine[slot]
            with session.clock("data"):
                batch = next(self._batches)
            randomness.seed_everything(derive_seed(session.config.seed, "step", session.step, self.index))
            self._reduction.begin(self.index)
            with self._streams.micro_batch():
                with session.clock("forward_backward"):
                    yield batch
                self._reduction.end()
        self._streams.join()
        # from here to the next micro-batch the same on every rank
        randomness.seed_everything(derive_seed(session.config.seed, "boundary", session.step))

    def backward(self, loss: torch.Tensor) -> None:
        """Instead of ``loss.backward()``, for the mean loss of a micro-batch, once or several times.

        Raises:
            WorkloadError: more often than in earlier micro-batches, and the gradients are on their way already.
        """
        self._streams.before_backward()
        self._reduction.backward(loss / self.num_micro_batches)

    def reduce(self) -> None:
        """Leave the gradient of the mean loss of the global batch in ``.grad``, the same on every rank. Collective.

        Raises:
            RunError: there is none yet in this step.
        """
        if self._is_reduced:
            raise RunError("reduce() comes once in a step, after going over the share")
        with self._session.clock("reduction"):
            self._reduction.finish()
        if self._reduction.exchange_s is not None:
            self._session.log(exchange_s=self._reduction.exchange_s)
        self._is_reduced = True
        self._session.counters["samples"] += self.num_micro_batches * self.feed.micro_batch

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Inside, one micro-batch may be computed whose gradients the caller throws away."""
        self._reduction.begin(None)
        with self._streams.micro_batch():
            yield
        self._streams.join()
        self._reduction.end()

    def close(self) -> None:
        """End the workers that fetch samples; an interpreter that ends would wait for them. Called by the session."""
        self._batches = None
