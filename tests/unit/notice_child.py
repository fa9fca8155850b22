"""A process with a PreemptionHandler that does what it is told on its standard input and answers in JSON.

It says hello before it installs anything, so that signals can be sent to it before, after, or while they are blocked.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from latentwire.preemption.handler import PreemptionHandler, ignore_signals


def state(handler: PreemptionHandler) -> dict[str, Any]:
    return {
        "notice": None if handler.notice is None else dataclasses.asdict(handler.notice),
        "save_asked": handler.take_save_request(),
        "leave_now": handler.leave_now,
    }


def fork(prepare: Callable[[], None]) -> int:
    """A forked child that waits for signals, its handlers as they are after ``prepare``."""
    ready, say_ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        prepare()
        os.write(say_ready, b".")
        while True:
            signal.pause()
    os.read(ready, 1)
    return pid


def main() -> None:
    handler = PreemptionHandler(save_signal=sys.argv[1])
    orders: dict[str, Callable[[], Any]] = {
        "install": handler.install,
        "uninstall": handler.uninstall,
        "ping": lambda: None,
        "state": lambda: state(handler),
        "fork": lambda: fork(lambda: None),
        "fork a worker": lambda: fork(ignore_signals),
    }
    print(json.dumps("hello"), flush=True)
    for line in sys.stdin:
        order, _, argument = line.strip().partition(":")
        if order == "reap":
            answer: Any = os.waitstatus_to_exitcode(os.waitpid(int(argument), 0)[1])
        else:
            answer = orders[order]()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
