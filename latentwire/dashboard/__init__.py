"""The runs live in a browser. Reads files; keeps nothing that is not on disk. The only room with a web server."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def serve(runs_dir: Path, host: str, port: int, allow_actions: bool) -> None:
    """Serve the dashboard until Ctrl-C. Blocks; called by ``latentwire dashboard``.

    Args:
        runs_dir: the folder of the runs.
        host: where to listen; other than this machine alone only with a token.
        port: 0: any that is free.
        allow_actions: offer to save, preempt and cancel.

    Raises:
        LatentWireError: the extra ``dashboard`` is not installed, a token is missing, or the port is taken.
    """
    from latentwire.errors import LatentWireError

    missing = [name for name in ("starlette", "uvicorn", "plotly") if importlib.util.find_spec(name) is None]
    if missing:
        raise LatentWireError(f"the dashboard needs {', '.join(missing)}: pip install 'latentwire[dashboard]'")
    from latentwire.dashboard.serving import serve_forever

    serve_forever(runs_dir, host, port, allow_actions)
