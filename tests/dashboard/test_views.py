"""What is sent to charts and tables is what stands in the files, however many lines and whatever they hold."""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from pathlib import Path

import pytest
from cli_parts import killed_in_mid_line
from hypothesis import example, given, settings
from hypothesis import strategies as st
from running import make_run

from latentwire.run.goodput import Ledger, Span
from latentwire.run.journal import Journal
from latentwire.views import run_page
from latentwire.views.accounts import MAX_STRETCHES, timeline
from latentwire.views.curve import NUM_STRETCHES, CurveView
from latentwire.views.encoding import as_json
from latentwire.views.fleet_page import FleetPage
from latentwire.views.gpus import GpuView
from latentwire.views.run_page import RunPage
from latentwire.views.thinning import Grid, extremes
from latentwire.views.told import NUM_EVENTS

VALUES = st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=400)


@settings(deadline=None, max_examples=300)
@example([0.0] * 6 + [-1.0, 0.0], 3)
@given(VALUES, st.integers(1, 50))
def test_few_points_show_the_same_extremes_as_all(values: list[float], num_stretches: int) -> None:
    shown = extremes(range(len(values)), values, num_stretches)
    points = list(zip(shown["x"], shown["y"], strict=True))
    assert len(points) <= 2 * num_stretches + 2
    assert [x for x, _ in points] == sorted({x for x, _ in points})
    for x, y in points:
        expected = values[x]
        assert y is None if not math.isfinite(expected) else y == pytest.approx(expected, rel=1e-6)
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        known = [y for _, y in points if y is not None]
        assert min(known) == pytest.approx(min(finite), rel=1e-6)
        assert max(known) == pytest.approx(max(finite), rel=1e-6)
        assert points[0][0] == 0
        assert points[-1][0] == len(values) - 1


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(-100, 100)), min_size=1, max_size=200))
def test_a_grid_holds_each_reading_once_whatever_the_order(readings: list[tuple[float, float]]) -> None:
    grid = Grid(max_bins=32)
    for time_s, value in readings:
        grid.add(time_s, {("a", "GPU 0"): value})
    last = max(time_s for time_s, _ in readings)
    grid.add(last + grid.max_bins * grid.width_s / 2, {("b", "GPU 0"): 0.0})  # closes the bin of the last reading
    shown = grid.points(("a", "GPU 0"))
    assert grid.num_bins <= grid.max_bins
    for x, y in zip(shown["x"], shown["y"], strict=True):
        begin, end = x / 1000 - grid.width_s / 2, x / 1000 + grid.width_s / 2
        inside = [value for time_s, value in readings if begin <= time_s < end]
        assert (y is None) == (not inside)
        if inside:
            assert y == pytest.approx(sum(inside) / len(inside), rel=1e-5, abs=1e-5)


def test_a_timeline_of_many_short_spans_can_be_drawn_covers_all_and_keeps_the_long_ones() -> None:
    chance = random.Random(1)
    spans, at = [], 1_000_000
    for _ in range(20_000):
        is_long = chance.random() < 0.001
        length = 60_000 if is_long else chance.randint(1, 50)
        spans.append(Span("draining" if is_long else chance.choice(("training", "saving")), at, at + length, 1, "", 0))
        at += length
    shown = timeline(Ledger(tuple(spans)))
    assert len(shown) <= 2 * MAX_STRETCHES
    assert [s["begin"] for s in shown[1:]] == [s["end"] for s in shown[:-1]]
    assert (shown[0]["begin"], shown[-1]["end"]) == (1_000_000, at)
    num_long = sum(s.end_ms - s.begin_ms == 60_000 for s in spans)
    assert num_long > 10
    drained = sum(s["end"] - s["begin"] for s in shown if s["kind"] == "draining")
    assert drained == pytest.approx(num_long * 60_000, rel=0.2)


def test_saves_too_short_to_be_seen_do_not_colour_the_training_around_them() -> None:
    spans, at = [], 0
    for _ in range(50):
        spans += [Span("training", at, at + 1000, 1, "", 0), Span("saving", at + 1000, at + 1010, 1, "saves", 0)]
        at += 1010
    spans.append(Span("queued", at, at + 5000, None, "preempted", 0))
    assert [(s["kind"], s["mixed"]) for s in timeline(Ledger(tuple(spans)))] == [("training", True), ("queued", False)]


