"""One curve out of many attempts, read while it grows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_parts import config

from latentwire.run.curve import Columns, Curve, merged_metrics, place_of
from latentwire.run.directory import Attempt, Run, create_run
from latentwire.run.journal import Journal


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create_run(config(), tmp_path)


def train(run: Run, *steps: int | str, attempt: Attempt | None = None) -> Attempt:
    """An attempt, new or given, that writes these steps; ``"6e"`` is the evaluation after step 6."""
    attempt = attempt or run.claim_attempt("1", "local")
    journal = Journal(attempt.metrics_path, clock=lambda: 1.0)
    for step in steps:
        if isinstance(step, str):
            journal.record(step=int(step[:-1]), **{"eval/loss": float(attempt.number)})
        else:
            journal.record(step=step, loss=float(step), lr=0.5, step_s=1.0)
    journal.close()
    return attempt


class Copy:
    """What a reader has who does as ``Curve.read`` says."""

    def __init__(self, run: Run) -> None:
        self._curve = Curve(run)
        self.records: list[dict[str, Any]] = []

    def read(self) -> list[tuple[str, int]]:
        """All (step or evaluation, attempt) so far."""
        while True:
            new, first_void = self._curve.read()
            if first_void is not None:
                self.records = [r for r in self.records if r["step"] < first_void]
            self.records += new
            if not new and first_void is None:
                return named(self.records)


def named(records: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(f"{r['step']}{'' if 'step_s' in r else 'e'}", r["attempt"]) for r in records]


def test_steps_that_are_redone_make_the_older_points_void(run: Run) -> None:
    copy = Copy(run)
    assert copy.read() == []
    first = train(run, 1, 2)
    assert copy.read() == [("1", 1), ("2", 1)]
    train(run, "2e", 3, 4, attempt=first)
    assert copy.read() == [("1", 1), ("2", 1), ("2e", 1), ("3", 1), ("4", 1)]
    second = run.claim_attempt("2", "local")
    assert len(copy.read()) == 5, "it has not trained yet"
    train(run, 3, attempt=second)
    assert copy.read() == [("1", 1), ("2", 1), ("2e", 1), ("3", 2)]
    train(run, 4, 5, attempt=second)
    train(run, 6)
    assert copy.read() == [("1", 1), ("2", 1), ("2e", 1), ("3", 2), ("4", 2), ("5", 2), ("6", 3)]


def test_an_attempt_that_begins_with_an_evaluation_leaves_the_step_before_it(run: Run) -> None:
    copy = Copy(run)
    train(run, 1, 2, "2e", 3)
    copy.read()
    train(run, "2e", 3)
    assert copy.read() == [("1", 1), ("2", 1), ("2e", 2), ("3", 2)] == named(list(merged_metrics(run)))


def test_an_attempt_that_went_back_too_far_leaves_no_gap(run: Run) -> None:
    """The second could not read the newest checkpoint, the third could."""
    copy = Copy(run)
    train(run, *range(1, 9))
    copy.read()
    train(run, 5, 6)
    assert [n for n, _ in copy.read()] == ["1", "2", "3", "4", "5", "6"]
    train(run, 9)
    owners = [1] * 4 + [2] * 2 + [1] * 2 + [3]
    assert copy.read() == [(str(step), owner) for step, owner in enumerate(owners, start=1)]
    assert named(list(merged_metrics(run))) == copy.read()


@given(data=st.data())
def test_however_attempts_overlap_a_reader_ends_with_the_curve(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    run = create_run(config(), tmp_path_factory.mktemp("run"))
    copy, reached, newest = Copy(run), 0, 0
    columns = Columns(run, ("loss", "lr"))
    for _ in range(data.draw(st.integers(1, 6))):
        begin = data.draw(st.integers(1, reached + 1))
        newest = begin + data.draw(st.integers(0, 5))
        reached = max(reached, newest)
        train(run, *range(begin, newest + 1))
        if data.draw(st.booleans()):
            copy.read()
            columns.grow()
    columns.grow()
    assert [int(n) for n, _ in copy.read()] == list(range(1, newest + 1))
    assert copy.read() == named(list(merged_metrics(run)))
    assert list(columns.training.steps) == list(columns.training.columns["loss"]) == list(range(1, newest + 1))


def test_columns_tell_from_which_step_on_a_copy_is_old(run: Run) -> None:
    columns = Columns(run, ("loss", "lr", "missing"), ("eval/loss",))
    assert columns.grow() is None
    first = train(run, 1, 2, "2e", 3)
    assert columns.grow() == 1
    assert columns.grow() is None
    train(run, 4, attempt=first)
    assert columns.grow() == 4
    train(run, 3)
    assert columns.grow() == 3
    assert list(columns.training.steps) == [1, 2, 3]
    assert list(columns.training.columns["lr"]) == [0.5] * 3
    assert all(map(math.isnan, columns.training.columns["missing"]))
    assert (list(columns.evaluations.steps), list(columns.evaluations.columns["eval/loss"])) == ([2], [1.0])
    assert [(s.attempt.number, s.first_step) for s in columns.stretches] == [(1, 1), (2, 3)]


def test_a_step_is_known_by_its_time_whatever_a_loop_logs(run: Run) -> None:
    """Of a loop that logs no loss but every second step, and whose evaluation names its figure so."""
    attempt = run.claim_attempt("1", "local")
    journal = Journal(attempt.metrics_path, clock=lambda: 1.0)
    for step in range(1, 5):
        journal.record(step=step, accuracy=0.5, step_s=1.0, **({} if step % 2 else {"loss": 2.0}))
    journal.record(step=4, loss=9.0)
    journal.close()
    assert [place_of(record) for record in merged_metrics(run)] == [2, 4, 6, 8, 9]
    columns = Columns(run, ("loss",), ("loss",))
    columns.grow()
    assert (list(columns.training.steps), list(columns.training.columns["loss"])) == ([2, 4], [2.0, 2.0])
    assert (list(columns.evaluations.steps), list(columns.evaluations.columns["loss"])) == ([4], [9.0])
    train(run, 4, "4e")
    assert columns.grow() == 4
    assert (list(columns.training.steps), list(columns.evaluations.steps)) == ([2, 4], [4])


FOREIGN = [b"", b"nothing", b"[1]", b"null", b'{"step": "x", "step_s": 1}', b'{"step": true, "step_s": 1}']
FOREIGN += [
    b'{"loss": 1, "step_s": 1}',
    b'{"step": -3, "step_s": 1}',
    b"\xff\xfe",
    b'{"step": 2.5}',
    b'{"step": 7, "loss": ',
]


def test_foreign_and_half_written_lines_are_passed_over(run: Run) -> None:
    for number in (1, 2):
        attempt = run.claim_attempt("1", "local")
        attempt.metrics_path.write_bytes(b"\n".join(FOREIGN))
        train(run, number, number + 1, attempt=attempt)
        with open(attempt.metrics_path, "ab") as file:
            file.write(b"\n".join([*FOREIGN, b'{"step": 3, "lo']))
    assert Copy(run).read() == [("1", 1), ("2", 2), ("3", 2)]
    columns = Columns(run, ("loss",))
    columns.grow()
    assert list(columns.training.steps) == [1, 2, 3]


def test_a_half_line_counts_when_it_is_whole(run: Run) -> None:
    attempt = train(run, 1)
    copy, columns = Copy(run), Columns(run, ("loss",))
    line = b'{"step": 2, "loss": "nan", "step_s": 1}\n'
    for part, expected in ((line[:11], 1), (line[11:], 2)):
        with open(attempt.metrics_path, "ab") as file:
            file.write(part)
        columns.grow()
        assert len(copy.read()) == len(columns.training) == expected
    assert math.isnan(columns.training.columns["loss"][-1])


def test_a_run_that_vanishes_has_nothing_new(run: Run) -> None:
    train(run, 1)
    copy = Copy(run)
    assert len(copy.read()) == 1
    run.path.rename(run.path.with_name("gone"))
    assert len(copy.read()) == 1
