"""Configs: typed models, YAML files with ``base:`` inheritance, and ``a.b=c`` overrides.

A config resolves in this order, later wins: defaults here, the file's ``base:`` (recursively), the file, overrides.
Unknown keys are errors that name their nearest neighbours. The part of a config that decides the result of a run is
its *identity* (``seed``, ``workload``, ``train``); the rest may change between attempts without changing a bit.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field

from latentwire.errors import ConfigError
from latentwire.sbatch import refuse_unknown
from latentwire.target import options_model
from latentwire.tree import overridden, read_tree

TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
"""Experiment trackers by the names that accelerate has for them; a test compares."""
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Percent = Annotated[float, Field(ge=0, le=100)]


_SECRETS = re.compile(
    r"(key|secret|token|password|passwd|passphrase|credentials?|username|authorization|connection_?string)$", re.I
)
"""What the names of secrets end with: ``access_token``, ``aws_secret_access_key``, ``accountKey``."""


def _refuse_secrets(options: Mapping[str, Any]) -> None:
    secret = next((path for path in _key_paths(options) if _SECRETS.search(path)), None)
    if secret:
        raise ValueError(
            f"{secret} does not belong in a config, which is written to the run's directory: give credentials "
            "in the environment, or in the files that the service's own tools read"
        )


def _key_paths(value: Any, prefix: str = "") -> Iterable[str]:
    """All keys however deep, as ``a.b``; those in a list as if it were not there."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield f"{prefix}{key}"
            yield from _key_paths(inner, f"{prefix}{key}.")
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _key_paths(inner, prefix)


def refuse_unknown_trackers(names: Iterable[str]) -> None:
    """Raise a ValueError for a tracker that accelerate has not, with the nearest names."""
    for name in names:
        if name not in TRACKERS:
            near = difflib.get_close_matches(name, TRACKERS, n=1)
            cure = f"did you mean {near[0]}?" if near else f"there are: {', '.join(TRACKERS)}"
            raise ValueError(f"there is no tracker {name!r}; {cure}")


class Section(pydantic.BaseModel):
    """Base of all config models: immutable, no unknown keys, only finite numbers, defaults checked too."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class WorkloadSection(Section):
    """What is trained."""

    target: str
    """``module:Class`` or ``file.py:Class`` of a Workload, or ``module:function`` taking a Session, or ``script``."""
    options: dict[str, Any] = {}
    """Given to the workload; checked by the ``Options`` model beside it."""


class OptimizerSection(Section):
    """AdamW."""

    lr: Annotated[float, Field(gt=0)] = 3e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    fused: bool = False
    """One kernel for all parameters: faster on a GPU. Rounds otherwise than without, so it is part of the identity."""


class ScheduleSection(Section):
    """Linear warm-up, then cosine decay."""

    warmup_steps: Annotated[int, Field(ge=0)] = 100
    min_lr_ratio: Fraction = 0.1
    """The last learning rate over the highest."""


class TrainSection(Section):
    """The training loop. Every key here can change the result, so all of it is the run's identity."""

    steps: Positive = 1000
    """Optimizer steps in all."""
    global_batch: Positive = 8
    """Samples in one step, over all ranks."""
    micro_batch: Positive | Literal["auto"] = 8
    """Samples in one forward pass; divides the global batch. ``auto``: the largest that the GPUs have memory for, found
    at the run's first start and kept for its life, because bits depend on it."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """``auto``: bf16 where the GPU has it, else fp16 on a GPU, fp32 on a CPU."""
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the global gradient norm to this."""
    exploding_grad_norm: Annotated[float, Field(gt=0)] | None = 1e4
    """A step whose gradient norm is larger is recorded and skipped."""
    max_skipped_steps: Annotated[int, Field(ge=0)] = 20
    """So many non-finite or exploding steps may be skipped in a run; one more ends it."""
    gradient_checkpointing: bool | Literal["auto"] = False
    """Recompute activations in the backward pass: the same bits in less memory, about a quarter slower. ``auto``: where
    the placement needs it."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Keep an exponential moving average of the trainable weights."""
    warmup_batches: Annotated[int, Field(ge=0)] = 1
    """Forward and backward passes before the first step of an attempt that change nothing: they find out-of-memory
    early and time a step, so that the first notice can be judged."""
    eval_every: Positive | None = 200
    """Evaluate after every so many steps and after the last."""
    eval_batches: Positive = 16
    cpu_threads: Positive = 2
    """torch.set_num_threads of every rank. Sums on a CPU depend on it, so it never follows the machine."""
    deterministic: bool = True
    """torch.use_deterministic_algorithms: off, the same bits are not promised on a GPU."""

    @pydantic.model_validator(mode="after")
    def _micro_batches_are_whole(self) -> TrainSection:
        if self.micro_batch != "auto" and self.global_batch % self.micro_batch:
            raise ValueError(f"global_batch ({self.global_batch}) is no multiple of micro_batch ({self.micro_batch})")
        return self

    @pydantic.model_validator(mode="after")
    def _warmup_fits(self) -> TrainSection:
        if self.schedule.warmup_steps >= self.steps:
            raise ValueError(
                f"schedule.warmup_steps ({self.schedule.warmup_steps}) must be smaller than steps ({self.steps})"
            )
        return self


