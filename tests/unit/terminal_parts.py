"""A program on a terminal of its own: what it draws, keys, another size, and whether it leaves all as it was."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path
from types import TracebackType

from cli_parts import of_a_terminal, program

PATIENCE_S = 60.0


class Terminal:
    """Runs a command of ``latentwire`` on a pseudo-terminal."""

    def __init__(self, home: Path, *arguments: str, columns: int = 100, lines: int = 30) -> None:
        self._ours, self._theirs = pty.openpty()
        self._set_size(columns, lines)
        self._before = termios.tcgetattr(self._theirs)
        self.drawn = ""
        environ = {**of_a_terminal(), "TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            program(*arguments),
            cwd=home,
            env=environ,
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            start_new_session=True,
            preexec_fn=self._take_control,
        )

    def _take_control(self) -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C and a new size become signals

    def _set_size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def resize(self, columns: int, lines: int) -> None:
        """As a person who drags the window's corner."""
        self._set_size(columns, lines)
        self.process.send_signal(signal.SIGWINCH)

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def wait_for(self, *words: str) -> str:
        """Forget what was drawn, and wait until all of the words were drawn since; all that was."""
        self.drawn = ""
        deadline = time.monotonic() + PATIENCE_S
        while not all(word in self.drawn for word in words):
            assert time.monotonic() < deadline, f"waited for {words}; there is:\n{self.drawn}"
            self._read(0.5)
        return self.drawn

    def end(self) -> int:
        """Wait for the program's end; its exit code. Then the terminal is as it was."""
        deadline = time.monotonic() + PATIENCE_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline
            self._read(0.05)
        while self._read(0.05):
            pass
        assert termios.tcgetattr(self._theirs) == self._before, "keys are echoed again"
        assert self.drawn.rfind("\x1b[?1049l") > self.drawn.rfind("\x1b[?1049h"), "what was there before is back"
        assert self.drawn.rfind("\x1b[?25h") > self.drawn.rfind("\x1b[?25l"), "the cursor is back"
        assert "Traceback" not in self.drawn
        return self.process.returncode

    def _read(self, seconds: float) -> bool:
        if not select.select([self._ours], [], [], seconds)[0]:
            return False
        self.drawn += os.read(self._ours, 1 << 16).decode(errors="replace")
        return True

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)
