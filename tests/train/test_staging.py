"""Tensors on their way between training and checkpoints: every byte, of one step."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_parts import Events, open_manager
from running import events, make_run

from latentwire import Session
from latentwire.checkpoint import interval, reader
from latentwire.checkpoint.layout import Snapshot
from latentwire.config import CheckpointSection
from latentwire.errors import CheckpointTorn
from latentwire.run.budget import History
from latentwire.run.journal import Journal
from latentwire.train import staging
from latentwire.train.ranks import Ranks
from latentwire.train.saving import Saving
from latentwire.train.staging import DTYPES, LiveTensor, Ring, Staging
from latentwire.train.state import TrainingState


class Holder:
    """A state of named tensors."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors: dict[str, Any] = tensors

    def state_dict(self) -> dict[str, Any]:
        return self.tensors

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensors = state


def some_tensors() -> dict[str, torch.Tensor]:
    """One of each type, and shapes that are empty, scalar, or no block's multiple, contiguous or not."""
    generator = torch.Generator().manual_seed(1)
    bits = {str(dtype)[6:]: torch.randint(0, 2, (3, 7), generator=generator).to(dtype) for dtype in DTYPES}
    shapes = {"none": (0,), "scalar": (), "long": (1001,), "even": (128,)}
    more = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return bits | more | {"turned": torch.randn(5, 9, generator=generator).t()}


def written(tensors: Any) -> dict[str, bytes]:
    return {name: b"".join(bytes(piece) for piece in tensor.pieces()) for name, tensor in tensors.items()}


def expected(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


def snapshot_of(state: TrainingState, step: int = 1) -> Snapshot:
    return state.snapshot(step, {}, {"step": step}, {})


def everything(snapshot: Snapshot) -> list[tuple[str, str]]:
    return [(group, name) for group, tensors in snapshot.tensors.items() for name in tensors]


@pytest.mark.parametrize("block_bytes", [16, 64, 1 << 20])
def test_a_staged_copy_has_every_byte_and_no_later_one(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "BLOCK_BYTES", block_bytes)
    state = TrainingState()
    holder = Holder(**some_tensors())
    state.track("model", holder)
    place = Staging(limit_bytes=1 << 20)
    for number in range(2):  # the second goes into the same memory
        before = expected(holder.tensors)
        live = snapshot_of(state)
        staged = place.stage(live, everything(live), overlap=False)
        assert staged is not None
        for tensor in holder.tensors.values():
            tensor.fill_(number)
        staged.settle()
        assert written(staged.tensors["model"]) == before
        assert written(snapshot_of(state).tensors["model"]) == expected(holder.tensors)


def test_what_does_not_fit_is_not_copied() -> None:
    state = TrainingState()
    state.track("model", Holder(weight=torch.zeros(100)))
    live = snapshot_of(state)
    assert Staging(limit_bytes=399).stage(live, everything(live), overlap=False) is None
    assert Staging(limit_bytes=400).stage(live, everything(live), overlap=False) is not None


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 4004, 1 << 16])
def test_what_streams_through_a_ring_arrives(block_bytes: int) -> None:
    ring = Ring(block_bytes)
    source = torch.arange(1001, dtype=torch.float32)
    for _ in range(2):
        for _ in ring.pieces(source):  # whoever looks at the first piece only leaves nothing behind
            break
        target = torch.zeros_like(source)
        for piece, room in zip(ring.pieces(source), ring.fill(target), strict=True):
            room[:] = piece
        assert torch.equal(source, target)