class DataSection(Section):
    """How samples are fetched; never which."""

    workers: Annotated[int, Field(ge=0)] = 0
    """DataLoader worker processes of each rank."""
    prefetch: Positive = 2
    """Micro-batches that each worker prepares ahead."""


class CheckpointSection(Section):
    """When checkpoints are made and which are kept."""

    interval_s: Annotated[float, Field(gt=0)] | Literal["auto"] | None = 300.0
    """``auto``: from what a save costs and how often the run was preempted."""
    interval_steps: Positive | None = None
    """Also save after every so many steps."""
    keep: Positive = 3
    """So many verified checkpoints are kept, besides the best."""
    best_metric: str | None = "eval/loss"
    best_mode: Literal["min", "max"] = "min"
    shard_mb: Positive = 512
    """A tensor file grows to about this size before the next is begun."""
    threads: Positive = 8
    """Files that are hashed and written side by side."""
    overlap: bool = True
    """On a GPU, copy what only ``optimizer.step()`` changes while the next forward and backward pass run."""
    host_memory_gb: Annotated[float, Field(gt=0)] | None = None
    """A state larger than this is not copied first but streamed to the disk while training waits. None: half of the
    memory that is free at the start."""
    link_unchanged: bool = False
    """Files that did not change since the last verified checkpoint are hard-linked and not written again. Saves the
    disk much where frozen weights are tracked; but then one bad byte of such a file spoils all checkpoints that share
    it, so have a mirror."""
    max_unchanged: Positive = 3
    """After so many saves in a row with the very same weights an alarm is raised."""
    mirror: Annotated[str, Field(pattern=r"^(file:///|s3://|gs://)[^?#]*[^?#/]$")] | None = None
    """A second home: verified checkpoints are copied, in the background, to a folder of the run's name under this URL
    (``file:///folder``, ``s3://bucket/prefix``, ``gs://bucket/prefix``), and brought back when those here are gone."""
    mirror_keep: Positive = 3
    """So many copies are kept there, besides the best."""
    mirror_options: dict[str, Any] = {}
    """For the store's fsspec client, such as ``{endpoint_url: "https://..."}``; no passwords."""

    @pydantic.field_validator("mirror_options")
    @classmethod
    def _no_passwords(cls, options: dict[str, Any]) -> dict[str, Any]:
        _refuse_secrets(options)
        return options


class PreemptionSection(Section):
    """What a notice means."""

    grace_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds between a notice and the kill; where the job's end is known to come sooner, that counts."""
    save_signal: Literal["USR1", "USR2", "none"] = "USR1"
    """This signal means: save and go on. USR2 otherwise means a notice."""


