"""Numbers in records that others wrote, through each reader of them."""

from __future__ import annotations

import json
import math

import pytest

from latentwire.monitor.figures import figure_of
from latentwire.run.figures import number, whole
from latentwire.run.journal import time_of
from latentwire.views.thinning import figure

NO_NUMBERS = [None, True, "NaN", "Infinity", "7", [1], {}, math.nan, math.inf, -math.inf, 1e300, 10**400, -(10**400)]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: str(value)[:9])
def test_what_is_no_number_is_none_to_each_reader(value: object) -> None:
    record = json.loads(json.dumps({"time": value}))
    assert number(value) is None
    assert figure(value) is None
    assert figure_of(record, "time") is None
    assert time_of(record) == 0.0
    assert whole(value, otherwise=7) == 7


@pytest.mark.parametrize("value", [0, -3, 2.5, 1 << 60, 1e299])
def test_a_number_is_itself(value: float) -> None:
    assert number(value) == value
    assert type(number(value)) is type(value)
    assert figure(value) == pytest.approx(value)


@pytest.mark.parametrize(("value", "time_s"), [(0, 0), (-3, -3), (2e9, 2e9), (1 << 60, 0), (-1e18, 0), (1e299, 0)])
def test_a_time_is_one_that_a_calendar_knows(value: float, time_s: float) -> None:
    assert time_of({"time": value}) == time_s


def test_only_a_whole_number_is_a_step() -> None:
    assert (whole(5, 7), whole(5.0, 7)) == (5, 7)
