"""How long the dashboard takes with 200 runs and a million points, in a headless Chromium.

    python benchmarks/dashboard.py [--runs 200] [--points 1000000] [--chromium /usr/bin/chromium]
    python benchmarks/dashboard.py --screenshots DIR --runs-dir runs --run NAME

The first makes runs of synthetic journals in a temporary folder, starts the server, loads its pages and prints a table.
The second takes the two pictures of the README from real runs.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

ROWS_SHOWN = "document.querySelectorAll('tbody tr').length >= {runs}"
FLEET_SHOWN = "document.querySelectorAll('tbody .state').length >= {runs}"
TABLES_SHOWN = "document.querySelectorAll('h1, .scroll table').length >= 3"
SKETCH_SHOWN = "document.querySelectorAll('.sketch').length >= 2"
RUN_SHOWN = "document.querySelectorAll('.scatterlayer .js-line').length >= 2"
ALL_SHOWN = "document.body.textContent.includes('{points:,} steps')"
LONGEST_TASK = """
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) window.longest = Math.max(window.longest || 0, entry.duration);
}).observe({ entryTypes: ["longtask"] });
"""


def write_run(runs_dir: Path, name: str, num_steps: int, num_attempts: int = 3) -> Path:
    """A run that was preempted so often, each attempt with an equal share of the steps; returns its last metrics."""
    folder = runs_dir / f"experiment_{name}"
    begin = time.time() - 3600
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"name: {name}\n")
    _write(folder / "events.orchestrator.jsonl", [_event(begin - 5, "submitted", job_id="1", number=1)])
    share = num_steps // num_attempts
    for number in range(1, num_attempts + 1):
        attempt = folder / "attempts" / f"{number:04d}"
        attempt.mkdir(parents=True)
        started = begin + (number - 1) * 1000
        _write(attempt / "attempt.json", [{"number": number, "job_id": "1", "scheduler": "local", "claimed": started}])
        first = (number - 1) * share
        told = [
            _event(started, "attempt_started", total_steps=num_steps),
            _event(started + 900, "attempt_ended", outcome="preempted", step=first + share),
        ]
        _write(attempt / "events.agent.jsonl", told)
        told = [_event(started + 20, "training_started", step=first, total_steps=num_steps)]
        for save in range(20):
            at = started + 30 + 40 * save
            step = first + (save + 1) * share // 20
            told += [_event(at, "save_staged", step=step, seconds=0.1), _event(at + 1, "save_committed", step=step)]
            told += [_event(at + 2, "save_verified", step=step)]
        _write(attempt / "events.rank0.jsonl", told)
        last = num_steps if number == num_attempts else first + share
        _write_metrics(attempt / "metrics.jsonl", first, last, started, 880 / max(1, share))
        gpus = [{"index": i, "uuid": f"GPU-{i}", "utilisation_percent": 90, "power_w": 500.0} for i in range(4)]
        _write(attempt / "gpu_stats.jsonl", [{"time": started + i, "host": {}, "gpus": gpus} for i in range(0, 900, 5)])
    return attempt / "metrics.jsonl"


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _event(at: float, name: str, **fields: Any) -> dict[str, Any]:
    return {"time": at, "event": name, **fields}


def metrics_line(step: int, at: float, step_s: float = 0.1) -> str:
    """A line as rank 0 writes it, with all its figures."""
    loss = 8.0 / (1 + step / 1e4) ** 0.3 + random.random() * 0.2
    return (
        f'{{"time": {at:.3f}, "step": {step}, "loss": {loss:.6f}, "lr": 0.0003, "grad_norm": {random.random():.6f}, '
        f'"samples_per_s": {160 + random.random():.3f}, "tokens_per_s": 81920.5, "step_s": {step_s:.4f}, '
        f'"save_s": 0.0, "data_s": 0.0011, "forward_backward_s": 0.0711, "reduction_s": 0.0123, "optimizer_s": 0.0081, '
        f'"deaf_s": 0.0712, "loss/llama": {loss:.6f}, "loss/qwen": {loss:.6f}}}\n'
    )


def _write_metrics(path: Path, first: int, last: int, started: float, each_s: float) -> None:
    with path.open("w") as file:
        file.writelines(
            metrics_line(s, started + 20 + (s - first) * each_s, each_s) for s in range(first + 1, last + 1)
        )


@contextmanager
def served(runs_dir: Path) -> Iterator[tuple[str, float]]:
    """The dashboard in a process of its own: its address, and the seconds until it answered."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "latentwire", "dashboard", "--port", "0", "--runs-dir", str(runs_dir)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        yield address, time.perf_counter() - began
    finally:
        server.terminate()
        server.wait()