class MonitorSection(Section):
    """The monitor beside the ranks."""

    interval_s: Annotated[float, Field(gt=0)] = 1.0
    trackers: tuple[str, ...] = ()
    """Experiment trackers that are sent the curve, such as ``[tensorboard, wandb]``; each by a process of its own."""
    tracker_options: dict[str, dict[str, Any]] = {}
    """For a tracker's own start, such as ``{wandb: {project: wire, mode: offline}}``; no passwords."""

    @pydantic.field_validator("trackers", "tracker_options")
    @classmethod
    def _trackers_exist(cls, value: Any) -> Any:
        refuse_unknown_trackers(value)
        return value

    @pydantic.field_validator("tracker_options")
    @classmethod
    def _no_passwords(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for options in value.values():
            _refuse_secrets(options)
        return value


class AlertsSection(Section):
    """When a running attempt calls for a person, and how that person hears of it. ``null`` turns a rule off."""

    gpu_utilisation_percent: Percent | None = 75.0
    """The GPUs that work are busy for less of the time, as a mean."""
    gpu_memory_percent: Percent | None = 85.0
    """The fullest GPU is fuller."""
    temperature_c: Annotated[float, Field(gt=0)] | None = 85.0
    """The hottest GPU is hotter."""
    for_s: Annotated[float, Field(ge=0)] = 300.0
    """So long one of these three, ``disk_free_percent`` or ``grace`` must hold without a break, and be gone without a
    break. What the others hold against their thresholds has a duration of its own: they are told at once."""
    error_percent: Percent | None = 1.0
    """More of the last 1000 steps were skipped, or of the last 5 saves failed."""
    disk_free_percent: Percent | None = 5.0
    """Less of the run's disk is free."""
    checkpoint_age_s: Annotated[float, Field(gt=0)] | Literal["auto"] | None = "auto"
    """No checkpoint was verified for longer. ``auto``: three times checkpoint.interval_s, but 900 s at least."""
    no_progress_s: Annotated[float, Field(gt=0)] | None = 900.0
    """No step for longer."""
    grace: bool = True
    """A notice would not fit into the grace."""
    loss_spike: Annotated[float, Field(gt=0)] | None = 8.0
    """The median of the last 5 losses is so many spreads (of the 100 before, as sigmas) above the median of these."""
    webhook: str | None = None
    """Alerts are posted here as JSON: ``https://...``, or ``$NAME`` of an environment variable that holds the URL: this
    file is written to the run's directory, and a URL may be a secret."""
    command: tuple[str, ...] | None = None
    """Run for every alert, without a shell, with the same JSON on its standard input."""

    @pydantic.field_validator("webhook")
    @classmethod
    def _no_secret_in_it(cls, webhook: str | None) -> str | None:
        if webhook is not None and not re.fullmatch(r"https?://[^\s@]+|\$[A-Za-z_][A-Za-z0-9_]*", webhook):
            raise ValueError("give an http(s) URL without a password, or $NAME of a variable that holds one")
        return webhook

    @pydantic.field_validator("command")
    @classmethod
    def _has_a_program(cls, command: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if command is not None and not (command and command[0]):
            raise ValueError("name a program, as in [notify-me, --urgent], or leave it out")
        return command


class RetrySection(Section):
    """How often a run is started again, by cause. Progress resets every count; preemptions never count."""

    oom: Annotated[int, Field(ge=0)] = 5
    """Out of memory: each time the micro-batch is halved and the global batch kept; where a replica computed two at
    once, it computes one at a time first."""
    network: Annotated[int, Field(ge=0)] = 5
    network_backoff_s: Annotated[float, Field(gt=0)] = 5.0
    """First pause after a network failure; doubles up to 300 s."""
    other: Annotated[int, Field(ge=0)] = 3
    lost: Annotated[int, Field(ge=0)] = 10
    """Attempts that vanished without a word (SIGKILL, node failure) with no step gained since the last."""


class ElasticSection(Section):
    """How the work is laid over the GPUs. The bits of the result do not depend on it, but for ``exact``."""

    num_ranks: Positive | None = None
    """Ranks of an attempt, over all its nodes, each with a whole replica; None: as the planner finds best."""
    gpus_per_replica: Annotated[int, Field(ge=1, le=4)] | None = None
    """Over so many GPUs the models of a replica are divided; None: as the planner finds best."""
    exact: bool = True
    """Add gradients in one order for any number of ranks. Off: a plain all-reduce, and other bits for each number."""
    memory_target: Annotated[float, Field(gt=0, le=0.85)] = 0.75
    """Of a GPU's memory, what a plan may fill."""
    smallest_gpu_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory of the smallest GPU that the run may ever get: ``train.micro_batch: auto`` then fits on it too."""
    hang_s: Annotated[float, Field(gt=0)] = 120.0
    """When the ranks have waited so long for one of them, it is named."""
    timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """When they have waited so long, the attempt ends as a network failure."""
    patience_s: Annotated[float, Field(gt=0)] = 600.0
    """A job that waits in the queue for longer is moved to the next rung of scheduler.gpus."""

    @pydantic.field_validator("timeout_s")
    @classmethod
    def _named_before_given_up(cls, timeout_s: float, info: pydantic.ValidationInfo) -> float:
        hang_s = info.data.get("hang_s", 0.0)
        if timeout_s <= hang_s:
            raise ValueError(f"must be more than elastic.hang_s ({hang_s:g})")
        return timeout_s


class SchedulerSection(Section):
    """Where jobs go and what they ask for."""

    kind: Literal["auto", "local", "slurm"] = "auto"
    """``auto``: slurm where sbatch is found and knows of a cluster, else local."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclude: str | None = None
    time_min: Positive = 240
    nodes: Positive = 1
    gpus: Annotated[int, Field(ge=0)] | tuple[Positive, ...] | None = None
    """GPUs of a job, over all its nodes; a list is a ladder: the first that can start soon is asked for. None: all
    visible ones locally, one a node under Slurm."""
    cpus: Positive = 8
    """On each node."""
    mem_gb: Positive | None = None
    """On each node."""
    requeue: bool = True
    """Let a preempted job keep its id and its place; off, a new job is submitted each time."""
    successors: Annotated[int, Field(ge=0)] = 0
    """So many more jobs are submitted at once, each to start after the one before has ended: the run goes on where a
    job cannot requeue itself and no orchestrator is alive."""
    extra: dict[str, str | int | bool] = {}
    """Any other option of sbatch, long name with underscores: ``{mail_type: FAIL}``."""

    @pydantic.field_validator("extra")
    @classmethod
    def _options_exist(cls, extra: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        refuse_unknown(extra)
        return extra

    @pydantic.field_validator("gpus")
    @classmethod
    def _ladder_leads_down(cls, gpus: int | tuple[int, ...] | None) -> int | tuple[int, ...] | None:
        if isinstance(gpus, tuple) and (not gpus or list(gpus) != sorted(set(gpus), reverse=True)):
            raise ValueError("a list is a ladder that leads down, such as [4, 2, 1]")
        return gpus

    @pydantic.model_validator(mode="after")
    def _nodes_are_equal(self) -> SchedulerSection:
        uneven = [rung for rung in self.ladder if rung % self.nodes]
        if uneven:
            raise ValueError(f"gpus: {uneven[0]} GPUs cannot be divided equally among nodes: {self.nodes}")
        return self

    @property
    def ladder(self) -> tuple[int, ...]:
        """GPUs of a job, from the most that are wanted to the fewest that will do."""
        if self.gpus is None:
            return (self.nodes,)
        return self.gpus if isinstance(self.gpus, tuple) else (self.gpus,)


class Config(Section):
    """A resolved config: all that an experiment is."""

    name: str
    """Names the run: its directory is runs/experiment_<name>."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    workload: WorkloadSection
    train: TrainSection = TrainSection()
    data: DataSection = DataSection()
    checkpoint: CheckpointSection = CheckpointSection()
    preemption: PreemptionSection = PreemptionSection()
    monitor: MonitorSection = MonitorSection()
    alerts: AlertsSection = AlertsSection()
    retry: RetrySection = RetrySection()
    elastic: ElasticSection = ElasticSection()
    scheduler: SchedulerSection = SchedulerSection()

    @pydantic.field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, name: str) -> str:
        if not RUN_NAME.fullmatch(name) or ".." in name:
            raise ValueError(
                f"{name!r} cannot name a folder: use letters, digits, '.', '_' and '-', no slash, no '..', "
                "beginning with a letter or digit, at most 100"
            )
        return name

    def to_yaml(self) -> str:
        """The whole config with every default, as YAML that loads back to an equal config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)

    def identity(self) -> dict[str, Any]:
        """The part that decides the result."""
        return self.model_dump(
            mode="json", include={"seed": True, "workload": True, "train": True, "elastic": {"exact"}}
        )

    def digest(self) -> str:
        """SHA-256 of the identity, the same on any machine."""
        canonical = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def load_config(path: Path | str, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file with its bases, apply ``a.b=c`` overrides, check everything.

    The workload's module is imported for its ``Options``; torch is not, unless that module imports it.

    Raises:
        ConfigError: any mistake, with the file, the key and the nearest valid keys.
    """
    path = Path(path)
    tree = read_tree(path)
    if "runs" in tree:
        raise ConfigError(f"{path} is a fleet of several runs: python -m latentwire.orchestrate --config {path}")
    return parse_config(tree, str(path), overrides)


def parse_config(tree: Mapping[str, Any], where: str, overrides: Iterable[str] = ()) -> Config:
    """Apply ``a.b=c`` overrides to a plain tree, and check it; ``where`` names it in errors.

    Raises:
        ConfigError: any mistake, with the key and the nearest valid keys.
    """
    for override in overrides:
        tree = overridden(tree, override)
    return with_checked_options(sections_of(tree, where), where)


def sections_of(tree: Mapping[str, Any], where: str) -> Config:
    """The same without a look at the workload: its options are taken as they are, and none of its code is run.

    Raises:
        ConfigError: any mistake, with the key and the nearest valid keys.
    """
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ConfigError(_explain(error, Config, where)) from None


def with_checked_options(config: Config, where: str) -> Config:
    """The config with its workload's options checked, and completed, by the ``Options`` beside the workload.

    Raises:
        ConfigError, WorkloadError: they are wrong, or the workload cannot be imported.
    """
    model = options_model(config.workload.target)
    if model is None:
        return config
    try:
        options = model.model_validate(config.workload.options).model_dump(mode="json")
    except pydantic.ValidationError as error:
        raise ConfigError(_explain(error, model, where, prefix="workload.options.")) from None
    return config.model_copy(update={"workload": config.workload.model_copy(update={"options": options})})


def _explain(error: pydantic.ValidationError, model: type[pydantic.BaseModel], where: str, prefix: str = "") -> str:
    lines = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"  {prefix}{key}: unknown key{_neighbours(model, key, prefix)}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            is_of_section = item["type"] == "value_error" and isinstance(item["input"], dict)  # says itself what it got
            got = "" if is_of_section else f" (got {str(item['input'])[:80]!r})"
            lines.append(f"  {prefix}{key}: {message}{got}")
    return f"{where}:\n" + "\n".join(lines)


def _neighbours(model: type[pydantic.BaseModel], key: str, prefix: str) -> str:
    paths = list(_all_paths(model))
    parent, _, leaf = key.rpartition(".")
    near = difflib.get_close_matches(key, paths, n=3, cutoff=0.6)
    near += [p for p in paths if p.rpartition(".")[2] == leaf and p not in near]
    if near:
        return f"; did you mean {' or '.join(prefix + p for p in near[:3])}?"
    siblings = [p.rpartition(".")[2] for p in paths if p.rpartition(".")[0] == parent]
    return f"; valid here: {', '.join(siblings)}" if siblings else ""


def _all_paths(model: type[pydantic.BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in _models_in(field.annotation):
            yield from _all_paths(inner, f"{prefix}{name}.")


def _models_in(annotation: Any) -> list[type[pydantic.BaseModel]]:
    inner = [m for part in typing.get_args(annotation) for m in _models_in(part)]
    return [annotation] if inspect.isclass(annotation) and issubclass(annotation, pydantic.BaseModel) else inner