def test_a_ring_serves_many_threads() -> None:
    ring = Ring(64)
    sources = [torch.full((5000,), float(i)) for i in range(6)]
    results: dict[int, bytes] = {}

    def stream(number: int) -> None:
        results[number] = b"".join(bytes(piece) for piece in ring.pieces(sources[number]))

    threads = [threading.Thread(target=stream, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: source.numpy().tobytes() for i, source in enumerate(sources)}


def test_only_what_an_optimizer_owns_is_late_and_replicated() -> None:
    model = torch.nn.BatchNorm1d(3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    state = TrainingState()
    state.track("model", model)
    state.track("optimizer", optimizer)
    snapshot = snapshot_of(state)
    late = {(g, n) for g, n in everything(snapshot) if getattr(snapshot.tensors[g][n], "late", False)}
    assert late == snapshot.replicated
    assert {name for group, name in late if group == "model"} == {"weight", "bias"}
    assert {name for group, name in everything(snapshot) if group == "optimizer"} == {
        n for g, n in late if g != "model"
    }


def test_a_change_outside_of_the_optimizer_is_seen() -> None:
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight])
    state = TrainingState()
    state.track("model", Holder(weight=weight))
    state.track("optimizer", optimizer)
    for guarded in (True, False):
        live = snapshot_of(state)
        place = Staging(limit_bytes=1 << 20)
        staged = place.stage(live, everything(live), overlap=True)
        assert staged is not None
        if guarded:
            place.before_update()
        with torch.no_grad():
            weight.add_(1)
        place.before_update()
        if guarded:
            staged.settle()
        else:
            with pytest.raises(CheckpointTorn, match=r"outside of optimizer\.step"):
                staged.settle()


