"""SHA-256 of the frozen models, so that a checkpoint never meets other weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HASHED = (".safetensors", ".json", ".txt", ".jinja")
"""Weights, configs, and every file that a tokenizer is made of."""
NUM_THREADS = 4
CHUNK_BYTES = 16 * 2**20


def folder_digest(folder: Path, cache: Path, safe_point: Callable[[], None]) -> str:
    """SHA-256 over the names and contents of a model folder's files.

    Blocks for as long as reading the folder takes. A file whose size and modification time stand in ``cache`` is not
    read again. ``safe_point`` is called once per file whether or not it is, because every rank must call it as often.
    """
    files = sorted(p for p in folder.iterdir() if p.suffix in HASHED and p.is_file())
    keys = [_identity(file) for file in files]
    known = _read_cache(cache)
    with _hashing() as pool:
        jobs = {key: pool.submit(_hash_file, file) for file, key in zip(files, keys, strict=True) if key not in known}
        digests = []
        for key in keys:
            safe_point()
            digests.append(jobs[key].result() if key in jobs else known[key])
    if jobs:
        _write_cache(cache, {**known, **dict(zip(keys, digests, strict=True))})
    return _combine((file.name, digest) for file, digest in zip(files, digests, strict=True))


def module_digest(module: torch.nn.Module, safe_point: Callable[[], None]) -> str:
    """SHA-256 over the names and bits of a module's parameters, wherever they are; for weights that no file holds."""
    names = sorted(name for name, _ in module.named_parameters())
    parameters = dict(module.named_parameters())
    digests: dict[str, str] = {}
    with _hashing() as pool:
        for start in range(0, len(names), NUM_THREADS):  # a few at a time: each is copied to host memory
            safe_point()
            group = names[start : start + NUM_THREADS]
            digests |= zip(group, pool.map(lambda name: _hash_tensor(parameters[name]), group), strict=True)
    return _combine(digests.items())


@contextlib.contextmanager
def _hashing() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="hash")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # a notice must not wait for files that are still queued


def _identity(file: Path) -> str:
    status = file.stat()
    return f"{file.absolute()}|{status.st_size}|{status.st_mtime_ns}"


def _hash_file(file: Path) -> str:
    digest, buffer = hashlib.sha256(), bytearray(CHUNK_BYTES)
    with file.open("rb", buffering=0) as stream:
        while num_read := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:num_read])
    return digest.hexdigest()


def _hash_tensor(tensor: torch.Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


def _combine(named: Iterable[tuple[str, str]]) -> str:
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in named).encode()).hexdigest()


def _read_cache(cache: Path) -> Mapping[str, str]:
    try:
        entries = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # nothing is lost but time
    return entries if isinstance(entries, dict) else {}


def _write_cache(cache: Path, entries: Mapping[str, str]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=cache.parent, prefix=f".{cache.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        json.dump(entries, stream, indent=1)
    Path(draft).replace(cache)
