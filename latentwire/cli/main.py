"""``latentwire``: where the command line begins, and how it ends.

``status`` does not go through typer, which with the pydantic that it imports takes longer to start than all that
``status`` does. A person looks at it again and again; it answers in under 0.3 s.
"""

from __future__ import annotations

import os
import sys

from latentwire.cli import status
from latentwire.cli.text import visible
from latentwire.errors import LatentWireError


def main() -> None:
    """Run the command line and exit: 0 done, 1 an error that was explained, 2 wrong usage, 130 after Ctrl-C."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal has no letters for is no failure
    try:
        try:
            _dispatch(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` say, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own last flush
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except (LatentWireError, OSError) as error:
        print(f"latentwire: {visible(str(error))}", file=sys.stderr)
        sys.exit(1)


def _dispatch(arguments: list[str]) -> None:
    if arguments[:1] == ["status"]:
        status.main(arguments[1:])
        return
    from latentwire.cli.app import app

    app(arguments, prog_name="latentwire")
