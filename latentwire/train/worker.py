"""One rank: ``python -m latentwire.train.worker --run PATH --attempt N``, started by the agent.

Signals are blocked when it starts (see ``preemption.handler.blocked``) and are let in once the handlers stand, before
torch is imported: a notice in the first seconds is kept, not fatal. How it ended stands in ``rank<r>.json``.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import gc
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from latentwire.config import Config
from latentwire.errors import Fenced, LatentWireError
from latentwire.preemption.handler import EXIT_CODE, Preempted, PreemptionHandler
from latentwire.run.atomic import read_json, write_json
from latentwire.run.directory import Attempt, Run
from latentwire.run.disk import complain
from latentwire.run.journal import Journal

AGENT_PID = "LATENTWIRE_AGENT_PID"
_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Run one rank to its end; returns the exit code: 0 finished, 75 preempted, 1 anything else."""
    parser = argparse.ArgumentParser(description="One rank of an attempt; started by the agent.")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    arguments = parser.parse_args()
    die_with_the_agent(int(os.environ[AGENT_PID]))
    run = Run(arguments.run)
    attempt = Attempt(run, arguments.attempt)
    verdict = _judge(run, attempt) | {"time": time.time()}
    try:
        write_json(attempt.path / f"rank{os.environ.get('RANK', '0')}.json", verdict)
    except OSError as error:  # a full disk: the exit code and stderr must do
        complain(f"{verdict.get('error') or verdict['outcome']} (and {error})")
    return {"finished": 0, "preempted": EXIT_CODE}.get(verdict["outcome"], 1)


def die_with_the_agent(agent_pid: int) -> None:
    """Have the kernel kill this process when the agent dies: a rank nobody looks after must not train on."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != agent_pid:
        sys.exit("the agent is gone")


def _judge(run: Run, attempt: Attempt) -> dict[str, Any]:
    """Train; say how it ended. An error is printed whole here and goes on to the agent as a verdict."""
    try:
        config = run.checked_config()
        handler = PreemptionHandler(config.preemption.save_signal)
        handler.install()  # for good: a signal must not kill a rank that is about to say how it ended
        step = _train(run, attempt, config, handler)
    except Preempted as preempted:
        return {"outcome": "preempted", "step": preempted.step, "error": preempted.error}
    except Fenced as fenced:
        return {"outcome": "fenced", "error": str(fenced)}
    except Exception as error:  # not swallowed: told in three places, and the exit code says so
        complain(traceback.format_exc())
        verdict = {"outcome": "failed", "cause": cause_of(error), "error": f"{type(error).__name__}: {error}"}
        return verdict | {"traceback": traceback.format_exc()}
    return {"outcome": "finished", "step": step}


def _train(run: Run, attempt: Attempt, config: Config, handler: PreemptionHandler) -> int:
    gc.disable()  # imports leave no garbage, and collections among a million new objects take a sixth of their time
    import torch

    from latentwire.elastic.planner import Placement
    from latentwire.target import load_target
    from latentwire.train.precision import make_repeatable
    from latentwire.train.ranks import Ranks
    from latentwire.train.session import Session
    from latentwire.train.watch import Standing, Watchdog

    make_repeatable(config.train.cpu_threads, config.train.deterministic)
    placement = Placement.from_json(read_json(attempt.path / "placement.json"))
    device = torch.device(placement.devices[int(os.environ["RANK"])][0])
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else whatever names no device opens a context on the first GPU
    journal = Journal(attempt.path / f"events.rank{os.environ['RANK']}.jsonl")
    standing = Standing()
    has_company = placement.world_size > 1
    with Watchdog(standing, config.elastic.hang_s, journal.event) if has_company else contextlib.nullcontext():
        ranks = Ranks.connect(device, config.elastic.timeout_s, standing)
        session = Session.attach(run, attempt, config, handler, ranks, journal)
        session.safe_point()
        target = load_target(config.workload.target)
        gc.freeze()
        gc.enable()
        if isinstance(target, type):
            from latentwire.train.loop import train

            train(session, target(config.workload.options), placement)
        else:
            target(session)
            session.end()
        ranks.disconnect()
    return session.step


def cause_of(error: Exception) -> str:
    """``oom``, ``network``, ``user`` (would fail again) or ``other``."""
    import torch

    from latentwire.train.memory import is_out_of_memory

    if is_out_of_memory(error):
        return "oom"
    if isinstance(error, ConnectionError | TimeoutError | torch.distributed.DistNetworkError):
        return "network"
    return "user" if isinstance(error, LatentWireError) else "other"


def _leave(code: int) -> None:
    """Once the threads that save are done, end at once.

    The interpreter's own end may wait for collectives that this rank began and the others, which miss it, cannot
    finish; and its last collections walk all of torch, 0.6 s of the grace.
    """
    atexit.register(os._exit, code)
    sys.exit(code)


if __name__ == "__main__":
    _leave(main())
