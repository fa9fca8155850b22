"""What is answered at which address. A name in an address is looked up among the runs; it never becomes a path."""

from __future__ import annotations

import asyncio
import importlib.resources
import logging
import signal
from importlib.metadata import version
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from latentwire.dashboard.live import Live
from latentwire.errors import LatentWireError, RunNotFound
from latentwire.run.directory import Run, list_runs
from latentwire.run.disk import told
from latentwire.run.prometheus import CONTENT_TYPE, Scrape, exposition
from latentwire.scheduler.control import cancel_run, save_run, signal_run
from latentwire.views.fleet_page import FleetPage
from latentwire.views.report import SCRIPTS, static
from latentwire.views.run_page import RunPage

log = logging.getLogger("latentwire.dashboard")

_LOOK_S, _LOOK_AT_ALL_S = 1.0, 2.0
_MOST_RUNS_KEPT = 8
_FOREVER = {"Cache-Control": "public, max-age=31536000, immutable"}
_STREAM = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class Dashboard:
    """The pages, the streams behind them, and the actions.

    Args:
        runs_dir: the folder of the runs.
        allow_actions: whether a POST may save, preempt or cancel.
    """

    def __init__(self, runs_dir: Path, allow_actions: bool) -> None:
        self._runs_dir = runs_dir
        self._allow_actions = allow_actions
        self._fleet = Live(FleetPage(runs_dir), "fleet", _LOOK_AT_ALL_S, {})
        self._runs: dict[str, Live] = {}
        self._unreadable: set[str] = set()

    def app(self) -> Starlette:
        """All addresses, unguarded."""
        routes = [
            Route("/", self.fleet_page),
            Route("/runs/{name}", self.run_page),
            Route("/api/fleet", self.fleet),
            Route("/api/runs/{name}", self.run),
            Route("/api/runs/{name}/{action}", self.act, methods=["POST"]),
            Route("/metrics", self.metrics),
            Route("/static/plotly.min.js", plotly),
            Mount("/static", StaticFiles(packages=[("latentwire.views", "static")])),
        ]
        return Starlette(routes=routes)

    def end_streams(self) -> None:
        """Called when the server stops, which waits for its streams."""
        for live in (self._fleet, *self._runs.values()):
            live.end()

    async def fleet_page(self, request: Request) -> Response:
        """The empty page of all runs; its script asks for the data."""
        return _page("page.js", "live.js", "fleet.js")

    async def run_page(self, request: Request) -> Response:
        """The empty page of a run."""
        preload = f'<link rel="preload" as="script" href="/static/plotly.min.js?{version("plotly")}">\n'
        return _page(*SCRIPTS, "live.js", "run_live.js", before=preload)

    async def fleet(self, request: Request) -> Response:
        """The stream of all runs."""
        return StreamingResponse(self._fleet.stream(), media_type="text/event-stream", headers=_STREAM)

    async def run(self, request: Request) -> Response:
        """The stream of a run."""
        found = await self._find(request)
        live = self._runs.pop(found.name, None)
        if live is None:
            live = Live(_page_of(found), "sections", _LOOK_S, {"actions": self._allow_actions})
        self._runs[found.name] = live  # the newest last
        for name in list(self._runs)[:-_MOST_RUNS_KEPT]:
            del self._runs[name]  # who looks at it goes on doing so
        return StreamingResponse(live.stream(), media_type="text/event-stream", headers=_STREAM)

    async def act(self, request: Request) -> Response:
        """Save, preempt or cancel, in words what was done."""
        if not self._allow_actions:
            raise HTTPException(403, "this dashboard only reads; start it with --allow-actions")
        found, action = await self._find(request), request.path_params["action"]
        try:
            if action == "save":
                said = f"asked {await asyncio.to_thread(save_run, found)} to save and go on"
            elif action == "preempt":
                said = f"sent SIGTERM to {await asyncio.to_thread(signal_run, found, signal.SIGTERM)}"
            elif action == "cancel":
                said = "; ".join(await asyncio.to_thread(cancel_run, found))
            else:
                raise HTTPException(404, "there are save, preempt and cancel")
        except LatentWireError as error:
            return PlainTextResponse(str(error), 409)
        return PlainTextResponse(said)

    async def metrics(self, request: Request) -> Response:
        """All runs for Prometheus, but for those that cannot be read."""
        return Response(await asyncio.to_thread(self._exposition), media_type=CONTENT_TYPE)

    def _exposition(self) -> str:
        return exposition(scrape for run in list_runs(self._runs_dir) if (scrape := self._scrape(run)) is not None)

    def _scrape(self, run: Run) -> Scrape | None:
        try:
            scrape = Scrape.of(run)
        except Exception:  # whatever one run's files hold, the others are told of
            if run.name not in self._unreadable:  # once, not at every scrape
                log.exception("%s cannot be read and is left out of /metrics", run.path)
            self._unreadable.add(run.name)
            return None
        self._unreadable.discard(run.name)
        return scrape

    async def _find(self, request: Request) -> Run:
        name = request.path_params["name"]
        runs = await asyncio.to_thread(list_runs, self._runs_dir)
        found = next((run for run in runs if run.name == name), None)
        if found is None:
            raise HTTPException(404, str(RunNotFound(f"there is no run {name!r}")))
        return found


async def plotly(request: Request) -> Response:
    """The script of the installed plotly, which a browser asks for once."""
    with importlib.resources.as_file(importlib.resources.files("plotly.package_data") / "plotly.min.js") as path:
        return FileResponse(path, headers=_FOREVER)


def _page_of(run: Run) -> RunPage:
    try:
        return RunPage(run)
    except OSError as error:  # another user's
        raise HTTPException(409, told(error)) from None


def _page(*scripts: str, before: str = "") -> Response:
    tags = before + "".join(f'<script src="/static/{name}"></script>\n' for name in scripts)
    return HTMLResponse(static("page.html").replace("SCRIPTS", tags), headers={"Cache-Control": "no-store"})
