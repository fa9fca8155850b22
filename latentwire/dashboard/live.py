"""One source that is read in the background, and many who look."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

from latentwire.views.encoding import as_json

log = logging.getLogger("latentwire.dashboard")

_MOST_UNSENT = 100
_KEEP_OPEN_S = 15.0


class Source(Protocol):
    """What is shown: a run's page, or the fleet's."""

    def read(self) -> Mapping[str, Any] | None:
        """What has changed since the last call; empty or None: nothing. May block.

        Where ``unfinished`` is true in it, it is called again at once.
        """

    def snapshot(self) -> Mapping[str, Any]:
        """All as of the last ``read``."""


class Live:
    """Reads a source while somebody looks, and sends each what is new. In the event loop's thread; reads in others.

    Args:
        source: never touched by two threads at a time.
        name: of its part in the messages.
        pause_s: between two reads.
        facts: in each first message.
    """

    def __init__(self, source: Source, name: str, pause_s: float, facts: Mapping[str, Any]) -> None:
        self._source, self._name, self._pause_s, self._facts = source, name, pause_s, facts
        self._turn = asyncio.Lock()
        self._lookers: set[asyncio.Queue[bytes | None]] = set()
        self._reading: asyncio.Task[None] | None = None
        self._joining: set[asyncio.Task[Mapping[str, Any]]] = set()
        self._failure = ""

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events for one who looks: first everything, then what changes."""
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(_MOST_UNSENT)
        joining = asyncio.create_task(self._join(queue))
        self._joining.add(joining)
        joining.add_done_callback(self._joining.discard)
        try:
            # Who leaves now ends this stream, not the thread that reads: until that is done it must keep its turn.
            first = await asyncio.shield(joining)
            yield self._message(first, self._facts)
            while True:
                try:
                    message = await asyncio.wait_for(queue.get(), _KEEP_OPEN_S)
                except TimeoutError:
                    message = b": still here\n\n"
                if message is None:
                    return
                yield message
        finally:
            joining.add_done_callback(lambda _: self._lookers.discard(queue))

    async def _join(self, queue: asyncio.Queue[bytes | None]) -> Mapping[str, Any]:
        """Everything up to now; what changes later goes into the queue."""
        async with self._turn:
            if self._reading is None:
                changed = await asyncio.to_thread(self._read)
                self._reading = asyncio.create_task(self._go_on(changed))
            first = await asyncio.to_thread(self._source.snapshot)
            self._lookers.add(queue)
        return first

    def end(self) -> None:
        """Let all streams end; who looks then comes again, if there is still a server."""
        for queue in list(self._lookers):
            self._end(queue)

    def _end(self, queue: asyncio.Queue[bytes | None]) -> None:
        self._lookers.discard(queue)
        with contextlib.suppress(asyncio.QueueEmpty):
            queue.get_nowait()  # so that there is room
        queue.put_nowait(None)

    async def _go_on(self, changed: Mapping[str, Any] | None) -> None:
        while True:
            await asyncio.sleep(0 if changed and changed.get("unfinished") else self._pause_s)
            async with self._turn:
                if not self._lookers:
                    self._reading = None
                    return
                changed = await asyncio.to_thread(self._read)
                if changed:  # inside the turn: who comes next has it in the first message
                    self._send(self._message(changed, {}))

    def _read(self) -> Mapping[str, Any] | None:
        try:
            changed = self._source.read()
        except Exception as error:  # a network file system that is away, or whatever a file holds: the next read may do
            if repr(error) != self._failure:  # once, not every second
                log.exception("%s cannot be read now", self._name)
            self._failure = repr(error)
            return None
        self._failure = ""
        return changed

    def _send(self, message: bytes) -> None:
        for queue in list(self._lookers):
            if queue.full():  # who does not take what is sent comes again and gets everything
                self._end(queue)
            else:
                queue.put_nowait(message)

    def _message(self, content: Mapping[str, Any], facts: Mapping[str, Any]) -> bytes:
        return f"data: {as_json({'now': time.time(), self._name: content, **facts})}\n\n".encode()
