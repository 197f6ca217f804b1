"""The training loop: optimizer steps, and between them log lines, validation, samples and checkpoints."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lumos.data.prefetch import in_processes, prefetched
from lumos.durable import put_back, sweep_folder
from lumos.errors import RunError
from lumos.files import check_writable, only_writer
from lumos.runtime import is_first_process, peak_memory_bytes, pick_device, return_freed_memory
from lumos.training import checkpoint
from lumos.training.auxiliary import without_gradient
from lumos.training.ema import Ema
from lumos.training.engine import lost_process_reported
from lumos.training.export import task_class
from lumos.training.launch import start_processes
from lumos.training.logging import Meter
from lumos.training.loss_sums import LossSums, of_all_processes
from lumos.training.run_state import RunState
from lumos.training.samples import render
from lumos.training.schedule import learning_rate
from lumos.training.settings import TrainingSettings
from lumos.training.signals import Interrupt
from lumos.training.task import Batch, TrainingTask
from lumos.training.trackers import check_installed

MakeTask = Callable[[Any, torch.device], TrainingTask]
"""A function that takes the settings of a run and a device, and returns a task."""


def train(settings: TrainingSettings, make_task: MakeTask | None = None) -> dict[str, Any]:
    """Train from the last checkpoint in the output folder, or from the start, to training.max_steps.

    `make_task` makes, by default, the task of the generator that the settings name. Returns a summary: steps, loss, seconds,
    output_dir, checkpoint, export, stopped_by, and the measurements of the export. SIGTERM and SIGINT finish the
    step, save and return with `stopped_by` set. Raises UserError for settings that cannot work, RunError for a loss or
    gradient that is not finite (before the update), for checkpoints that cannot be read or written, and if another process
    of the run is gone.
    """
    check_writable(settings.output_dir / "log.jsonl")
    check_installed(settings.logging.to)
    device = pick_device(settings.training.device)
    if settings.training.activation_checkpointing:
        return_freed_memory(device)
    with lost_process_reported():
        start_processes(settings, device)
        task = (make_task or task_class(settings.to_dict()))(settings, device)
        with _own(settings.output_dir) if is_first_process() else nullcontext():
            return run_task(settings, task, device)


@contextmanager
def _own(folder: Path) -> Iterator[None]:
    """Keep other trainings out of a run's folder, and remove what killed ones left half written."""
    with only_writer(folder, "training"):
        for place in (folder, folder / "samples"):
            sweep_folder(place)
        checkpoint.remove_left_overs(folder / "checkpoints")
        put_back(folder / "export")
        yield


def run_task(settings: TrainingSettings, task: TrainingTask, device: torch.device) -> dict[str, Any]:
    """Train `task` as `train` does, and return the summary."""
    run = Run(settings, task, device)
    try:
        return run.train()
    finally:
        run.log.close()


def expected_steps(step: int, time_share: float, max_steps: int) -> int:
    """Return the number of steps at the end of a run that has done `step` of them in a share of its time (0: no limit of time)."""
    return min(max_steps, math.ceil(step / time_share)) if time_share else max_steps


