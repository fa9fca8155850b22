"""The trained part: bytes -> latents -> one soft prefix per model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from latentwire.workloads.pair.options import WireOptions

PADDING = 256
"""Stands for 'no byte' in a batch of sources."""


class Attention(nn.Module):
    """Multi-head attention of queries (B, Q, D) over keys (B, K, D), without dropout on the weights."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(d_model, d_model)
        self.key_value = nn.Linear(d_model, 2 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, queries: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend; ``mask`` (B, 1, 1, K) is True where a key may be read. Returns (B, Q, D)."""
        key, value = self.key_value(keys).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.query(queries), key, value))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block; given other keys than its own input it cross-attends."""

    def __init__(self, options: WireOptions) -> None:
        super().__init__()
        width = options.d_model
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, options.heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor, keys: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, Q, D) -> (B, Q, D)."""
        queries = self.attention_norm(x)
        x = x + self.dropout(self.attention(queries, queries if keys is None else keys, mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class ByteEncoder(nn.Module):
    """Source bytes (B, S) -> latents (B, latent_len, d_z).

    Self-attention over the bytes, then learned queries that read the bytes and each other in turn.
    """

    def __init__(self, options: WireOptions, max_source_bytes: int) -> None:
        super().__init__()
        width = options.d_model
        self.bytes = nn.Embedding(PADDING + 1, width)
        self.positions = nn.Parameter(torch.randn(max_source_bytes, width))
        self.byte_blocks = nn.ModuleList(Block(options) for _ in range(options.byte_layers))
        self.byte_norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(options.latent_len, width))
        self.cross_blocks = nn.ModuleList(Block(options) for _ in range(options.latent_layers))
        self.latent_blocks = nn.ModuleList(Block(options) for _ in range(options.latent_layers))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, options.d_z))

    def forward(self, source: Tensor) -> Tensor:
        """Encode; ``source`` holds bytes 0-255, and ``PADDING`` to the right of them."""
        mask = (source != PADDING)[:, None, None, :]
        x = self.bytes(source) + self.positions[: source.shape[1]]
        for block in self.byte_blocks:
            x = block(x, mask=mask)
        keys = self.byte_norm(x)
        latents = self.queries.expand(len(source), -1, -1)
        for cross, block in zip(self.cross_blocks, self.latent_blocks, strict=True):
            latents = block(cross(latents, keys, mask))
        return self.out(latents)


class Adapter(nn.Module):
    """Latents (B, latent_len, d_z) -> soft prefix (B, latent_len, H) of the size of the model's own embeddings."""

    def __init__(self, d_z: int, hidden_size: int, embedding_rms: float) -> None:
        super().__init__()
        self.embedding_rms = embedding_rms
        self.mlp = nn.Sequential(nn.LayerNorm(d_z), nn.Linear(d_z, 2 * d_z), nn.GELU(), nn.Linear(2 * d_z, hidden_size))
        self.gain = nn.Parameter(torch.ones(hidden_size))

    def forward(self, latents: Tensor) -> Tensor:
        """Map into the embedding space; at first every vector has the root mean square of an embedding."""
        vectors = self.mlp(latents).float()
        return functional.rms_norm(vectors, vectors.shape[-1:], self.gain) * self.embedding_rms


class LatentWire(nn.Module):
    """The byte encoder and one adapter per model; every parameter is float32 and trained.

    Args:
        options: sizes of the encoder and of the latents.
        max_source_bytes: the longest source that will ever be given.
        spaces: by model name, the hidden size and the root mean square of its input embeddings.
    """

    def __init__(self, options: WireOptions, max_source_bytes: int, spaces: Mapping[str, tuple[int, float]]) -> None:
        super().__init__()
        self.encoder = ByteEncoder(options, max_source_bytes)
        self.adapters = nn.ModuleDict({name: Adapter(options.d_z, *space) for name, space in spaces.items()})

    @classmethod
    def from_folder(cls, folder: Path, embedding_rms: Mapping[str, float]) -> LatentWire:
        """A wire that ``latentwire checkpoints export`` wrote, on the CPU.

        Args:
            folder: holds config.json and model.safetensors.
            embedding_rms: by model name, as ``FrozenModel.embedding_rms`` gives it: the frozen models' own.
        """
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        spaces = {name: (model["hidden_size"], embedding_rms[name]) for name, model in config["models"].items()}
        wire = cls(WireOptions.model_validate(config["wire"]), config["max_source_bytes"], spaces)
        wire.load_state_dict(load_file(folder / "model.safetensors"))
        return wire

    def encode(self, source: Tensor) -> Tensor:
        """Bytes (B, S) -> latents (B, latent_len, d_z), float32."""
        latents: Tensor = self.encoder(source)
        return latents.float()

    def prefix(self, name: str, latents: Tensor) -> Tensor:
        """Latents (B, latent_len, d_z) -> the named model's soft prefix (B, latent_len, H), float32."""
        vectors: Tensor = self.adapters[name](latents)
        return vectors
