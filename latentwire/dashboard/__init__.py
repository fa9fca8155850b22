"""The runs live in a browser. Reads files; keeps nothing that is not on disk. The only room with a web server."""

from __future__ import annotations

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

    try:
        import plotly  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as missing:
        raise LatentWireError(
            f"the dashboard needs {missing.name}, which is not installed: pip install 'latentwire[dashboard]'"
        ) from None
    from latentwire.dashboard.serving import serve_forever

    serve_forever(runs_dir, host, port, allow_actions)
