"""The one training loop: drives a Workload through a Session."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from latentwire.config import ScheduleSection
from latentwire.elastic.planner import Placement
from latentwire.errors import TrainingDiverged
from latentwire.run.atomic import write_json
from latentwire.train import randomness
from latentwire.train.feed import num_samples
from latentwire.train.memory import Fullness, allocator_figures, find_micro_batch, peak_bytes, reset
from latentwire.train.order import derive_seed
from latentwire.train.precision import compute_dtype
from latentwire.train.rehearsal import heaviest, unchanged
from latentwire.train.session import Session
from latentwire.workloads.base import BuildContext, StepReport, Workload

_MEMORY_EVERY_STEPS = 20
"""Fragmentation grows slowly: its figures need not be read in every step."""


def train(session: Session, workload: Workload, placement: Placement) -> None:
    """Build the workload, resume, train to the last step. Called on every rank; blocks until done.

    Raises:
        Preempted: the machine is to be given back; the state is on disk.
        LatentWireError: what is wrong with the config, the data, the checkpoints or the run of the loss.
    """
    Training(session, workload, placement).run()


class Training:
    """The objects of one attempt's training, on one rank."""

    def __init__(self, session: Session, workload: Workload, placement: Placement) -> None:
        config = session.config.train
        self.session, self.workload, self.config, self.placement = session, workload, config, placement
        self.devices = [torch.device(device) for device in placement.devices[session.ranks.rank]]
        self.device = self.devices[0]
        dtype = compute_dtype(config.precision, self.devices, session.ranks)
        started = time.monotonic()
        workload.build(
            BuildContext(
                device=self.device,
                devices={
                    name: tuple(map(torch.device, devices))
                    for name, devices in placement.devices_of(session.ranks.rank).items()
                },
                compute_dtype=dtype,
                seed=session.config.seed,
                run_path=session.run.path,
                gradient_checkpointing=placement.gradient_checkpointing,
                safe_point=session.safe_point,
                event=session.event,
            )
        )
        session.frozen_digests = dict(workload.frozen_digests())
        session.event(
            "workload_built",
            seconds=round(time.monotonic() - started, 4),
            compute_dtype=str(dtype),
            num_samples=num_samples(workload.train_data),
        )
        self.parameters = [p for p in workload.trainable.parameters() if p.requires_grad]
        most = placement.probe_up_to
        self.micro_batch = placement.micro_batch if most is None else self._find_micro_batch(most)
        if config.micro_batch == "auto" and most is None and not (session.run.path / "micro_batch.json").exists():
            self._keep(self.micro_batch, {})  # of a CPU, which is not probed
        self._prepare(dtype)

    def _prepare(self, dtype: torch.dtype) -> None:
        model = self.workload.trainable
        settings = self.config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=settings.fused,
        )
        self.scheduler = LambdaLR(self.optimizer, lr_factor(self.config.schedule, self.config.steps))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.scaler.scale(torch.zeros((), device=self.device))  # made now, not on the stream of a micro-batch
        self.session.track(model=model, optimizer=self.optimizer, scheduler=self.scheduler, scaler=self.scaler)
        self.ema: AveragedModel | None = None
        if self.config.ema_decay is not None:
            self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.config.ema_decay))
            self.session.track(ema=self.ema)
        self.share = self.session.share(
            self.parameters,
            self.workload.train_data,
            global_batch=self.config.global_batch,
            micro_batch=self.micro_batch,
            collate=self.workload.collate,
        )
        self.share.lay_over(self.devices, self.placement.in_flight)

    def run(self) -> None:
        """Resume and train to the last step."""
        session = self.session
        start = session.restore()
        self._warm_up()
        self.workload.trainable.train()
        evaluate = self._evaluate if len(self.workload.eval_data) else None
        for step in session.steps(self.config.steps, evaluate, self.config.eval_every):
            reports = {}
            for batch in self.share:
                reports[self.share.index] = self.workload.step(batch, self._backward)
            self.share.reduce()
            self._update(step, self._gather(reports))
            if step == start + 1:  # the optimizer's states are there, and all that a step takes was taken
                self._tell_memory()

    # --- one step -----------------------------------------------------------------------------------------------------

    def _backward(self, loss: torch.Tensor) -> None:
        self.share.backward(self.scaler.scale(loss))

    def _update(self, step: int, losses: dict[str, float]) -> None:
        """Clip, step the optimizer, or skip a bad step; then write the figures down."""
        with self.session.clock("optimizer"):
            self.scaler.unscale_(self.optimizer)
            clip = self.config.grad_clip if self.config.grad_clip is not None else math.inf
            norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, clip))
            trouble = self._trouble(losses["loss"], norm)
            if trouble is None:
                self.scaler.step(self.optimizer)
                if self.ema is not None:
                    self.ema.update_parameters(self.workload.trainable)
            self.scaler.update()
            lr = float(self.scheduler.get_last_lr()[0])
            self.scheduler.step()
            self.optimizer.zero_grad(set_to_none=True)
        if trouble is not None:
            self._skip(step, trouble, losses["loss"], norm)
        self._log(losses, norm, lr)

    def _trouble(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return "the loss is not finite"
        if not math.isfinite(norm):  # fp16 overflows now and then: the scaler skips the step and scales down
            return None if self.scaler.is_enabled() else "a gradient is not finite"
        limit = self.config.exploding_grad_norm
        return None if limit is None or norm <= limit else f"the gradient norm is over {limit:g}"

    def _skip(self, step: int, trouble: str, loss: float, norm: float) -> None:
        counters = self.session.counters
        counters["skipped_steps"] += 1
        self.session.event("step_skipped", step=step + 1, reason=trouble, loss=loss, grad_norm=norm)
        if counters["skipped_steps"] > self.config.max_skipped_steps:
            raise TrainingDiverged(
                f"step {step + 1}: {trouble} (loss {loss:g}, gradient norm {norm:g}), and "
                f"{self.config.max_skipped_steps} steps were skipped before: lower train.optimizer.lr, "
                "look at the data of this step, or allow more with train.max_skipped_steps"
            )

    def _gather(self, reports: dict[int, StepReport]) -> dict[str, float]:
        """Means over the global batch, the same on every rank and for any number of ranks."""
        first = next(iter(reports.values()), None)
        names = ["loss", *sorted(set(first.losses) - {"loss"})] if first is not None else ["loss"]
        width = int(self.session.ranks.highest([float(len(names))])[0])
        table = torch.zeros(self.share.num_micro_batches, width + 2, dtype=torch.float64)
        for index, report in reports.items():
            figures = [*(float(report.losses[name]) for name in names), report.num_samples, report.num_tokens]
            table[index] = torch.tensor(figures, dtype=torch.float64)
        self.session.ranks.total(table)
        self._samples, self._tokens = (int(total) for total in table[:, width:].sum(dim=0))
        self.session.counters["tokens"] += self._tokens
        return dict(zip(names, table[:, :width].mean(dim=0).tolist(), strict=False))

    def _log(self, losses: dict[str, float], norm: float, lr: float) -> None:
        seconds = max(self.session.seconds_in_step(), 1e-9)
        is_due = self.session.step % _MEMORY_EVERY_STEPS == 0
        self.session.log(
            **losses,
            lr=lr,
            grad_norm=norm,
            samples_per_s=self._samples / seconds,
            tokens_per_s=self._tokens / seconds,
            **(allocator_figures(self.devices) if is_due else {}),
        )

    # --- memory -------------------------------------------------------------------------------------------------------

    def _find_micro_batch(self, most: int) -> int:
        """Try micro-batches out and record what is found: the run keeps it for its life. Every rank."""
        session, workload = self.session, self.workload
        numbers = 2 + 2 + (self.config.ema_decay is not None)  # the optimizer's moments, sums under way, the average
        unseen_bytes = 4 * numbers * sum(p.numel() for p in self.parameters)
        fullness = Fullness(self.devices, session.config.elastic, unseen_bytes)
        sample = heaviest(workload.train_data, session.config.seed, workload.collate)

        def try_out(size: int) -> float:
            session.safe_point()
            batch = workload.collate([sample] * size)
            return fullness.after(lambda: workload.step(batch, lambda loss: loss.backward()))

        workload.trainable.train()
        with randomness.isolated(derive_seed(session.config.seed, "probe")), unchanged(workload.trainable):
            found = find_micro_batch(self.config.global_batch, most, try_out, session.ranks)
        for device in self.devices:
            reset(device)  # else the peak of a pass that did not fit would be told as training's
        self._keep(found.micro_batch, {str(size): fullness for size, fullness in found.fullness.items()})
        return found.micro_batch

    def _keep(self, micro_batch: int, fullness: Mapping[str, float]) -> None:
        """Record what ``auto`` came to, for all later attempts. Rank 0 writes."""
        session = self.session
        record = {"micro_batch": micro_batch, "fullness": fullness, "attempt": session.attempt.number}
        session.event("micro_batch_found", **record)
        if session.ranks.rank == 0:
            session.attempt.assert_newest()
            write_json(session.run.path / "micro_batch.json", record)

    def _tell_memory(self) -> None:
        """Write down what the GPUs had to hold, from which later attempts are planned. Rank 0."""
        if self.device.type == "cuda" and self.session.ranks.rank == 0:
            expected = self.placement.peak_bytes
            measured = {
                "micro_batch": self.micro_batch,
                "gradient_checkpointing": self.placement.gradient_checkpointing,
                "in_flight": self.placement.in_flight,
                "modules": self.placement.modules,
                "peak_bytes": [peak_bytes(device) for device in self.devices],
            }
            self.session.event("memory", peak_bytes=measured["peak_bytes"], expected_bytes=expected)
            try:
                write_json(self.session.attempt.path / "memory.json", measured)
            except OSError as error:  # a full disk must not end a good attempt
                self.session.event("memory_not_written", error=str(error))

    # --- data, warm-up, evaluation ------------------------------------------------------------------------------------

    def _warm_up(self) -> None:
        """Forward and backward on the first samples: finds out-of-memory, times a step, changes nothing."""
        if not self.config.warmup_batches:
            return
        self.session.event("warmup_started", batches=self.config.warmup_batches)
        started = time.monotonic()
        self.workload.trainable.train()
        seed = derive_seed(self.session.config.seed, "warmup")
        with randomness.isolated(seed), unchanged(self.workload.trainable):
            for batch in self.share.feed.first_batches(self.config.warmup_batches):
                self.session.safe_point()
                step_started = time.monotonic()
                with self.share.rehearsal():
                    self.workload.step(batch, self._backward)
                self.session.step_pace.add((time.monotonic() - step_started) * self.share.num_slots)
        self.session.safe_point()
        self.session.event("warmup_finished", seconds=round(time.monotonic() - started, 4))

    def _evaluate(self) -> dict[str, float]:
        """Means over the evaluation batches. Every rank computes the same ones and gets the same figures."""
        data, size = self.workload.eval_data, self.micro_batch
        count = min(self.config.eval_batches, -(-len(data) // size))
        addresses = ([(0, i) for i in range(b * size, min((b + 1) * size, len(data)))] for b in range(count))
        totals: dict[str, float] = {}
        samples = 0
        self.workload.trainable.eval()
        with torch.no_grad():
            for batch in self.session.fetch(data, addresses, self.workload.collate):
                self.session.safe_point()
                report = self.workload.evaluate(batch)
                samples += report.num_samples
                for name, loss in report.losses.items():
                    totals[name] = totals.get(name, 0.0) + float(loss) * report.num_samples
        self.workload.trainable.train()
        return {f"eval/{name}": total / samples for name, total in totals.items()}


def lr_factor(settings: ScheduleSection, steps: int) -> Callable[[int], float]:
    """Linear warm-up from the first step, then cosine to ``min_lr_ratio`` at the last (Loshchilov & Hutter, 2017)."""

    def factor(step: int) -> float:
        if step < settings.warmup_steps:
            return (step + 1) / settings.warmup_steps
        progress = min(1.0, (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps))
        return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor
