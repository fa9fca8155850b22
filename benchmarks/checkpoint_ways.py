"""What ``benchmarks/checkpoint.py`` compares: a state to save, the ways to save and load it, and the raw limits."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import accelerate
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from latentwire.checkpoint import layout, reader
from latentwire.checkpoint.manager import CheckpointManager
from latentwire.run.atomic import fsync_directory
from latentwire.train.staging import Staging
from latentwire.train.state import TrainingState

RAW_FILE_BYTES = 512 << 20
RAW_THREADS = 8
_CHUNK_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one save, all from its start.

    Attributes:
        stall_s: until the training loop may change the state again.
        durable_s: until the files, and the name of their folder, are fsynced.
        verified_s: until every byte was read back and compared; None where nobody does.
    """

    stall_s: float
    durable_s: float
    verified_s: float | None = None


class Way(Protocol):
    """One way to save a model.

    Attributes:
        name: in the tables.
        keeps_buffers: its first save allocates what the later ones use again.
    """

    name: str
    keeps_buffers: bool

    def save(self, model: nn.Module, folder: Path) -> Timing:
        """Save into an empty folder and wait until all is done."""

    def load(self, model: nn.Module, folder: Path) -> bool:
        """Load what is there into the model; False where this way is not compared in loading."""


# ---- The state -------------------------------------------------------------------------------------------------------


def llama_like(num_bytes: int, device: str) -> nn.Module:
    """A model of about that size in the shapes of Llama 3 (16.06 GB: of its 8B), in bf16, of random bits."""
    hidden = 4096
    while hidden > 64 and 2 * 104 * hidden**2 > num_bytes:  # the vocabulary and at least some eight layers
        hidden //= 2
    vocabulary = 128256 * hidden // 4096
    num_layers = max(1, round((num_bytes / 2 - 2 * vocabulary * hidden) / (13 * hidden**2)))
    options = {"device": device, "dtype": torch.bfloat16}
    wide, narrow = hidden * 7 // 2, hidden // 4
    sizes = {"q": (hidden, hidden), "k": (hidden, narrow), "v": (hidden, narrow), "o": (hidden, hidden),
             "gate": (hidden, wide), "up": (hidden, wide), "down": (wide, hidden)}  # fmt: skip

    def linear(inputs: int, outputs: int) -> nn.Module:
        return nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False, **options)

    layers = [
        nn.ModuleDict(
            {f"{name}_proj": linear(*size) for name, size in sizes.items()} | {"norm": nn.RMSNorm(hidden, **options)}
        )
        for _ in range(num_layers)
    ]
    model = nn.ModuleDict(
        {
            "embed_tokens": nn.utils.skip_init(nn.Embedding, vocabulary, hidden, **options),
            "layers": nn.ModuleList(layers),
            "lm_head": linear(hidden, vocabulary),
        }
    )
    for parameter in model.requires_grad_(False).parameters():
        parameter.view(-1).view(torch.int64).random_()
    return model


def num_bytes_of(model: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def change(model: nn.Module) -> None:
    """Change every tensor in place, a little, as a step would: no tensor is that of the save before."""
    for parameter in model.parameters():
        parameter.view(-1).view(torch.int16)[0] += 1


def probe(model: nn.Module) -> list[int]:
    """What ``change`` changes."""
    return torch.stack([p.view(-1).view(torch.int16)[0] for p in model.parameters()]).tolist()


# ---- Peers -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Blocking:
    """A peer that holds the training loop up until it is done; what it does not fsync itself is fsynced after it."""

    name: str
    write: Callable[[nn.Module, Path], None]
    read: Callable[[nn.Module, Path], object] | None = None
    keeps_buffers: bool = False

    def save(self, model: nn.Module, folder: Path) -> Timing:
        """See Way."""
        started = time.perf_counter()
        self.write(model, folder)
        fsync_tree(folder)
        seconds = time.perf_counter() - started
        return Timing(seconds, seconds)

    def load(self, model: nn.Module, folder: Path) -> bool:
        """See Way."""
        if self.read is not None:
            self.read(model, folder)
        return self.read is not None


def _torch_save(model: nn.Module, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "model.pt")


def _torch_save_and_hash(model: nn.Module, folder: Path) -> None:
    _torch_save(model, folder)
    fsync_tree(folder)
    digest = hashlib.sha256()
    with open(folder / "model.pt", "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    (folder / "model.pt.sha256").write_text(f"{digest.hexdigest()}  model.pt\n")


def _torch_load(model: nn.Module, folder: Path) -> None:
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))


