"""``python -m latentwire.monitor``: records GPUs and host beside any job.

The agent starts it with ``--until-stdin-closes`` and a pipe, and ends it by closing the pipe, which the kernel also
does when the agent dies of SIGKILL: no monitor outlives its job.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NoReturn

PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Slurm sends these to every process of the step; the monitor shall record what the job does about it."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Record until told to end; exits with 2 and one line on a wrong argument."""
    parser = _make_parser()
    arguments = parser.parse_args(argv)
    if arguments.thin_earlier and not arguments.output_dir.name.isdigit():
        parser.error("--thin-earlier: --output-dir is no attempt's folder, such as attempts/0003; leave the option out")
    # Before the slow imports: a notice may come while they run.
    if not arguments.until_stdin_closes:
        _record(parser, arguments, end_fd=_closes_on_signal(), root_pid=None)
        return 0
    for number in PREEMPTION_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.__stdin__ is None:
        parser.error("--until-stdin-closes: there is no standard input")
    _record(parser, arguments, end_fd=sys.__stdin__.fileno(), root_pid=os.getppid())
    return 0


def _record(parser: _Parser, arguments: argparse.Namespace, end_fd: int, root_pid: int | None) -> None:
    from latentwire.errors import ConfigError
    from latentwire.monitor.gpu import open_gpus
    from latentwire.monitor.host import HostMonitor
    from latentwire.monitor.sampler import Sampler
    from latentwire.monitor.thin import StatsWriter

    try:
        gpus = open_gpus(arguments.gpus, arguments.interval)
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        stats = StatsWriter(arguments.output_dir / arguments.file_name, arguments.interval)
    except ConfigError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"cannot write to {arguments.output_dir}: {error.strerror}")
    if arguments.thin_earlier:
        # Beside the samples, which are the attempt's sign of life; it may end at any point, so nobody waits for it.
        threading.Thread(target=_thin_earlier, args=(arguments.output_dir.absolute(),), daemon=True).start()
    with gpus, closing(stats):
        host = HostMonitor(arguments.output_dir, root_pid)
        Sampler(stats, host, gpus, arguments.interval, wait=partial(_wait_for_eof, end_fd)).run()


def _thin_earlier(folder: Path) -> None:
    from latentwire.monitor.earlier import thin_earlier
    from latentwire.run.directory import Attempt, Run

    tell = partial(print, file=sys.stderr, flush=True)
    thin_earlier(Attempt(Run(folder.parents[1]), int(folder.name)), tell)


def _closes_on_signal() -> int:
    """A pipe's reading end that reaches EOF at the first INT or TERM; more of them change nothing."""
    read_fd, write_fd = os.pipe()

    def close_once(*_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        os.close(write_fd)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, close_once)
    return read_fd


def _wait_for_eof(fd: int, seconds: float) -> bool:
    """Sleep; True as soon as the other end of ``fd`` closes. What is written there is read and dropped."""
    deadline_s = time.monotonic() + seconds
    while True:
        readable, _, _ = select.select([fd], [], [], max(0.0, deadline_s - time.monotonic()))
        if readable and _is_at_end(fd):
            return True
        if time.monotonic() >= deadline_s:
            return False


def _is_at_end(fd: int) -> bool:
    try:
        return not os.read(fd, 65536)
    except OSError:  # a terminal that is gone
        return True


def _make_parser() -> _Parser:
    parser = _Parser(
        prog="python -m latentwire.monitor",
        description="Append one sample of host and GPUs per interval to a file in DIR. "
        "Without a GPU it records the host only, and says so in the first line.",
    )
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="made if it does not exist")
    parser.add_argument(
        "--file-name",
        type=_file_name,
        default="gpu_stats.jsonl",
        metavar="NAME",
        help="of the file in DIR, gpu_stats*.jsonl (default: %(default)s)",
    )
    parser.add_argument("--interval", type=_seconds, default=1.0, metavar="S", help="seconds a sample (default: 1.0)")
    parser.add_argument(
        "--gpus",
        type=lambda text: [part.strip() for part in text.split(",")],
        metavar="LIST",
        help="indexes or UUIDs, such as 0,1 (default: CUDA_VISIBLE_DEVICES, else all)",
    )
    parser.add_argument(
        "--until-stdin-closes",
        action="store_true",
        help="end when standard input closes, ignoring TERM, INT, USR1 and USR2 (default: end on INT or TERM)",
    )
    parser.add_argument(
        "--thin-earlier",
        action="store_true",
        help="thin what monitors wrote in the attempts before the one whose folder DIR is",
    )
    return parser


def _file_name(text: str) -> str:
    if not re.fullmatch(r"gpu_stats[\w.-]*\.jsonl", text):  # readers find it by that
        raise argparse.ArgumentTypeError(f"{text!r} is no name like gpu_stats.jsonl or gpu_stats.node1.jsonl")
    return text


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
