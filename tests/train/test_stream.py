"""Data that can only be read forward: the same samples at the same step, from any cursor, on any number of ranks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import KILL, NEVER, TERM, agent_of, events, held, hold, make_run, run_agent, trained_steps, wait_for_event

from latentwire.checklist.drill import final_digests
from latentwire.config import parse_config
from latentwire.elastic.schedule import micro_batches_of
from latentwire.errors import CheckpointMismatch, WorkloadError
from latentwire.run.directory import Run
from latentwire.target import SCRIPT
from latentwire.train import stream
from latentwire.train.feed import Data, Feed, Feeds
from latentwire.train.lanes import Lanes, num_lanes
from latentwire.train.ranks import Ranks
from latentwire.train.rehearsal import heaviest
from latentwire.train.stream import Cursor, LaneReader

SIZES = (3, 0, 5, 4, 1, 6, 3, 2, 4)
"""Samples of each shard."""


class Numbers:
    """Shards of numbered samples with something drawn at random; offsets are no plain count."""

    def __init__(self, sizes: Sequence[int] = SIZES) -> None:
        self.shards = tuple(f"shard {i}" for i in range(len(sizes)))
        self._sizes = sizes

    def read(self, shard: str, offset: int) -> Iterator[tuple[Any, int]]:
        import random

        number = int(shard.split()[1])
        for i in range(offset // 10, self._sizes[number]):
            yield (number, i, random.random()), 10 * (i + 1)


def as_list(samples: list[Any]) -> list[Any]:
    return samples


def feeds_of(rank: int = 0, replicas: int = 1, workers: int = 0, prefetch: int = 2) -> Feeds:
    section = {"workers": workers, "prefetch": prefetch}
    config = parse_config({"name": "a", "seed": 5, "workload": {"target": SCRIPT}, "data": section}, "here")
    return Feeds(config, Ranks(rank, replicas))


def feed_of(data: Data, global_batch: int = 16, micro_batch: int = 2, **how: Any) -> Feed:
    return feeds_of(**how).add(data, global_batch, micro_batch, as_list)


def steps_of(feed: Feed, batches: Iterator[Any], num_steps: int) -> list[list[Any]]:
    """The samples of each step."""
    return [[sample for _ in feed.mine for sample in next(batches)] for _ in range(num_steps)]


# --- one rank ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=9).filter(any), st.integers(1, 9))
def test_every_lane_reads_its_shards_and_in_each_epoch_each_sample_is_read_once(sizes: list[int], num: int) -> None:
    source = Numbers(sizes)
    lanes = Lanes(3, len(sizes), num_lanes(num, len(sizes)), num)
    read: dict[int, list[Any]] = {epoch: [] for epoch in range(3)}
    for lane in range(lanes.num_lanes):
        reader = LaneReader(source, lanes, lane, Cursor())
        for number in itertools.count():
            (sample,) = reader.take(range(number, number + 1))
            if reader.cursor.epoch not in read:
                break
            read[reader.cursor.epoch].append(sample)
    for samples in read.values():
        assert sorted((shard, i) for shard, i, _ in samples) == [(s, i) for s, n in enumerate(sizes) for i in range(n)]
    drawn = [noise for samples in read.values() for _, _, noise in samples]
    assert len(set(drawn)) == len(drawn), "what is drawn for a sample is drawn anew in each epoch"


def test_a_saved_cursor_goes_on_exactly_also_from_the_middle_of_a_shard() -> None:
    feed = feed_of(Numbers())
    whole = steps_of(feed, feed.batches(0), 12)
    cursor: Any = None
    for step in range(12):  # begun anew at every step
        feeds = feeds_of()
        feed = feeds.add(Numbers(), 16, 2, as_list)
        if cursor is not None:
            feeds.resume(json.loads(json.dumps(cursor)))
        assert steps_of(feed, feed.batches(step), 1) == [whole[step]]
        cursor = feeds.progress(step + 1)
    epochs = {epoch for epoch, _, _ in cursor["streams"][0]["lanes"]}
    assert len(epochs) > 1, "lanes come to their next epochs one by one"


def test_the_cursor_in_the_middle_of_a_step_is_that_of_the_boundary_before() -> None:
    feed = feed_of(Numbers())
    batches = feed.batches(0)
    before = feed.cursor(0)
    next(batches)
    assert feed.cursor(0) == before
    for _ in range(7):
        next(batches)
    after = feed.cursor(1)
    assert after != before
    next(batches)
    assert feed.cursor(1) == after
    assert steps_of(feed, feed.batches(1), 1) == steps_of(feed, feed.batches(1), 1), "a broken-off step is read again"


@pytest.mark.parametrize("data", [Numbers(), list(range(37))])
@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (3, 2), (9, 1)])  # nine: more than there are lanes
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_and_what_they_prepare_ahead_change_neither_order_nor_cursor(
    data: Data, workers: int, prefetch: int
) -> None:
    here, there = feed_of(data), feed_of(data, workers=workers, prefetch=prefetch)
    assert steps_of(there, there.batches(0), 5) == steps_of(here, here.batches(0), 5)
    assert there.cursor(5) == here.cursor(5)
    assert list(there.first_batches(2)) == list(here.first_batches(2))


def test_a_halved_micro_batch_leaves_each_step_its_samples_and_the_cursor_its_lanes() -> None:
    feeds = feeds_of()
    feed = feeds.add(Numbers(), 16, 2, as_list)
    batches = feed.batches(0)
    steps_of(feed, batches, 3)
    saved = feeds.progress(3)
    expected = steps_of(feed, batches, 4)
    for micro_batch, workers in ((1, 0), (1, 2), (8, 0), (16, 1)):
        again = feeds_of(workers=workers)
        again.resume(saved)
        other = again.add(Numbers(), 16, micro_batch, as_list)
        assert steps_of(other, other.batches(3), 4) == expected
        assert again.progress(7) == feeds.progress(7)


def test_a_stream_that_begins_after_the_checkpoint_begins_at_its_beginning() -> None:
    feeds = feeds_of()
    feeds.add(list(range(9)), 4, 2, as_list)
    before = feeds.progress(3)
    assert "streams" not in before
    feeds.resume(before)
    late = feeds.add(Numbers(), 16, 2, as_list)
    fresh = feed_of(Numbers())
    assert steps_of(late, late.batches(3), 2) == steps_of(fresh, fresh.batches(0), 2)
    streams = feeds.progress(5)["streams"]
    assert streams[0] is None
    assert streams[1] == fresh.cursor(2)


def test_a_cursor_of_another_stream_is_refused() -> None:
    feed = feed_of(Numbers())
    saved = {"streams": [feed.cursor(0)], "feeds": [feed.facts]}
    others = ((Numbers((*SIZES, 1)), 16, "other shards"), (Numbers(), 12, "a stream in batches of 16, and now gets"))
    for source, global_batch, said in others:
        feeds = feeds_of()
        feeds.add(source, global_batch, 2, as_list)
        with pytest.raises(CheckpointMismatch, match=said):
            feeds.resume(saved)


def test_a_stream_without_samples_is_told() -> None:
    feed = feed_of(Numbers((0, 0, 0)))
    with pytest.raises(WorkloadError, match="none of the 3 shards holds a sample; the first is shard 0"):
        next(feed.batches(0))
    with pytest.raises(WorkloadError, match="no shards"):
        feed_of(Numbers(()))
    with pytest.raises(WorkloadError, match="no samples"):
        feed_of([])
    with pytest.raises(WorkloadError, match=r"generator has neither len\(\) and \[index\]"):
        feed_of(i for i in range(3))  # type: ignore[arg-type]


def test_the_heaviest_sample_is_looked_for_in_a_stream_too() -> None:
    import torch

    shard, _, _ = heaviest(Numbers(), 5, lambda samples: torch.zeros(samples[0][0]))
    assert shard == len(SIZES) - 1


# --- several ranks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [SIZES, SIZES[:3]])
@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_the_ranks_batches_of_a_stream_together_are_those_of_one(sizes: Sequence[int], replicas: int) -> None:
    alone = feed_of(Numbers(sizes))
    expected = steps_of(alone, alone.batches(0), 6)
    lanes = Lanes(5, len(sizes), num_lanes(8, len(sizes)), 16)
    steps: list[list[Any]] = [[] for _ in range(6)]
    for rank in range(replicas):
        mine = micro_batches_of(rank, replicas, 8)
        spans = [range(2 * i, 2 * i + 2) for i in mine]
        batches = stream.read(Numbers(sizes), lanes, [Cursor()] * lanes.num_lanes, spans, as_list, 0, 1)
        for step in steps:
            step += [sample for _ in mine for sample in next(batches)[0]]
    assert steps == expected


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_map_style_data_goes_on_in_mid_epoch_on_any_number_of_ranks(replicas: int) -> None:
    data = list(range(37))
    alone = feed_of(data)
    expected = steps_of(alone, alone.batches(0), 9)  # nearly four epochs
    assert sorted([sample for step in expected for sample in step][:37]) == data
    for start in (1, 4):
        steps: list[list[Any]] = [[] for _ in range(start, 9)]
        for rank in range(replicas):
            feed = feed_of(data, rank=rank, replicas=replicas)
            for step, samples in zip(steps, steps_of(feed, feed.batches(start), len(steps)), strict=True):
                step += samples
        assert steps == expected[start:]


# --- whole runs -------------------------------------------------------------------------------------------------------


def _run_of(folder: Path, num_ranks: int, workers: int) -> Run:
    options = {"counts": False, "num_shards": 11}
    overrides = ("train.steps=18", "train.schedule.warmup_steps=2")
    sections = {"elastic": {"num_ranks": num_ranks}, "data": {"workers": workers}}
    return make_run(folder, "stream", overrides, workload={"options": options}, **sections)


def _newest(run: Run) -> tuple[int, list[list[int]]]:
    """Step and cursors of the newest checkpoint; none yet: step 0."""
    newest = max(run.checkpoints.glob("step-*"), default=None)
    if newest is None:
        return 0, []
    state = json.loads((newest / "state.json").read_text())
    (feed,) = state["progress"]["streams"]
    return state["step"], feed["lanes"]


def test_a_stream_is_continued_exactly_on_1_2_4_3_and_1_ranks(tmp_path: Path) -> None:
    """Preempted or killed each time, with lanes in the middle of a shard and of their epochs."""
    calm = _run_of(tmp_path / "calm", 1, workers=0)
    assert run_agent(calm) == "finished"
    visits_per_step = {1: 8, 2: 4, 4: 2, 3: 3}
    for num_ranks, workers, signum in ((1, 2, TERM), (2, 0, TERM), (4, 2, TERM), (3, 0, KILL)):
        run = _run_of(tmp_path / "moved", num_ranks, workers)
        step, _ = _newest(run)
        num_steps = 1 if signum == TERM else 6 - step % 4  # killed two steps after a save, which comes every four
        with held(run, "step", 2 + num_steps * visits_per_step[num_ranks]), agent_of(run) as agent:
            wait_for_event(agent.attempt, "holding", f"rank{num_ranks // 2}")
            if signum == KILL:
                agent.send(KILL)
            else:
                for process in agent.tree():  # data workers too, as Slurm does
                    process.send_signal(TERM)
                wait_for_event(agent.attempt, "notice", "agent")
                hold(run, "step", NEVER)
            assert agent.outcome() == ("preempted" if signum == TERM else "")
        _, cursors = _newest(run)
        assert any(offset for _, _, offset in cursors)
        assert len({tuple(cursor) for cursor in cursors}) > 1
    run = _run_of(tmp_path / "moved", 1, workers=2)
    assert run_agent(run) == "finished"
    killed, last = run.attempts()[3:]
    assert events(last, "restored")[0]["step"] < trained_steps(killed)[-1]["step"]
    assert _newest(run) == _newest(calm)
    assert final_digests(run) == final_digests(calm)