def _safetensors_save(model: nn.Module, folder: Path) -> None:
    tensors = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def _safetensors_load(model: nn.Module, folder: Path) -> None:
    device = str(next(model.parameters()).device)
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors", device=device))


def _dcp_writer(folder: Path) -> dcp.FileSystemWriter:
    return dcp.FileSystemWriter(folder, thread_count=8, sync_files=True)


def _dcp_save(model: nn.Module, folder: Path) -> None:
    dcp.save(model.state_dict(), storage_writer=_dcp_writer(folder), no_dist=True)


def _dcp_load(model: nn.Module, folder: Path) -> None:
    dcp.load(model.state_dict(), checkpoint_id=folder, no_dist=True)


class AsyncDcp:
    """dcp.async_save with a stager that keeps its (for a GPU: pinned) buffers and copies on a stream of its own."""

    name = "dcp.async_save"
    keeps_buffers = True

    def __init__(self, device: str) -> None:
        cuda = device.startswith("cuda")
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=cuda
            )
        )

    def save(self, model: nn.Module, folder: Path) -> Timing:
        """See Way."""
        # A group of one, which async_save asks for; only for this save, as the other ways shall not find one.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            started = time.perf_counter()
            response = dcp.async_save(model.state_dict(), storage_writer=_dcp_writer(folder), async_stager=self._stager)
            response.staging_completion.result()
            stall = time.perf_counter() - started
            response.upload_completion.result()
            fsync_tree(folder)
            return Timing(stall, time.perf_counter() - started)
        finally:
            dist.destroy_process_group()

    def load(self, model: nn.Module, folder: Path) -> bool:
        """See Way."""
        return False


class AccelerateState:
    """accelerate's save_state with safetensors."""

    name = "accelerate save_state"
    keeps_buffers = False

    def __init__(self, model: nn.Module, device: str) -> None:
        self._accelerator = accelerate.Accelerator(cpu=device == "cpu")
        self._accelerator.prepare(model)

    def save(self, model: nn.Module, folder: Path) -> Timing:
        """See Way."""
        started = time.perf_counter()
        self._accelerator.save_state(str(folder), safe_serialization=True)
        fsync_tree(folder)
        seconds = time.perf_counter() - started
        return Timing(seconds, seconds)

    def load(self, model: nn.Module, folder: Path) -> bool:
        """See Way."""
        return False


# ---- Ours ------------------------------------------------------------------------------------------------------------


class Engine:
    """TrainingState, Staging and CheckpointManager as a session uses them; one for all saves."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self._model = model
        self._state = TrainingState()
        self._state.track("model", model)
        # it owns the parameters: what only its step changes may be copied beside the next forward pass
        self._state.track("optimizer", torch.optim.SGD(model.parameters()))
        self._staging = Staging(limit_bytes=1 << 40)
        self._step = 0
        self.happened: dict[str, float] = {}
        self.manager = CheckpointManager(
            folder, token=1, version="benchmark", identity={}, fence=lambda: None, event=self._note, keep=1
        )

    def change(self) -> None:
        """Change the state, so that the next save is another one."""
        change(self._model)

    def begin(self, overlap: bool) -> float:
        """Begin a save of the state as it is now; returns the seconds of stall."""
        self._step += 1
        started = time.perf_counter()
        snapshot = self._state.snapshot(self._step, {}, {"step": self._step}, {})
        staged = self._staging.stage(snapshot, self.manager.share_of(snapshot), overlap)
        assert staged is not None
        stall = time.perf_counter() - started
        self.manager.save(staged)
        return stall

    def load(self) -> None:
        """Load the newest into the model."""
        path = self.manager.folder / layout.step_name(self._step)
        self._state.apply(reader.load(path, threads=8, place=self._state.place()))

    def _note(self, name: str, **fields: Any) -> None:
        self.happened[name] = time.perf_counter()


@dataclasses.dataclass
class LatentWire:
    """Ours: training waits for the copy, or, overlapped, for nothing until the optimizer's next step."""

    engine: Engine
    overlap: bool
    keeps_buffers: bool = False

    @property
    def name(self) -> str:
        """See Way."""
        return "latentwire overlapped" if self.overlap else "latentwire"

    def save(self, model: nn.Module, folder: Path) -> Timing:
        """See Way."""
        started = time.perf_counter()
        stall = self.engine.begin(self.overlap)
        self.engine.manager.wait()
        if self.engine.manager.failure is not None:
            raise self.engine.manager.failure
        happened = self.engine.happened
        return Timing(stall, happened["save_committed"] - started, happened["save_verified"] - started)

    def load(self, model: nn.Module, folder: Path) -> bool:
        """See Way."""
        if not self.overlap:
            self.engine.load()
        return not self.overlap


def ways(model: nn.Module, device: str, own_folder: Path) -> list[Way]:
    """All of them, in the order of the tables."""
    engine = Engine(model, own_folder)
    return [
        Blocking("torch.save", _torch_save, _torch_load),
        Blocking("torch.save + sha256", _torch_save_and_hash),
        Blocking("safetensors save_file", _safetensors_save, _safetensors_load),
        Blocking("dcp.save", _dcp_save, _dcp_load),
        AsyncDcp(device),
        AccelerateState(model, device),
        LatentWire(engine, overlap=False, keeps_buffers=True),
        *([LatentWire(engine, overlap=True)] if device.startswith("cuda") else []),
    ]


# ---- Limits ----------------------------------------------------------------------------------------------------------


class Limits:
    """What the machine can do with the same bytes, by itself. Holds one copy of them in host memory."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        pinned = next(model.parameters()).is_cuda
        self._host = torch.empty(num_bytes_of(model), dtype=torch.uint8, pin_memory=pinned)
        self.copy()
        self._bytes: memoryview = self._host.numpy().data

    def measures(self) -> dict[str, Callable[[Path], None]]:
        """Name -> what is timed, given an empty folder; the first is what ratios refer to."""
        cores = len(os.sched_getaffinity(0))
        return {
            f"raw write, {RAW_THREADS} threads": lambda folder: self.write(folder, RAW_THREADS, RAW_FILE_BYTES),
            "raw write, one file": lambda folder: self.write(folder, 1, self._bytes.nbytes),
            "sha256, 1 core": lambda folder: self.hash(1),
            f"sha256, {cores} cores": lambda folder: self.hash(cores),
            "copy to host": lambda folder: self.copy(),
        }

    def write(self, folder: Path, threads: int, file_bytes: int) -> None:
        """The bytes to files of that size, each fsynced at its end, and the folder."""
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda part: _write(folder / f"{part[0]}", part[1]), enumerate(self._parts(file_bytes))))
        fsync_directory(folder)
        fsync_directory(folder.parent)

    def hash(self, threads: int) -> None:
        """SHA-256 of the bytes, in as many parts."""
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda part: hashlib.sha256(part).digest(), self._parts(-(-self._bytes.nbytes // threads))))

    def copy(self) -> None:
        """The tensors to host memory: for a GPU pinned, in one go."""
        position = 0
        for parameter in self._model.parameters():
            flat = parameter.view(-1).view(torch.uint8)
            self._host[position : position + flat.numel()].copy_(flat, non_blocking=True)
            position += flat.numel()
        if self._host.is_pinned():
            torch.cuda.synchronize()

    def _parts(self, size: int) -> Iterator[memoryview]:
        return (self._bytes[start : start + size] for start in range(0, self._bytes.nbytes, size))


def _write(path: Path, data: memoryview) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        position = 0
        while position < data.nbytes:
            position += os.write(descriptor, data[position : position + _CHUNK_BYTES])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- Files -----------------------------------------------------------------------------------------------------------


def fsync_tree(folder: Path) -> None:
    """Make a folder, all in it, and its name durable."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            descriptor = os.open(Path(parent, name), os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        fsync_directory(Path(parent))
    fsync_directory(folder.parent)


def warm(folder: Path) -> None:
    """Read all files once, so that they are in the page cache."""
    buffer = bytearray(_CHUNK_BYTES)
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