class Chart:
    """What a browser makes of the messages."""

    def __init__(self) -> None:
        self.points: dict[str, dict[int, float | None]] = {}

    def take(self, message: dict | None) -> None:
        if message is None:
            return
        message = json.loads(json.dumps(message, allow_nan=False))
        for series in message["series"]:
            since = message["from"]
            kept = self.points.get(series["key"], {}).items() if since is not None else ()
            new = dict(zip(series["x"], series["y"], strict=True))
            self.points[series["key"]] = {x: y for x, y in kept if x < since} | new


def append(path: Path, first: int, last: int, attempt: int) -> None:
    with path.open("a") as file:
        for step in range(first, last + 1):
            figures = {"step": step, "loss": step + attempt / 10, "lr": 0.1, "step_s": 1.0}
            file.write(json.dumps({"time": time.time(), **figures}) + "\n")


def test_a_chart_that_is_extended_shows_the_one_curve(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    view, chart = CurveView(run), Chart()
    chart.take(view.read())
    one = run.claim_attempt("1", "local").metrics_path
    for first in range(1, 101, 10):
        append(one, first, first + 9, 1)
        chart.take(view.read())
    two = run.claim_attempt("2", "local").metrics_path
    append(two, 61, 62, 2)
    killed_in_mid_line(two, '{"time": 1, "step": 63, "lo')
    chart.take(view.read())
    assert chart.points["loss"] == {step: step + (0.1 if step <= 60 else 0.2) for step in range(1, 63)}
    another = Journal(two)
    another.record(step=63, loss=math.nan, step_s=1.0)
    another.close()
    with two.open("a") as file:
        file.write('["foreign"]\n')
    append(two, 64, 80, 2)
    chart.take(view.read())
    assert chart.points["loss"][63] is None
    assert list(chart.points["loss"]) == list(range(1, 81))
    assert view.read() is None
    fresh = Chart()
    fresh.take(view.snapshot())
    assert fresh.points == chart.points


def test_a_long_curve_is_shown_by_a_glimpse_and_then_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentwire.views.curve._LARGE_BYTES", 1000)
    run = make_run(tmp_path)
    for number, (first, last) in enumerate([(1, 3000), (2001, 6000)], start=1):
        append(run.claim_attempt(str(number), "local").metrics_path, first, last, number)
    view, chart = CurveView(run), Chart()
    assert view.is_behind
    chart.take(view.read())
    glimpse = chart.points["loss"]
    assert view.is_behind
    assert 300 <= len(glimpse) <= 600
    assert all(y == pytest.approx(x + (0.1 if x < 2001 else 0.2)) for x, y in glimpse.items() if x < 1990 or x > 2100)
    chart.take(view.read())
    assert not view.is_behind
    assert len(chart.points["loss"]) <= 2 * NUM_STRETCHES + 2
    assert max(chart.points["loss"]) == 6000
    assert all(y == pytest.approx(x + (0.1 if x < 2001 else 0.2)) for x, y in chart.points["loss"].items())


def test_a_clock_that_is_days_ahead_does_not_squeeze_the_charts(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    path = run.claim_attempt("1", "local").path / "gpu_stats.jsonl"
    now = time.time()
    gpus = [{"index": 0, "uuid": "a", "utilisation_percent": 50}]
    records = [{"time": now + i, "host": {"cpu_percent": 5}, "gpus": gpus} for i in range(30)]
    records += [{"time": now + 1e8, "host": {}, "gpus": gpus}, {"time": "NaN"}, {"time": now + 31, "gpus": "none"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"time": 17')
    message = GpuView(run).read()
    assert message is not None
    panels = {panel["key"]: panel["series"][0] for panel in message["panels"]}
    assert panels["utilisation_percent"]["y"] == [50] * 30
    assert panels["cpu_percent"]["y"] == [5] * 30


HOSTILE = [
    {"event": "save_failed"},
    {"event": "placed", "devices": 3, "time": "NaN"},
    {"event": "hang", "ranks": "all", "time": []},
    {"event": "forecast", "warning": {"a": 1}},
    {"event": "save_committed", "step": "x", "seconds": {}, "time": 1e400},
    {"event": ["x"], "time": None},
    {"event": "attempt_ended", "outcome": ["finished"], "step": {}},
    {"event": "training_started", "step": None, "total_steps": "many"},
]


def tell(path: Path, at: float, event: str, **fields: object) -> None:
    with path.open("a") as file:
        file.write(json.dumps({"time": at, "event": event, **fields}) + "\n")


def test_the_page_tells_what_all_writers_told_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for pause in ("_FOLD_EVERY_S", "_FOLD_SHARE"):
        monkeypatch.setattr(run_page, pause, 0)
    run = make_run(tmp_path)
    tell(run.orchestrator_events, 1, "submitted", job_id="1")
    first = run.claim_attempt("1", "local")
    for at, writer in enumerate(("agent", "rank0", "rank1", "node1"), start=2):
        tell(first.path / f"events.{writer}.jsonl", at, "notice", signal="SIGTERM")
    tell(first.path / "events.rank0.jsonl", 6, "nobody has words for this")
    tell(first.path / "events.agent.jsonl", 7, "attempt_ended", outcome="preempted")
    page = RunPage(run)
    page.read()
    run.claim_attempt("2", "local")
    tell(first.path / "events.node1.jsonl", 8, "save_failed", error="late")
    told = page.read()["events"]
    assert [(event["time"], event["writer"]) for event in told] == [
        (8, "node1"), (7, "agent"), (5, "node1"), (4, "rank1"), (3, "rank0"), (2, "agent"), (1, "orchestrator")
    ]  # fmt: skip
    assert (told[0]["attempt"], told[0]["level"], told[-1]["attempt"]) == (1, "alarm", None)
    for at in range(9, 9 + 2 * NUM_EVENTS):
        tell(run.orchestrator_events, at, "submitted", job_id="2")
    assert [event["time"] for event in page.read()["events"]] == list(range(8 + 2 * NUM_EVENTS, 8 + NUM_EVENTS, -1))


def test_foreign_events_upset_neither_page(tmp_path: Path) -> None:
    good = make_run(tmp_path, name="good")
    bad = make_run(tmp_path, name="bad")
    attempt = bad.claim_attempt("1", "local")
    lines = "".join(json.dumps(event) + "\n" for event in HOSTILE)
    for path in (attempt.path / "events.agent.jsonl", attempt.path / "events.rank0.jsonl", bad.orchestrator_events):
        path.write_text(lines)
    (attempt.path / "attempt.json").write_text("[1, 2]")
    attempt.metrics_path.write_text('{"step": "x", "loss": {}}\n{"step": 5, "loss": []}\n')
    (bad.path / "checkpoints" / "step-00000004").mkdir(parents=True)
    (bad.path / "checkpoints" / "step-00000004" / "manifest.json").write_text("{")
    page = RunPage(bad)
    sections = page.read()
    as_json(page.snapshot())
    assert sections["checkpoints"][0]["state"] == "bad"
    fleet = FleetPage(tmp_path)
    message = fleet.read()
    assert message is not None
    assert json.loads(as_json(message), parse_constant=pytest.fail)
    assert {row["name"] for row in message["rows"]} == {"good", "bad"}
    assert all(row["state"] != "UNREADABLE" for row in message["rows"])
    assert good.name in {row["name"] for row in fleet.snapshot()["rows"]}


def test_a_run_that_vanishes_leaves_the_fleet(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name=name) for name in ("one", "two")]
    fleet = FleetPage(tmp_path)
    fleet.read()
    page = RunPage(runs[0])
    page.read()
    runs[0].path.rename(tmp_path / "elsewhere")
    message = fleet.read()
    assert message is not None
    assert message["gone"] == ["one"]
    status = page.read()["status"]
    assert (status["state"], status["reason"]) == ("VANISHED", f"{runs[0].path} is gone")
    as_json(page.snapshot())


def test_a_run_that_is_made_again_under_its_name_has_a_page_of_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    attempt = run.claim_attempt("1", "local")
    append(attempt.metrics_path, 1, 30, 1)
    (attempt.path / "events.agent.jsonl").write_text('{"time": 1, "event": "notice", "signal": "SIGTERM"}\n')
    page = RunPage(run)
    page.read()
    assert [event["event"] for event in page.snapshot()["events"]] == ["notice"]
    shutil.rmtree(run.path)
    make_run(tmp_path)
    append(run.claim_attempt("2", "local").metrics_path, 1, 5, 1)
    told = page.read()
    assert told["attempts"][0]["job_id"] == "2"
    assert told["events"] == []
    assert (told["curve"]["from"], told["curve"]["num_points"]) == (None, 5), "instead of all that is shown"
