"""Forks processes that restore from a folder of checkpoints, with little memory and processor time to do it in.

``python reading_server.py`` reads the folders, one per line, and tells what came of each, in JSON. It is a process of
its own so that every attack costs a fork, not the start of an interpreter, and so that nothing of the tests' own memory
is counted.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

from checkpoint_parts import Events, open_manager

from latentwire.checkpoint import layout, reader

MEMORY = 1 << 30
"""Bytes of address space that a reader may take beyond what the interpreter has."""
CPU_S = 60
MAX_BYTES = 100 << 20
"""What a checkpoint of this run can have at most."""


def main() -> None:
    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _bound()
            os.write(writing, json.dumps(_restore(Path(line.strip()))).encode())
            os._exit(0)
        os.close(writing)
        with open(reading, "rb") as told:
            answer = told.read()
        _, status, usage = os.wait4(child, 0)
        outcome = json.loads(answer) if answer else {"died": os.waitstatus_to_exitcode(status)}
        print(json.dumps(outcome | {"cpu_s": usage.ru_utime + usage.ru_stime, "rss_kib": usage.ru_maxrss}), flush=True)


def _bound() -> None:
    """What exceeds it gets a MemoryError, or SIGXCPU."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    sys.set_int_max_str_digits(0)  # as somebody may have it: our own limit has to do


def _restore(folder: Path) -> dict[str, object]:
    """What a restarted job and ``latentwire checkpoints`` do."""
    events = Events()
    manager = open_manager(folder, token=2, event=events)
    try:
        manager.sweep()
        for path in manager.committed():
            reader.is_verified(path)
        loaded = manager.restore(max_bytes=MAX_BYTES)
        metrics = {path.name: reader.read_metrics(path) for path in manager.committed()}
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    quarantined = [event["reason"] for event in events.named("checkpoint_quarantined")]
    step = None if loaded is None else loaded.manifest.step
    sound = step is not None and layout.step_name(step) in metrics
    return {"step": step, "quarantined": quarantined, "sound": sound}


if __name__ == "__main__":
    main()
