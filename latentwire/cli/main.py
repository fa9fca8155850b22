"""``latentwire``: where the command line begins, and how it ends.

``status`` does not go through typer, which with the pydantic that it imports takes longer to start than all that
``status`` does. A person looks at it again and again; it answers in under 0.3 s.
"""

from __future__ import annotations

import os
import signal
import sys

from latentwire.cli import status
from latentwire.cli.text import visible
from latentwire.errors import LatentWireError
from latentwire.run.disk import told


def main() -> None:
    """Run the command line and exit.

    0: done. 1: an error that was explained. 2: wrong usage. 130: after Ctrl-C. 141: the reader of its output, ``head``
    say, had enough; so ends ``cat``, and a command that was cut short must not look like one that found all well.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal has no letters for is no failure
    try:
        try:
            _dispatch(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own last flush
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        sys.exit(130)
    except (LatentWireError, OSError) as error:
        print(f"latentwire: {visible(told(error))}", file=sys.stderr)
        sys.exit(1)


def _dispatch(arguments: list[str]) -> None:
    if arguments[:1] == ["status"]:
        status.main(arguments[1:])
        return
    from latentwire.cli.app import app

    try:
        app(arguments, prog_name="latentwire")
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # of which typer makes an exit with 1
            raise end.__context__ from None
        raise
