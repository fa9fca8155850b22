"""The pair's wire, exported by the command line, loads back as it was."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import torch
from running import BIN

from latentwire import CheckpointManager
from latentwire.config import parse_config
from latentwire.run.directory import create_run
from latentwire.train import randomness
from latentwire.train.state import TrainingState
from latentwire.workloads.pair.options import Options
from latentwire.workloads.pair.wire import LatentWire

OPTIONS: dict[str, Any] = {
    "llama": {"source": "meta-llama/Llama-3.1-8B", "revision": "a" * 40},
    "qwen": {"init": "random", "shape": "tiny"},
    "wire": {"latent_len": 4, "d_z": 16, "d_model": 16, "byte_layers": 1, "latent_layers": 1, "heads": 2},
    "data": {"kind": "pydoc", "max_source_bytes": 32},
}
RMS = {"llama": 0.02, "qwen": 0.05}


def test_an_exported_wire_loads_back_and_says_whose_it_is(tmp_path: Path) -> None:
    options = Options.model_validate(OPTIONS)
    wire = LatentWire(options.wire, 32, {"llama": (24, RMS["llama"]), "qwen": (20, RMS["qwen"])})
    tree = {"name": "a", "workload": {"target": "latentwire.workloads.pair:PairWorkload", "options": OPTIONS}}
    run = create_run(parse_config(tree, "here"), tmp_path)
    state = TrainingState()
    state.track("model", wire)
    identity = {"config": "c" * 64, "frozen": {"llama": "f" * 64}}
    manager = CheckpointManager(
        run.checkpoints, token=1, version="0", identity=identity, fence=lambda: None, event=lambda *_, **__: None
    )
    manager.save(state.snapshot(7, randomness.capture(), {"step": 7}, {}))
    manager.close()
    command = [BIN / "latentwire", "checkpoints", "export", str(run.path), "--to", tmp_path / "wire"]
    subprocess.run(command, check=True)

    loaded = LatentWire.from_folder(tmp_path / "wire", RMS)
    source = torch.arange(20).reshape(2, 10)
    latents = loaded.encode(source)
    assert torch.equal(latents, wire.encode(source))
    assert latents.shape == (2, 4, 16)
    for name in RMS:
        assert torch.equal(loaded.prefix(name, latents), wire.prefix(name, latents))
    config = json.loads((tmp_path / "wire" / "config.json").read_text())
    assert config["wire"]["latent_len"] == 4
    assert (config["models"]["llama"]["source"], config["models"]["llama"]["revision"]) == (
        "meta-llama/Llama-3.1-8B",
        "a" * 40,
    )
    assert config["latentwire"] == {"run": "a", "step": 7, "ema": False, **identity}
