"""The training loop: batches in, optimizer steps, checkpoints, logs and an exported model folder out."""

from __future__ import annotations

import json
import math
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lumos.data.loader import VALIDATION_STEP, Batch, Curriculum, StepShape, prefetched
from lumos.errors import RunError, UserError
from lumos.training import checkpoint
from lumos.training.ardf import ArdfTask
from lumos.training.ema import Ema
from lumos.training.engine import make_engine, pick_device, start_processes
from lumos.training.interrupt import Interrupt
from lumos.training.logging import Meter, RunLog, memory_bytes
from lumos.training.schedule import learning_rate
from lumos.training.settings import TrainingSettings

EXPORT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Task(Protocol):
    """What is trained. `num_frames` is how many latent frames the losses of a sample can belong to."""

    num_frames: int

    def build_model(self) -> nn.Module: ...

    def batch(self, step: int, shape: StepShape, positions: range, *, dropout: bool = True) -> Batch: ...

    def losses(self, model: nn.Module, micro: dict[str, Tensor]) -> tuple[Tensor, Tensor]: ...

    def export(self, state: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> None: ...

    def identity(self) -> dict[str, Any]: ...


def train(settings: TrainingSettings) -> dict[str, Any]:
    """Train from the last checkpoint in the output folder, or from the start, to training.max_steps.

    Returns a summary: steps, loss, seconds, output_dir, checkpoint, export, stopped_by. SIGTERM and SIGINT finish the
    step, save and return with `stopped_by` set. Raises UserError for settings that cannot work, RunError for a loss or
    gradient that is not finite (before the update) and for checkpoints that cannot be read.
    """
    device = pick_device(settings.training.device)
    start_processes(settings, device)
    run = Run(settings, ArdfTask(settings, device), device)
    try:
        return run.train()
    finally:
        run.log.close()


class Run:
    """One training run of one process."""

    def __init__(self, settings: TrainingSettings, task: Task, device: torch.device):
        self.settings, self.task = settings, task
        self.curriculum = Curriculum(settings.data.stages, settings.training.batch_size)
        self.engine = make_engine(task.build_model(), settings, device)
        self._check_sizes()
        decay = settings.training.ema_decay
        self.ema = Ema(self.engine.local_parameters(), decay) if decay else None
        self.checkpoints = settings.output_dir / "checkpoints"
        self.meter = Meter()
        self.step = self._resume()
        self.validation: dict[str, list[tuple[Batch, bool]]] = {}
        self.log = RunLog(
            settings.output_dir,
            first_step=self.step,
            max_steps=settings.training.max_steps,
            enabled=self.engine.rank == 0,
        )
        self.log.write(
            event="start", step=self.step, settings=settings.to_dict(), world=self.engine.world, **_versions()
        )
        if self.step:
            self.log.say(f"resumed from step {self.step} in {self.checkpoints}")

    def train(self) -> dict[str, Any]:
        training, data = self.settings.training, self.settings.data
        started = saved_at = tick = time.monotonic()
        saved = self.step
        batches = prefetched(
            self._batch,
            range(self.step, training.max_steps),
            workers=data.workers,
            depth=max(data.prefetch, data.workers),
        )
        with Interrupt() as interrupt:
            for batch in batches:
                waited = time.monotonic() - tick
                minutes = (time.monotonic() - saved_at) / 60
                due = bool(training.save_every_minutes) and minutes >= training.save_every_minutes
                loss, stop, due = self._train_step(batch, bool(interrupt.name), due)
                self.step += 1
                now = time.monotonic()
                self.meter.add("data_wait", waited)
                self.meter.add("seconds", now - tick)
                tick = now
                self._report(loss)
                if training.eval_every and self.step % training.eval_every == 0:
                    self.log.write(step=self.step, **self.validate())
                if stop or due or (training.save_every_steps and self.step % training.save_every_steps == 0):
                    self.save(export=training.export_every_save)
                    saved, saved_at = self.step, time.monotonic()
                if stop:
                    batches.close()
                    break
            if saved < self.step:
                self.save(export=False)
        finished = self.step >= training.max_steps
        summary = {
            "steps": self.step, "seconds": round(time.monotonic() - started, 1), "output_dir":
            str(self.settings.output_dir), "checkpoint": str(checkpoint.checkpoint_folder(self.checkpoints,
            self.step)), "export": str(self.export()) if finished else None,
            "loss": self.last_loss, "stopped_by": None if finished else interrupt.name,
        }  # fmt: skip
        self.log.write(event="end", step=self.step, **{k: v for k, v in summary.items() if k != "steps"})
        return summary

    last_loss: float | None = None

    def _batch(self, step: int) -> Batch:
        shape = self.curriculum(step)
        local = shape.batch_size // self.engine.world
        return self.task.batch(step, shape, range(self.engine.rank * local, (self.engine.rank + 1) * local))

    def _train_step(self, batch: Batch, stop: bool, due: bool) -> tuple[float, bool, bool]:
        """One optimizer step: (loss of the global batch, whether any process was told to stop, whether to save)."""
        training, engine = self.settings.training, self.engine
        count, tokens, stops, dues = engine.all_sum(
            torch.tensor([batch.supervised, batch.tokens, stop, due and engine.rank == 0], dtype=torch.float64)
        ).tolist()
        sums = torch.zeros(2, self.task.num_frames, dtype=torch.float64)  # loss, positions of each latent frame
        micro_batches = batch.micro_batches(training.micro_batch_size)
        for i, micro in enumerate(micro_batches):
            losses, frames = self._losses(micro)
            sums += _sums_by_frame(losses, frames, self.task.num_frames)
            engine.backward(losses.sum() / count, last=i + 1 == len(micro_batches))
        sums = engine.all_sum(sums)
        loss = float(sums[0].sum() / sums[1].sum())
        lr = learning_rate(
            self.step,
            lr=training.lr,
            min_lr=training.min_lr,
            warmup_steps=training.warmup_steps,
            max_steps=training.max_steps,
            schedule=training.schedule,
            decay_steps=training.decay_steps,
        )
        try:
            if not math.isfinite(loss):
                raise RunError(f"the loss is {loss}")
            norm = engine.step(lr)
        except RunError as error:
            self.log.write(event="not_finite", step=self.step + 1, error=str(error), clips=batch.names)
            raise RunError(
                f"step {self.step + 1}: {error}; the weights were not updated, the clips are named in {self.log.path}; "
                "resume with a lower training.lr or training.clip_grad"
            ) from error
        if self.ema:
            self.ema.update(engine.local_parameters(), self.step + 1)
        for key, value in {"loss": loss, f"loss_{batch.kind}": loss, "grad_norm": norm, "tokens": tokens}.items():
            self.meter.add(key, value)
        for frame, (total, positions) in enumerate(sums.T.tolist()):
            if positions and batch.kind == "video":
                self.meter.add(f"frame/{frame}", total / positions, positions)
        self.lr, self.last_loss = lr, loss
        return loss, stops > 0, dues > 0

    def _losses(self, micro: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        micro = {name: tensor.to(self.engine.device) for name, tensor in micro.items()}
        with self.engine.autocast():
            return self.task.losses(self.engine.model, micro)

    def _report(self, loss: float) -> None:
        self.log.progress(loss, self.lr)
        if self.step % self.settings.training.log_every:
            return
        means = self.meter.means()
        self.meter = Meter()
        frames = [means[f"frame/{k}"] for k in range(self.task.num_frames) if f"frame/{k}" in means]
        seconds, tokens = means.pop("seconds"), means.pop("tokens")
        self.log.write(
            step=self.step,
            lr=self.lr,
            **{k: v for k, v in means.items() if not k.startswith("frame/")},
            frame_loss=frames,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            memory_bytes=memory_bytes(self.engine.device),
            time=time.time(),
        )

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss on the fixed clips with their fixed masks, by kind, with the current and the averaged weights."""
        results = {}
        self.engine.module.eval()
        for kind in self.curriculum.kinds:
            results[f"val_loss_{kind}"] = self._validation_loss(kind)
        if self.ema:
            with self._averaged_weights():
                for kind in self.curriculum.kinds:
                    results[f"val_loss_{kind}_ema"] = self._validation_loss(kind)
        self.engine.module.train()
        return results

    def _validation_loss(self, kind: str) -> float:
        if kind not in self.validation:
            self.validation[kind] = self._validation_batches(kind)
        sums = torch.zeros(2, self.task.num_frames, dtype=torch.float64)
        for batch, counts in self.validation[kind]:
            losses, frames = self._losses(batch.tensors)
            sums += _sums_by_frame(losses, frames, self.task.num_frames) * counts
        sums = self.engine.all_sum(sums)
        return float(sums[0].sum() / sums[1].sum())

    def _validation_batches(self, kind: str) -> list[tuple[Batch, bool]]:
        """This process's share. All have equally many batches, as ZeRO-3 needs; the surplus ones are marked not to count."""
        clips, world, rank = self.settings.data.validation_clips, self.engine.world, self.engine.rank
        size = min(self.settings.training.micro_batch_size or 16, clips)
        starts = list(range(0, clips, size))
        rounds = math.ceil(len(starts) / world)
        mine = [
            (starts[i] if i < len(starts) else 0, i < len(starts)) for i in range(rank * rounds, (rank + 1) * rounds)
        ]
        shape = StepShape(kind, clips)
        return [
            (self.task.batch(VALIDATION_STEP, shape, range(start, min(start + size, clips)), dropout=False), counts)
            for start, counts in mine
        ]

    def save(self, export: bool) -> Path:
        """Write a checkpoint of the current step; with `export` the model folder too."""
        engine, rank = self.engine, self.engine.rank
        if rank == 0:
            checkpoint.begin(self.checkpoints, self.step)
        engine.barrier()
        folder = checkpoint.writing_folder(self.checkpoints, self.step)
        tensors = engine.state() | checkpoint.random_state() | (self.ema.state() if self.ema else {})
        checkpoint.save_tensors(folder, rank, tensors)
        engine.save_files(folder)
        engine.barrier()
        if rank == 0:
            state = {
                "settings": self.settings.to_dict(), "identity": self.task.identity(), "engine": engine.kind, "world":
                engine.world, "meter": self.meter.sums, **_versions(),
            }  # fmt: skip
            checkpoint.finish(self.checkpoints, folder, self.step, state, self.settings.training.keep_last)
        engine.barrier()
        if export:
            self.export()
        return checkpoint.checkpoint_folder(self.checkpoints, self.step)

    def export(self) -> Path:
        """Write <output_dir>/export, with the averaged weights if there are any; replaces the one before when it is whole."""
        target = self.settings.output_dir / "export"
        with self._averaged_weights():
            weights = self.engine.gathered()
        if self.engine.rank == 0:
            writing, old = target.with_name(".writing-export"), target.with_name(".old-export")
            for folder in (writing, old):
                shutil.rmtree(folder, ignore_errors=True)
            writing.mkdir(parents=True)
            self.task.export(weights, writing, EXPORT_DTYPES[self.settings.training.export_dtype])
            facts = {
                "steps": self.step,
                "averaged": self.ema is not None,
                "settings": self.settings.to_dict(),
                **_versions(),
            }
            (writing / "training.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
            if target.exists():
                target.rename(old)
            writing.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        self.engine.barrier()
        return target

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Inside, the model has the averaged weights, if there are any."""
        if not self.ema:
            yield
            return
        self.ema.swap(self.engine.local_parameters())
        self.engine.parameters_changed()
        try:
            yield
        finally:
            self.ema.swap(self.engine.local_parameters())
            self.engine.parameters_changed()

    def _resume(self) -> int:
        """Load the newest good checkpoint of the output folder; returns the number of steps done."""
        found = checkpoint.latest(self.checkpoints)
        if found is None:
            return 0
        folder, state = found
        checkpoint.check_fits(
            folder,
            state,
            identity=self.task.identity(),
            engine=self.engine.kind,
            world=self.engine.world,
            max_steps=self.settings.training.max_steps,
        )
        tensors = checkpoint.load_tensors(folder, self.engine.rank)
        self.engine.load_state(tensors)
        self.engine.load_files(folder)
        if self.ema and any(name.startswith("ema.") for name in tensors):
            self.ema.load_state(tensors)
        checkpoint.set_random_state(tensors)
        self.meter = Meter(state["meter"])
        return state["step"]

    def _check_sizes(self) -> None:
        for size in sorted(self.curriculum.batch_sizes):
            if size % self.engine.world:
                raise UserError(
                    f"batch_size {size} cannot be shared by {self.engine.world} processes; take a multiple of {self.engine.world}"
                )


def _sums_by_frame(losses: Tensor, frames: Tensor, num_frames: int) -> Tensor:
    """float64 [2, t] on the CPU: sum of losses and number of positions of each latent frame."""
    sums = torch.zeros(2, num_frames, dtype=torch.float64)
    frames = frames.cpu()
    sums[0].index_add_(0, frames, losses.detach().double().cpu())
    sums[1] = torch.bincount(frames, minlength=num_frames)
    return sums


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__}
