"""A run on one page of HTML that needs nothing else: to be sent, kept, and opened on a laptop."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import os
import sys
import time
from pathlib import Path

from latentwire.errors import LatentWireError
from latentwire.run.atomic import write_text
from latentwire.run.directory import Run
from latentwire.views.encoding import as_script
from latentwire.views.run_page import RunPage

SCRIPTS = ("page.js", "charts.js", "run.js")
"""Of the run page, in the order in which they are loaded."""

REPORT = "report.html"

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header class="bar"><strong>LatentWire</strong> <span id="made"></span></header>
<main id="main" tabindex="-1"></main>
<noscript>The pictures and tables of this report are drawn by the scripts in it.</noscript>
<script type="application/json" id="data">{data}</script>
{scripts}
</body>
</html>
"""


def write_report(run: Run, path: Path) -> None:
    """Write the report of a run as it is now. Blocks for a whole read of its metrics.

    Raises:
        LatentWireError: plotly is not installed.
        OSError: the file cannot be written.
    """
    write_text(path, report(run))


def report(run: Run) -> str:
    """The page; see ``write_report``."""
    page = RunPage(run)
    page.read()
    while page.has_glimpse:
        page.read()
    data = {"now": time.time(), "sections": page.snapshot()}
    scripts = [plotly_script(), *map(static, SCRIPTS), static("report.js")]
    sources = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    return _PAGE.format(
        policy=f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; img-src data:",
        title=html.escape(f"{run.name} - LatentWire"),
        style=static("style.css"),
        data=as_script(data),
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )


def static(name: str) -> str:
    """A file of the page."""
    return (importlib.resources.files("latentwire.views") / "static" / name).read_text(encoding="utf-8")


def plotly_script() -> str:
    """The script that comes with the installed plotly; no other copy is kept, and no network is asked.

    Raises:
        LatentWireError: it is not installed.
    """
    try:
        package = importlib.resources.files("plotly.package_data")
        return (package / "plotly.min.js").read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError):
        raise LatentWireError("plotly draws the charts and is missing: pip install 'latentwire[dashboard]'") from None


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


if __name__ == "__main__":  # by the orchestrator or a job, without the command line's imports
    os.nice(10)
    try:
        write_report(Run(Path(sys.argv[1])), Path(sys.argv[1]) / REPORT)
    except (LatentWireError, OSError) as problem:
        sys.exit(str(problem))