def test_a_load_goes_straight_into_place(tmp_path: Path) -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer, TrainingState]:
        torch.manual_seed(0)
        model = torch.nn.Linear(30, 20)
        optimizer = torch.optim.AdamW(model.parameters())
        state = TrainingState()
        state.track("model", model)
        state.track("optimizer", optimizer)
        return model, optimizer, state

    trained, its_optimizer, state = make()
    trained(torch.randn(5, 30)).square().sum().backward()
    its_optimizer.step()
    manager = open_manager(tmp_path / "checkpoints", shard_bytes=1000, threads=4)
    manager.save(state.snapshot(1, {}, {"step": 1}, {}))
    manager.close()

    fresh, optimizer, state = make()
    addresses = [parameter.data_ptr() for parameter in fresh.parameters()]
    placed: list[LiveTensor] = []
    place = state.place()

    def remembering(group: str, span: Any) -> LiveTensor:
        placed.append(place(group, span))
        return placed[-1]

    state.apply(reader.load(manager.committed()[0], place=remembering))
    assert [parameter.data_ptr() for parameter in fresh.parameters()] == addresses
    assert set(addresses) <= {tensor.tensor.data_ptr() for tensor in placed}, "read into the parameters themselves"
    moments = {v.data_ptr() for s in optimizer.state.values() for v in s.values()}
    assert moments <= {tensor.tensor.data_ptr() for tensor in placed}, "taken over without a copy"
    assert expected(dict(fresh.state_dict())) == expected(dict(trained.state_dict()))
    for ours, theirs in zip(optimizer.state.values(), its_optimizer.state.values(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


class Counting(torch.optim.SGD):
    """Sets every parameter, and a state of its own, to the number of its steps."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("count", torch.zeros_like(parameter)).add_(1)
                parameter.data.copy_(self.state[parameter]["count"])


def test_each_checkpoint_holds_one_step_while_training_goes_on(tmp_path: Path) -> None:
    """Tensors and scalars alike: weights, optimizer, buffer, schedule and counters of the same step."""
    steps = 25
    settings = {"interval_s": None, "interval_steps": 1, "keep": steps, "best_metric": None, "shard_mb": 1}
    with Session(tmp_path / "experiment_counting", checkpoint=settings) as session:
        model = torch.nn.Sequential(*(torch.nn.Linear(300, 300) for _ in range(8)))
        model.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        optimizer = Counting(model.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
        session.track(model=model, optimizer=optimizer, schedule=schedule)
        for _ in session.steps(steps):
            model.steps += 1
            optimizer.step()
            schedule.step()
            session.counters["samples"] += 1
    paths = sorted(session.run.checkpoints.glob("step-*"))
    assert len(paths) == steps
    for step, path in enumerate(paths, 1):
        loaded = reader.load(path)
        for group in ("model", "optimizer"):
            for name, tensor in loaded.tensors[group].items():
                code = {"F32": torch.float32, "I64": torch.int64}[tensor.dtype]
                assert torch.frombuffer(tensor.data, dtype=code).eq(step).all(), (path.name, group, name)
        assert loaded.values["step"] == loaded.values["progress"]["counters"]["samples"] == step
        assert loaded.values["trees"]["schedule"]["last_epoch"] == step


def test_an_automatic_interval_is_told_with_its_reason(tmp_path: Path) -> None:
    run = make_run(tmp_path, "auto")
    for outcome in ("preempted", "finished"):
        agent = Journal(run.claim_attempt("1", "local").path / "events.agent.jsonl")
        agent.event("attempt_started")
        agent.event("attempt_ended", outcome=outcome)
    told = Events()
    manager, state = open_manager(tmp_path / "checkpoints"), TrainingState()
    state.track("model", Holder(weight=torch.zeros(4)))
    history = History.before(run, run.claim_attempt("1", "local"))
    saving = Saving(manager, state, CheckpointSection(interval_s="auto"), Ranks(), history, told)
    for step in range(1, 4):
        saving.save(step, "asked", {}, {})
        manager.wait()
        saving.poll()
    [chosen] = told.named("interval_chosen")
    assert chosen["seconds"] == interval.SHORTEST_S, "such a small state costs next to nothing"
    assert "1 preemptions in" in chosen["reason"]
    assert "held between" in chosen["reason"]


class Silent(torch.optim.SGD):
    """Writes through ``.data``, which bumps no counter of autograd's; some fused kernels bump none either."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.data += 1


def test_a_step_that_counts_no_change_is_seen(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = Silent([weight])
    manager, state = open_manager(tmp_path / "checkpoints"), TrainingState()
    state.track("model", Holder(weight=weight))
    state.track("optimizer", optimizer)
    saving = Saving(manager, state, CheckpointSection(), Ranks(), History(0.0, 0), Events())
    for _ in range(2):
        saving.remember_boundary()
        assert saving.is_boundary_intact()
        before = state.versions()
        optimizer.step()
        assert state.versions() == before
        assert not saving.is_boundary_intact()


@pytest.mark.parametrize("limit_gb", [None, 1e-6])
def test_what_fits_is_copied_and_what_does_not_is_streamed(tmp_path: Path, limit_gb: float | None) -> None:
    settings = {"interval_s": None, "interval_steps": 1, "best_metric": None, "host_memory_gb": limit_gb}
    with Session(tmp_path / "experiment_large", checkpoint=settings) as session:
        weight = torch.zeros(10_000)
        session.track(model=Holder(weight=weight))
        for _ in session.steps(3):
            weight += 1
    assert [e["copied"] for e in events(session.attempt, "save_staged")] == [limit_gb is None] * 2 + [False], "the last"
    for step, path in enumerate(sorted(session.run.checkpoints.glob("step-*")), 1):
        data = reader.load(path).tensors["model"]["weight"].data
        assert torch.frombuffer(data, dtype=torch.float32).eq(step).all()


def test_weights_that_never_change_raise_an_alarm(tmp_path: Path) -> None:
    heard = Events()
    manager = open_manager(tmp_path / "checkpoints", event=heard, max_unchanged=3, keep=9)
    state = TrainingState()
    weight = torch.zeros(4)
    state.track("model", Holder(weight=weight))
    for step in range(1, 8):
        manager.save(snapshot_of(state, step))
        manager.wait()
        told = heard.named("weights_unchanged")
        assert [alarm["step"] for alarm in told] == ([4] if step >= 4 else []), (
            "once, at the third save without a change"
        )
    weight += 1
    manager.save(snapshot_of(state, 8))
    manager.close()
    assert len(heard.named("weights_unchanged")) == 1
