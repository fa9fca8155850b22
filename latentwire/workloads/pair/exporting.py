"""What an exported wire says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentwire.workloads.pair.options import Options


def export_config(options: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The config.json from which ``LatentWire.from_folder`` builds the wire, and which models it belongs to."""
    checked = Options.model_validate(options)
    models = {"llama": checked.llama, "qwen": checked.qwen}
    return {
        "model_type": "latentwire-pair",
        "wire": checked.wire.model_dump(mode="json"),
        "max_source_bytes": checked.data.max_source_bytes,
        "models": {
            name: {**model.model_dump(mode="json"), "hidden_size": shapes[f"adapters.{name}.gain"][0]}
            for name, model in models.items()
        },
    }