def timed(page: Page, address: str, shown: str) -> float:
    """Seconds from the request until the page shows what it is about."""
    began = time.perf_counter()
    page.goto(address, wait_until="commit")
    waited(page, shown)
    return time.perf_counter() - began


def waited(page: Page, shown: str) -> float:
    """Seconds until it is. Polls from outside: the page's policy lets no text become a program in it."""
    began = time.perf_counter()
    deadline = time.monotonic() + 120
    while not page.evaluate(shown):
        assert time.monotonic() < deadline, f"waited for: {shown}"
        time.sleep(0.005)
    return time.perf_counter() - began


def measure(browser: Browser, num_runs: int, num_points: int) -> list[tuple[str, str]]:
    """The rows of the table."""
    with tempfile.TemporaryDirectory() as folder:
        runs_dir = Path(folder)
        for index in range(num_runs - 1):
            write_run(runs_dir, f"run-{index:03d}", 1000)
        growing = write_run(runs_dir, "million", num_points)
        page = browser.new_page()
        page.goto("about:blank")
        page.add_init_script(LONGEST_TASK)
        with served(runs_dir) as (address, start_s):
            fleet, run = FLEET_SHOWN.format(runs=num_runs), f"{address}runs/million"
            rows = [("server: start to first answer", f"{start_s:.2f} s")]
            first_s = timed(page, address, ROWS_SHOWN.format(runs=num_runs))
            rows.append((f"fleet of {num_runs} runs, first load: the names", f"{first_s:.2f} s"))
            rows.append(
                (f"fleet of {num_runs} runs, first load: the state of each", f"{first_s + waited(page, fleet):.2f} s")
            )
            rows.append((f"fleet of {num_runs} runs, again: the state of each", f"{timed(page, address, fleet):.2f} s"))
            first_s = timed(page, run, TABLES_SHOWN)
            rows.append((f"run of {num_points:,} points, first load: status and tables", f"{first_s:.2f} s"))
            first_s += waited(page, f"{SKETCH_SHOWN} || {RUN_SHOWN}")
            rows.append(("and the curve without axes", f"{first_s:.2f} s"))
            first_s += waited(page, RUN_SHOWN)
            rows.append(("and charts with a glimpse of the curve, plotly's script compiled", f"{first_s:.2f} s"))
            first_s += waited(page, ALL_SHOWN.format(points=num_points))
            rows.append(("and with all of the curve", f"{first_s:.2f} s"))
            again_s = timed(page, run, f"{RUN_SHOWN} && {ALL_SHOWN.format(points=num_points)}")
            rows.append((f"run of {num_points:,} points, again: all charts, all of the curve", f"{again_s:.2f} s"))
            rows += live(page, growing, num_points)
    return rows


def live(page: Page, metrics: Path, num_points: int) -> list[tuple[str, str]]:
    """How late a new step is seen, and how long the page is ever busy while 20 steps a second arrive."""
    page.wait_for_timeout(3000)
    page.evaluate("window.longest = 0")
    late = []
    step = num_points
    for _ in range(5):
        with metrics.open("a") as file:
            for _ in range(20):
                step += 1
                file.write(metrics_line(step, time.time()))
        late.append(waited(page, ALL_SHOWN.format(points=step)))
        page.wait_for_timeout(500)
    longest = page.evaluate("window.longest || 0")
    return [
        ("a new step is seen after, median", f"{sorted(late)[2]:.2f} s"),
        ("longest task of the page meanwhile", f"{longest:.0f} ms"),
    ]


def take_screenshots(browser: Browser, runs_dir: Path, run: str, folder: Path) -> None:
    """The two pictures of the README."""
    folder.mkdir(parents=True, exist_ok=True)
    with served(runs_dir) as (address, _):
        for name, path, height, shown in (
            ("dashboard-fleet", "", 470, FLEET_SHOWN.format(runs=1)),
            ("dashboard-run", f"runs/{run}", 1180, RUN_SHOWN),
        ):
            page = browser.new_page(viewport={"width": 1280, "height": height})
            timed(page, address + path, shown)
            page.wait_for_timeout(4000)
            page.screenshot(path=folder / f"{name}.png")


def main() -> None:
    """Parse the command line, and measure or take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--screenshots", type=Path)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--run")
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox"])
        if arguments.screenshots:
            take_screenshots(browser, arguments.runs_dir, arguments.run, arguments.screenshots)
            return
        rows = measure(browser, arguments.runs, arguments.points)
    print("| what | took |\n|---|---|")
    for what, took in rows:
        print(f"| {what} | {took} |")


if __name__ == "__main__":
    main()
