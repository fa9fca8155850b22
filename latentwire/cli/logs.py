"""``latentwire logs``: what the ranks printed."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentwire.cli import DEFAULT_RUNS_DIR
from latentwire.cli.arguments import (
    AttemptOption,
    FollowOption,
    RunArgument,
    RunsDirOption,
    find_attempt,
)
from latentwire.cli.following import follow as follow_run
from latentwire.cli.text import visible
from latentwire.run.atomic import open_to_read

if TYPE_CHECKING:
    from latentwire.run.directory import Attempt

_BLOCK_BYTES = 64 * 1024


def logs(
    run: RunArgument,
    attempt: AttemptOption = None,
    stderr: Annotated[bool, typer.Option("--stderr", help="stderr.log instead of stdout.log.")] = False,
    follow: FollowOption = False,
    lines: Annotated[int | None, typer.Option(metavar="N", help="Begin with the last N lines.", min=0)] = None,
    runs_dir: RunsDirOption = DEFAULT_RUNS_DIR,
) -> None:
    """Show what a run printed.

    That is the newest attempt, or --attempt; --follow goes on into the attempts after it.
    """
    from latentwire.run.directory import Attempt, open_run

    opened = open_run(run, runs_dir)
    waiting = follow and attempt is None and not opened.attempts()
    first = Attempt(opened, 0) if waiting else find_attempt(opened, attempt)  # 0 has no files, and all come after it
    log = _Log(first, "stderr.log" if stderr else "stdout.log", lines)
    if follow:
        follow_run(opened, log.copy_new_and_go_on)
    elif not log.copy_new():
        print(f"latentwire: nothing in {visible(str(log.path))}", file=sys.stderr)


class _Log:
    """Copies a log to stdout, attempt after attempt."""

    def __init__(self, first: Attempt, name: str, lines: int | None) -> None:
        self._attempt = first
        self._name = name
        self._offset = 0 if lines is None else _offset_of_last(self.path, lines)
        self._write = _writer()

    @property
    def path(self) -> Path:
        return self._attempt.path / self._name

    def copy_new(self) -> bool:
        start = self._offset
        try:
            with open_to_read(self.path) as file:
                file.seek(start)
                while block := file.read(_BLOCK_BYTES):
                    self._write(block)
                    self._offset += len(block)
        except FileNotFoundError:  # the ranks were not started yet
            return False
        return self._offset > start

    def copy_new_and_go_on(self) -> bool:
        newer = [a for a in self._attempt.run.attempts() if a.number > self._attempt.number]
        if self.copy_new():
            return True
        if not newer:
            return False
        self._attempt, self._offset = newer[0], 0
        sys.stdout.flush()
        print(f"==> attempt {self._attempt.number} <==", file=sys.stderr, flush=True)
        return True


def _writer() -> Callable[[bytes], object]:
    """Into a file or pipe the bytes as they are; onto a terminal with control characters written out."""
    if not sys.stdout.isatty():
        return sys.stdout.buffer.write
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    return lambda data: sys.stdout.write(visible(decoder.decode(data)))


def _offset_of_last(path: Path, lines: int) -> int:
    """Where the last ``lines`` lines of a file begin; reads backwards, so that a long log costs no more."""
    try:
        with open_to_read(path) as file:
            position = file.seek(0, os.SEEK_END)
            if lines == 0:
                return position
            missing = lines
            end = position - 1  # a newline at the very end begins no line
            while end > 0:
                begin = max(0, end - _BLOCK_BYTES)
                file.seek(begin)
                block = file.read(end - begin)
                found = len(block)
                while (found := block.rfind(b"\n", 0, found)) >= 0:
                    missing -= 1
                    if missing == 0:
                        return begin + found + 1
                end = begin
    except FileNotFoundError:
        pass
    return 0