class Run(RunState):
    """The part of a training run that one process does."""

    def train(self) -> dict[str, Any]:
        """Do the remaining steps and return the summary."""
        started = time.monotonic()
        with Interrupt() as interrupt:
            begun = self._begin(lambda: bool(interrupt.name))
            if begun:
                self._do_steps(interrupt)
        finished = begun and (self.step >= self.settings.training.max_steps or self.time_share >= 1)
        summary = {
            "steps": self.step,
            "loss": self.loss,
            "seconds": round(time.monotonic() - started, 1),
            "output_dir": str(self.settings.output_dir),
            "checkpoint": str(checkpoint.checkpoint_folder(self.checkpoints, self.step)) if begun else None,
            "export": str(self.settings.output_dir / self.task.export_folder) if finished else None,
            "stopped_by": None if finished else interrupt.name,
        }
        if finished:
            summary |= self.export()
        self.log.write(event="end", step=self.step, **{k: v for k, v in summary.items() if k != "steps"})
        if finished:
            self.log.say(f"{self.step} steps done; the model is in {summary['export']}")
        elif begun:
            self.log.say(f"stopped after step {self.step}; the same command continues from {summary['checkpoint']}")
        else:
            self.log.say("stopped before the first step, nothing is kept; the same command begins again")
        return summary

    def _begin(self, stop: Callable[[], bool]) -> bool:
        """Set a new run to the first weights of its task, and save them. Return False if a process was told to stop meanwhile."""
        if self.resumed:
            return True
        started = time.monotonic()
        weights = self.task.first_weights(stop)
        if weights == {}:
            return True
        if self.engine.any_of(weights is None):
            return False
        self.engine.put(weights)
        if self.ema:
            self.ema = Ema(self.engine.weights(), self.ema.decay)
        self.first_seconds = time.monotonic() - started
        self.save(export=False)
        return True

    def _do_steps(self, interrupt: Interrupt) -> None:
        """Do the remaining steps with validation, samples and checkpoints between them, and a checkpoint at the end."""
        training, samples = self.settings.training, self.settings.samples
        saved_at = tick = time.monotonic()
        begun = tick - self.seconds
        saved = self.step
        with closing(self._batches(range(self.step, training.max_steps))) as batches:
            for batch in batches:
                if self._is_over():
                    break
                waited = time.monotonic() - tick
                minutes = (time.monotonic() - saved_at) / 60
                due = 0 < training.save_every_minutes <= minutes
                stop, due = self._train_step(batch, bool(interrupt.name), due)
                self.meter.add("data_wait", waited)
                self.meter.add("seconds", time.monotonic() - tick)
                self.seconds = time.monotonic() - begun
                self._report()
                measured_later = self.task.measures and self.step == training.max_steps  # by the export
                if training.eval_every and self.step % training.eval_every == 0 and not measured_later:
                    self.log.write(step=self.step, **self.validate())
                if samples.every and self.step % samples.every == 0:
                    self.sample(stop=lambda: bool(interrupt.name))
                if stop or due or (training.save_every_steps and self.step % training.save_every_steps == 0):
                    self.save(export=training.export_every_save and not stop)
                    saved, saved_at = self.step, time.monotonic()
                if stop or self.fault:
                    break
                tick = time.monotonic()
            if saved < self.step:
                self.save(export=False)
        if self.fault:
            self.log.write(event="fault", step=self.step, error=self.fault)
            raise RunError(f"step {self.step}: {self.fault}; the checkpoint of this step is kept in {self.checkpoints}")

    def _is_over(self) -> bool:
        """Return whether training.max_minutes has passed, by the clock of the first process, which all processes follow."""
        minutes = self.settings.training.max_minutes
        if minutes is None:
            return False
        share = self.seconds / (60 * minutes) if self.engine.rank == 0 else 0.0
        self.time_share = float(self.engine.all_sum(torch.tensor(share, dtype=torch.float64)))
        return self.time_share >= 1

    def _batches(self, steps: range) -> Generator[Batch, None, None]:
        """Yield the batches of the steps, which threads make in advance.

        With data.processes, processes prepare the clips, and one thread encodes them.
        """
        data = self.settings.data
        depth = max(data.prefetch, data.workers)
        if not data.processes:
            yield from prefetched(lambda step: self.task.encode(self._prepare(step)), steps, workers=data.workers, depth=depth)
            return
        with closing(in_processes(self._prepare, steps, processes=data.processes)) as drafts:
            yield from prefetched(lambda _: self.task.encode(next(drafts)), steps, workers=data.workers, depth=depth)

    def _prepare(self, step: int) -> Any:
        shape = self.curriculum(step)
        return self.task.prepare(step, shape, range(self.engine.rank, self.task.source.clips_in(shape), self.engine.world))

    def _train_step(self, batch: Batch, stop: bool, due: bool) -> tuple[bool, bool]:
        """Do one optimizer step. Return whether any process was told to stop, and whether a checkpoint is due.

        The first process decides whether a checkpoint is due.
        """
        engine = self.engine
        count, tokens, flops, stops, dues = engine.all_sum(
            torch.tensor([batch.supervised, batch.tokens, batch.flops, stop, due and engine.rank == 0], dtype=torch.float64)
        ).tolist()
        sums = LossSums(self.task.loss_groups)
        clips = self.task.source.clips_in(self.curriculum(batch.step))
        parts = batch.micro_batches(self.settings.training.micro_batch_size, math.ceil(clips / engine.world))
        micro_batches = [self._on_device(micro) for micro in parts]
        with without_gradient(self.auxiliary.engine.module) if self.auxiliary else nullcontext():
            for i, micro in enumerate(micro_batches):
                losses, places = self._losses(micro)
                sums.add(losses, places)
                total = losses.sum() / count
                # A loss that is not finite in one process makes the gradient not finite in all of them, even if its own
                # gradient would be finite.
                engine.backward(total if sums.table.isfinite().all() else total * math.nan, last=i + 1 == len(micro_batches))
        sums = sums.over_processes(engine)
        self.loss = sums.mean
        lr = self._learning_rate(self.settings)
        norm = engine.step(lr)
        self.step += 1
        if not math.isfinite(norm):
            self.task.step_values()  # starts the sums again, without the values of this step
            self._not_finite(self.loss, norm)
            return stops > 0, dues > 0
        if self.ema:
            self.ema.update(engine.weights(), self.step)
        if self.auxiliary:
            self._auxiliary_step(micro_batches, clips)
        self.meter.add("loss", *sums.table[:, 0].tolist())
        self.meter.add_parts(sums.parts(batch.kind))
        for name, value in {"grad_norm": norm, "lr": lr, "tokens": tokens, "flops": flops}.items():
            self.meter.add(name, value)
        self._add_values(self.task.step_values())
        self.log.progress(self.loss, lr, expected_steps(self.step, self.time_share, self.settings.training.max_steps))
        return stops > 0, dues > 0

    def _add_values(self, values: dict[str, tuple[float, float]]) -> None:
        """Add further values of the step, over all processes, to the log, and ask the task whether their means are a fault."""
        if values:
            table = self.engine.all_sum(torch.tensor(list(values.values()), dtype=torch.float64)).tolist()
            for name, (total, weight) in zip(values, table, strict=True):
                self.meter.add(name, total, weight)
            self.fault = self.task.fault_after({n: t / w for n, (t, w) in zip(values, table, strict=True) if w})

    def _auxiliary_step(self, micro_batches: list[dict[str, Any]], clips: int) -> None:
        """Train the auxiliary network on the micro-batches of the model. `self.step` already counts this step."""
        lr = self._learning_rate(self.auxiliary.settings, self.step - 1)
        sums, norm = self.auxiliary.step(self.engine, micro_batches, clips, lr)
        if not math.isfinite(norm):
            self._not_finite(sums.mean, norm, " of the auxiliary network")
            return
        self.meter.add("auxiliary_loss", *sums.table[:, 0].tolist())
        self.meter.add("auxiliary_grad_norm", norm)
        self.meter.add("auxiliary_lr", lr)

    def _on_device(self, micro: dict[str, Any]) -> dict[str, Any]:
        return {name: x.to(self.engine.device) if isinstance(x, Tensor) else x for name, x in micro.items()}

    def _losses(self, micro: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        with self.engine.autocast():
            return self.task.losses(self.engine.model, micro)

    def _learning_rate(self, settings: TrainingSettings, step: int | None = None) -> float:
        training, step = settings.training, self.step if step is None else step
        return learning_rate(
            max(step, int(self.time_share * training.max_steps)),
            lr=training.lr,
            min_lr=training.min_lr,
            warmup_steps=training.warmup_steps,
            max_steps=training.max_steps,
            schedule=training.schedule,
            decay_steps=training.decay_steps,
        )

    def _not_finite(self, loss: float, norm: float, of: str = "") -> None:
        """Write the clips of a step without an update into the log; `of` names the network that was not updated.

        Raises RunError if more steps had no update than training.skip_not_finite allows.
        """
        self.skipped += 1
        allowed, key = self.settings.training.skip_not_finite, self.settings.key
        what = f"the gradient norm{of} is {norm}" if math.isfinite(loss) else f"the loss{of} is {loss}"
        clips = None
        if self.log.enabled:
            shape = self.curriculum(self.step - 1)
            clips = self.task.batch(self.step - 1, shape, range(self.task.source.clips_in(shape))).names
        self.log.write(event="not_finite", step=self.step, error=what, clips=clips, skipped=self.skipped)
        if self.skipped > allowed:
            limit = f", as in {allowed} steps before ({key('training.skip_not_finite')})" if allowed else ""
            raise RunError(
                f"step {self.step}: {what}; the weights{of} were not updated{limit}; the clips are named in {self.log.path}; "
                f"resume with a lower {key('training.lr')} or {key('training.clip_grad')}, or let "
                f"{key('training.skip_not_finite')} leave such updates out"
            )
        left_out = f"update left out, {self.skipped} of {allowed} allowed; clips in {self.log.path}"
        self.log.say(f"step {self.step}: {what}; {left_out}", logging.WARNING)

    def _report(self) -> None:
        if self.step % self.settings.training.log_every:
            return
        means = self.meter.means()
        self.meter = Meter()
        if "tokens" not in means:  # no weight was updated since the last line
            return
        waits, memory = of_all_processes(self.engine, means.pop("data_wait"), peak_memory_bytes(self.engine.device))
        rates = {
            "tokens_per_second": means.pop("tokens") / means["seconds"],
            "mfu": means["flops"] / means["seconds"] / self.peak_flops,
            "data_wait": max(waits),
            "memory_bytes": int(max(memory)),
        }
        self.log.write(step=self.step, **means, **rates, time=time.time())

    def sample(self, stop: Callable[[], bool]) -> None:
        """Generate the sample clips on the first process, with the averaged weights if there are any. Other processes wait."""
        weights = self.engine.whole(self.ema.average if self.ema else self.engine.weights())

        def draw() -> None:
            render(
                self.settings.samples,
                lambda: self.task.preview(weights),
                self.settings.output_dir / "samples" / f"step-{self.step:08d}",
                step=self.step,
                log=self.log,
                stop=stop,
                facts={"averaged": self.ema is not None},
            )

        self._together(lambda: draw() if self.engine.rank == 0 else None)

    def validate(self) -> dict[str, Any]:
        """Return the measurements of the task or, for a task without any, the validation losses by kind.

        Losses are those of the current weights and, under names that end in `_ema`, of the averaged weights.
        """
        if self.task.measures:
            with self._averaged_weights():
                measured = self.task.measure(self.engine.module)
            return self._shown(measured)
        results = self.validation.losses(self.engine, lambda micro: self._losses(self._on_device(micro)))
        if self.ema:
            with self._averaged_weights():
                averaged = self.validation.losses(self.engine, lambda micro: self._losses(self._on_device(micro)))
            results |= {f"{name}_ema": value for name, value in averaged.items()}
        return results
