"""The pair workload with real parts: real architectures, real tokenizers, real text, saved and loaded back."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from latentwire.errors import WorkloadError
from latentwire.workloads.base import BuildContext, Workload
from latentwire.workloads.pair import PairWorkload, frozen
from latentwire.workloads.pair.families import FAMILIES
from latentwire.workloads.pair.folders import make_once

REPOSITORY = Path(__file__).parents[2]
TINY = {"init": "random", "shape": "tiny"}
OPTIONS: dict[str, Any] = {
    "llama": TINY,
    "qwen": {**TINY, "use_chat_template": True},
    "wire": {"latent_len": 8, "d_z": 32, "d_model": 32, "byte_layers": 1, "latent_layers": 1, "heads": 2},
    "data": {"kind": "pydoc", "eval_size": 64, "max_source_bytes": 96, "max_target_tokens": 12},
}


class Preempted(Exception):
    """Stands for the loop's own exception, which a workload must let pass."""


CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _deterministic() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def make_context(runs: Path, run: str = "experiment_a", **changes: Any) -> BuildContext:
    fields = {
        "device": torch.device("cpu"),
        "compute_dtype": torch.float32,
        "seed": 1,
        "run_path": runs / run,
        "gradient_checkpointing": False,
        "safe_point": lambda: None,
        "event": lambda name, **fields: None,
    }
    return BuildContext(**{**fields, **changes})


def build(runs: Path, options: dict[str, Any] | None = None, **changes: Any) -> PairWorkload:
    workload = PairWorkload({**OPTIONS, **(options or {})})
    workload.build(make_context(runs, **changes))
    return workload


@pytest.fixture(scope="module")
def workload(runs: Path) -> PairWorkload:
    return build(runs)


def gradients(workload: PairWorkload, batch: Any) -> dict[str, torch.Tensor]:
    workload.trainable.zero_grad()
    workload.step(batch, lambda loss: loss.backward())
    return {name: p.grad.clone() for name, p in workload.trainable.named_parameters() if p.grad is not None}


def batch_of(workload: PairWorkload, size: int = 6) -> Any:
    return workload.collate(spread(workload, size))


def spread(workload: PairWorkload, size: int) -> list[Any]:
    """Samples from all over the text: neighbours have the same target."""
    return list(workload.train_data[:: len(workload.train_data) // size][:size])


def losses_of(workload: PairWorkload, batch: Any) -> dict[str, float]:
    return {name: float(loss) for name, loss in workload.evaluate(batch).losses.items()}


def test_is_a_workload_and_reports_detached_losses(workload: PairWorkload) -> None:
    assert isinstance(workload, Workload)
    batch = batch_of(workload)
    report = workload.step(batch, lambda loss: loss.backward())
    assert set(report.losses) == {"loss", "loss/llama", "loss/qwen"}
    assert all(loss.ndim == 0 and not loss.requires_grad for loss in report.losses.values())
    assert float(report.losses["loss"]) == pytest.approx(
        (float(report.losses["loss/llama"]) + float(report.losses["loss/qwen"])) / 2
    )
    assert report.num_samples == 6
    assert report.num_tokens == sum(len(target.labels) for target in batch.targets.values())


def test_importing_the_options_imports_no_torch() -> None:
    code = "import sys, latentwire.workloads.pair as p; p.Options; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def test_tiny_models_are_saved_once_and_loaded_from_their_folder(runs: Path, workload: PairWorkload) -> None:
    folders = sorted(p for p in (runs / "cache").iterdir() if not p.name.startswith("."))
    written = [(folder / "model.safetensors").stat().st_mtime_ns for folder in folders]
    other = build(runs, run_path=runs / "experiment_b")
    assert [f.name.split("-")[0] for f in folders] == ["llama", "qwen"]
    assert [(folder / "model.safetensors").stat().st_mtime_ns for folder in folders] == written
    assert other.frozen_digests() == workload.frozen_digests()


def test_a_folder_loads_like_a_random_model(runs: Path, workload: PairWorkload) -> None:
    folders = {p.name.split("-")[0]: str(p) for p in (runs / "cache").iterdir()}
    options = {name: {"source": folders[name]} for name in ("llama", "qwen")}
    options["qwen"]["use_chat_template"] = True
    assert losses_of(build(runs, options), batch_of(workload)) == losses_of(workload, batch_of(workload))


def test_tokens_follow_each_family(workload: PairWorkload) -> None:
    llama, qwen = (workload.collate.scripts[name] for name in ("llama", "qwen"))
    special = llama.tokenizer.convert_ids_to_tokens
    assert special(list(llama.head)) == ["<|begin_of_text|>"]
    assert llama.tail == ()
    assert special([llama.eos_id, llama.pad_id]) == ["<|eot_id|>", "<|finetune_right_pad_id|>"]
    assert qwen.tokenizer.decode(qwen.head) == "<|im_start|>user\n"
    assert qwen.tokenizer.decode(qwen.tail) == "<|im_end|>\n<|im_start|>assistant\n"
    assert qwen.tokenizer.bos_token_id is None
    assert qwen.pad_id != qwen.eos_id


def test_targets_end_unless_cut_and_take_special_tokens_as_text(workload: PairWorkload) -> None:
    script = workload.collate.scripts["llama"]
    short, long, hostile = script.targets(["yes", "word " * 50, "<|eot_id|>"], 12)
    assert short[-1] == script.eos_id
    assert len(long) == 12
    assert script.eos_id not in long
    assert hostile.count(script.eos_id) == (hostile[-1] == script.eos_id)


def test_the_collator_travels_to_other_processes(workload: PairWorkload) -> None:
    twin = pickle.loads(pickle.dumps(workload.collate))
    assert torch.equal(twin(workload.train_data[:3]).source, workload.collate(workload.train_data[:3]).source)
    assert len(pickle.dumps(workload.collate)) < 2**20


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_that_of_an_unpadded_pass_through_transformers(workload: PairWorkload, name: str) -> None:
    """Each sample alone, without any mask, padding or known keys, through the model's own forward and loss."""
    frozen, total, count = workload._frozen[name], 0.0, 0
    head, tail = (torch.tensor([ids]) for ids in (frozen.script.head, frozen.script.tail))
    samples = spread(workload, 4)
    for sample in samples:
        batch = workload.collate([sample])
        tokens = batch.targets[name].tokens
        embed = frozen.model.get_input_embeddings()
        with torch.no_grad():
            prefix = workload.trainable.prefix(name, workload.trainable.encode(batch.source))
            inputs = torch.cat([embed(head), prefix, embed(tail.long()), embed(tokens)], 1)
            labels = torch.full(inputs.shape[:2], -100)
            labels[:, -tokens.shape[1] :] = tokens
            loss = frozen.model(inputs_embeds=inputs, labels=labels).loss
        total, count = total + float(loss) * tokens.numel(), count + tokens.numel()
    assert losses_of(workload, workload.collate(samples))[f"loss/{name}"] == pytest.approx(total / count, rel=1e-5)


def test_only_target_tokens_count(workload: PairWorkload) -> None:
    batch = batch_of(workload)
    before = losses_of(workload, batch)
    padding = copy.deepcopy(batch)
    target = padding.targets["llama"]
    is_padding = torch.ones(target.tokens.numel(), dtype=torch.bool)
    is_padding[target.rows] = False
    assert is_padding.any()
    target.tokens.view(-1)[is_padding] = 7
    assert losses_of(workload, padding) == before
    batch.targets["llama"].labels[0] += 1
    after = losses_of(workload, batch)
    assert after["loss/llama"] != before["loss/llama"]
    assert after["loss/qwen"] == before["loss/qwen"]


def test_more_padding_changes_nothing(workload: PairWorkload) -> None:
    samples = sorted(spread(workload, 40), key=lambda pair: len(pair.source) + len(pair.target))
    alone = workload.collate(samples[:1])
    padded = workload.collate([samples[0], samples[-1]])
    assert padded.source.shape[1] > alone.source.shape[1]
    first = [losses_of(workload, workload.collate([s]))["loss/llama"] for s in (samples[0], samples[-1])]
    target = padded.targets["llama"]
    weights = torch.bincount(target.rows // target.tokens.shape[1]).tolist()
    mean = sum(loss * n for loss, n in zip(first, weights, strict=True)) / sum(weights)
    assert losses_of(workload, padded)["loss/llama"] == pytest.approx(mean, rel=1e-5)


def test_gradients_reach_the_whole_wire_and_nothing_frozen(workload: PairWorkload) -> None:
    reached = gradients(workload, batch_of(workload))
    assert set(reached) == {name for name, _ in workload.trainable.named_parameters()}
    assert all(gradient.abs().sum() > 0 for name, gradient in reached.items() if "key_value.bias" not in name)
    for model in workload._frozen.values():
        assert not model.model.training
        assert all(not p.requires_grad and p.grad is None for p in model.model.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"devices": {"llama": (CPU,), "qwen": (torch.device("cpu", 0),)}},  # another device to all but the tensors
    ],
)
def test_where_and_when_a_model_runs_changes_no_bit(
    runs: Path, workload: PairWorkload, changes: dict[str, Any]
) -> None:
    thrifty = build(runs, **changes)
    expected = gradients(workload, batch_of(workload))
    for name, gradient in gradients(thrifty, batch_of(thrifty)).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile looks at it
@pytest.mark.slow
def test_compiled_layers_meet_few_shapes(runs: Path, workload: PairWorkload, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of any text lengths: torch gives up on a function that is compiled for too many shapes."""
    monkeypatch.setattr(frozen, "COMPILED", {"fullgraph": True, "dynamic": False, "backend": "aot_eager"})
    options = {"compile": True, "data": {**OPTIONS["data"], "max_target_tokens": 200}}
    compiled = build(runs, options)
    counters.clear()
    shapes = set()
    for first in range(12):
        samples = list(workload.train_data[first::97][: 4 + first % 2 * 4])
        expected = gradients(workload, workload.collate(samples))
        batch = compiled.collate(samples)
        shapes |= {(name, target.tokens.shape) for name, target in batch.targets.items()}
        for name, gradient in gradients(compiled, batch).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == len(shapes) == 4


def test_bf16_trains_float32_weights(runs: Path) -> None:
    half = build(runs, compute_dtype=torch.bfloat16)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(half, batch_of(half)).values())
    assert half._frozen["llama"].model.dtype == torch.bfloat16


def test_same_seed_same_bits_and_another_seed_other_bits(tmp_path: Path) -> None:
    def train(runs: Path, seed: int) -> dict[str, torch.Tensor]:
        workload = build(runs, seed=seed)
        torch.manual_seed(len(str(runs)))  # what came before must not matter
        optimizer = torch.optim.AdamW(workload.trainable.parameters())
        for _ in range(2):
            gradients(workload, batch_of(workload))
            optimizer.step()
        return workload.trainable.state_dict()

    one, two, other = train(tmp_path / "x" / "a", 1), train(tmp_path / "y" / "bb", 1), train(tmp_path / "x" / "a", 2)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["encoder.queries"], other["encoder.queries"])


def test_a_few_steps_lower_the_loss(workload: PairWorkload) -> None:
    learner = copy.deepcopy(workload)
    batch = batch_of(learner, 8)
    before = losses_of(learner, batch)["loss"]
    optimizer = torch.optim.AdamW(learner.trainable.parameters(), lr=1e-2)
    for _ in range(15):
        gradients(learner, batch)
        optimizer.step()
    assert losses_of(learner, batch)["loss"] < before - 2


def test_a_killed_half_made_folder_is_not_used(tmp_path: Path) -> None:
    maker = (
        "import os, signal, sys; from pathlib import Path; from latentwire.workloads.pair.folders import make_once\n"
        "def make(folder):\n"
        "    (folder / 'a').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "make_once(Path(sys.argv[1]), make)"
    )
    folder = tmp_path / "model"
    killed = subprocess.run([sys.executable, "-c", maker, str(folder)], cwd=REPOSITORY, check=False)
    assert killed.returncode == -9
    assert not folder.exists()
    make_once(folder, lambda draft: (draft / "a").write_text("whole") and None)
    make_once(folder, lambda draft: pytest.fail("made twice"))
    assert (folder / "a").read_text() == "whole"


def test_the_slower_of_two_makers_takes_what_the_faster_made(tmp_path: Path) -> None:
    def slow(draft: Path) -> None:
        (draft / "a").write_text("slow")
        make_once(tmp_path / "model", lambda other: (other / "a").write_text("fast") and None)

    assert (make_once(tmp_path / "model", slow) / "a").read_text() == "fast"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_notices_pass_and_leave_nothing_half_made(tmp_path: Path) -> None:
    calls = []

    def count() -> None:
        calls.append(None)

    first = build(tmp_path, safe_point=count)
    first.frozen_digests()
    num_fresh = len(calls)
    again = build(tmp_path, safe_point=count)
    again.frozen_digests()
    assert len(calls) == 2 * num_fresh, "ranks agree at safe points: their number must not depend on caches"

    def interrupt() -> None:
        raise Preempted

    with pytest.raises(Preempted):
        build(tmp_path / "new", safe_point=interrupt)


def test_digests_follow_the_weights(runs: Path, workload: PairWorkload, tmp_path: Path) -> None:
    folders = copy_models(runs, tmp_path)
    options = {name: {"source": str(folder)} for name, folder in folders.items()}
    one = build(tmp_path, options)
    before = one.frozen_digests()
    assert before["llama"] == workload.frozen_digests()["llama"]
    weights = folders["llama"] / "model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    after = one.frozen_digests()
    assert after["llama"] != before["llama"]
    assert after["qwen"] == before["qwen"]


def copy_models(runs: Path, to: Path) -> dict[str, Path]:
    copies = {}
    for folder in (runs / "cache").iterdir():
        copies[folder.name.split("-")[0]] = to / folder.name
        (to / folder.name).mkdir()
        for file in folder.iterdir():
            (to / folder.name / file.name).write_bytes(file.read_bytes())
    return copies


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def drop_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def say_mistral(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer in .* is damaged"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
        (truncate, "cannot be loaded"),
        (drop_a_tensor, r"lack 1 tensors \(model.norm.weight"),
        (say_mistral, "holds a 'mistral' model"),
    ],
)
def test_a_damaged_model_folder_is_refused_with_a_cure(
    runs: Path, workload: PairWorkload, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = copy_models(runs, tmp_path)["llama"]
    damage(folder)
    with pytest.raises(WorkloadError, match=message) as caught:
        build(runs, {"llama": {"source": str(folder)}})
    assert str(folder) in str(caught.value)
    assert "workload.options.llama.source" in str(caught.value)


def test_a_missing_model_folder_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"there is no model folder .*nowhere"):
        build(runs, {"llama": {"source": str(tmp_path / "nowhere")}})


def test_a_pinned_hub_id_needs_no_hub_once_it_is_on_disk(
    runs: Path, workload: PairWorkload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = {"llama": {"source": "some/model", "revision": "ab" * 20}}
    with pytest.raises(WorkloadError, match="hf download some/model --revision abab"):
        build(runs, options)
    snapshots = tmp_path / "models--some--model" / "snapshots"
    snapshots.mkdir(parents=True)
    copy_models(runs, snapshots)["llama"].rename(snapshots / ("ab" * 20))
    found = build(runs, options)
    assert found.frozen_digests()["llama"] == workload.frozen_digests()["llama"]


@pytest.mark.parametrize(("name", "billions"), [("llama", 8.03), ("qwen", 7.62)])
def test_full_shapes_have_the_published_size(name: str, billions: float) -> None:
    family = FAMILIES[name]
    with torch.device("meta"):
        model = family.model_class(family.config("full"))
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == billions
