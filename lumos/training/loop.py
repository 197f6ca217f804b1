"""The training loop: batches in, optimizer steps, checkpoints, logs and an exported model folder out."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from lumos.data.curriculum import Curriculum, check_shares
from lumos.data.prefetch import in_processes, prefetched
from lumos.data.seeding import sample_generator
from lumos.device_peak import peak_flops
from lumos.durable import put_back, sweep_folder
from lumos.errors import RunError, UserError
from lumos.files import check_writable, only_writer
from lumos.runtime import peak_memory_bytes, pick_device, return_freed_memory, versions
from lumos.settings import differences
from lumos.training import checkpoint
from lumos.training.ema import Ema
from lumos.training.engine import lost_process_reported, pick_precision
from lumos.training.export import task_class
from lumos.training.launch import make_engine, start_processes
from lumos.training.logging import Meter, RunLog
from lumos.training.loss_sums import LossSums, of_all_processes
from lumos.training.samples import render
from lumos.training.schedule import learning_rate
from lumos.training.settings import TrainingSettings
from lumos.training.signals import Interrupt
from lumos.training.task import Batch, TrainingTask
from lumos.training.trackers import check_installed, open_writers
from lumos.training.validation import Validation


def train(settings: TrainingSettings) -> dict[str, Any]:
    """Train from the last checkpoint in the output folder, or from the start, to training.max_steps.

    Returns a summary: steps, loss, seconds, output_dir, checkpoint, export, stopped_by. SIGTERM and SIGINT finish the
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
        task = task_class(settings.to_dict())(settings, device)
        with _own(settings.output_dir) if os.environ.get("RANK", "0") == "0" else nullcontext():
            return run_task(settings, task, device)


@contextmanager
def _own(folder: Path) -> Iterator[None]:
    """Keep other trainings out of a run's folder, and remove what killed ones left half written."""
    with only_writer(folder, "training"):
        for place in (folder, folder / "samples"):
            sweep_folder(place)
        put_back(folder / "export")
        yield


def run_task(settings: TrainingSettings, task: TrainingTask, device: torch.device) -> dict[str, Any]:
    """`train` for any task."""
    run = Run(settings, task, device)
    try:
        return run.train()
    finally:
        run.log.close()


class Run:
    """One process's part of a training run. `step` counts the optimizer steps done."""

    def __init__(self, settings: TrainingSettings, task: TrainingTask, device: torch.device):
        training = settings.training
        self.settings, self.task = settings, task
        self.curriculum = Curriculum(settings.data.stages, training.batch_size, training.tokens_per_batch)
        self.engine = make_engine(task.build_model(), settings, device)
        check_shares(self.curriculum, task.source.most_codes, self.engine.world)
        self.ema = Ema(self.engine.weights(), training.ema_decay) if training.ema_decay else None
        self.validation = Validation(task, self.curriculum.kinds, settings)
        self.checkpoints = settings.output_dir / "checkpoints"
        self.meter = Meter()
        self.loss = math.nan
        self.skipped = 0
        self.changed: list[str] = []
        self.step = self._resume()
        first = self.engine.rank == 0
        writers = open_writers(settings, self.step) if first else ()
        self.log = RunLog(
            settings.output_dir, first_step=self.step, max_steps=training.max_steps, enabled=first, writers=writers
        )
        self._together(lambda: None)  # a device is measured while all are, as they share what they run on
        peak, known = peak_flops(device, pick_precision(training.precision, device), settings.logging.peak_tflops)
        self.peak_flops = float(self.engine.all_sum(torch.tensor(peak, dtype=torch.float64)))
        facts = {"world": self.engine.world, "peak_flops": self.peak_flops, "peak_flops_from": known}
        self.log.write(event="start", step=self.step, settings=settings.to_dict(), **facts, **versions())
        self.log.say(f"checkpoints, log and export go to {settings.output_dir}")
        if self.step:
            self.log.say(f"resumed from step {self.step} in {self.checkpoints}")
        for change in self.changed:
            self.log.say(f"changed since that checkpoint: {change}")

    def train(self) -> dict[str, Any]:
        """Do the steps that are left; returns the summary."""
        training, samples = self.settings.training, self.settings.samples
        started = saved_at = tick = time.monotonic()
        saved = self.step
        with Interrupt() as interrupt, closing(self._batches(range(self.step, training.max_steps))) as batches:
            for batch in batches:
                waited = time.monotonic() - tick
                minutes = (time.monotonic() - saved_at) / 60
                due = 0 < training.save_every_minutes <= minutes
                stop, due = self._train_step(batch, bool(interrupt.name), due)
                self.meter.add("data_wait", waited)
                self.meter.add("seconds", time.monotonic() - tick)
                self._report()
                if training.eval_every and self.step % training.eval_every == 0:
                    self.log.write(step=self.step, **self.validate())
                if samples.every and self.step % samples.every == 0:
                    self.sample(stop=lambda: bool(interrupt.name))
                if stop or due or (training.save_every_steps and self.step % training.save_every_steps == 0):
                    self.save(export=training.export_every_save and not stop)
                    saved, saved_at = self.step, time.monotonic()
                if stop:
                    break
                tick = time.monotonic()
            if saved < self.step:
                self.save(export=False)
        finished = self.step >= training.max_steps
        summary = {
            "steps": self.step,
            "loss": self.loss,
            "seconds": round(time.monotonic() - started, 1),
            "output_dir": str(self.settings.output_dir),
            "checkpoint": str(checkpoint.checkpoint_folder(self.checkpoints, self.step)),
            "export": str(self.export()) if finished else None,
            "stopped_by": None if finished else interrupt.name,
        }
        self.log.write(event="end", step=self.step, **{k: v for k, v in summary.items() if k != "steps"})
        if finished:
            self.log.say(f"{self.step} steps done; the model is in {summary['export']}")
        else:
            self.log.say(f"stopped after step {self.step}; the same command continues from {summary['checkpoint']}")
        return summary

    def _batches(self, steps: range) -> Generator[Batch, None, None]:
        """The steps' batches, made ahead by threads; with data.processes, drawn by these, and one thread encodes them."""
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
        """One optimizer step: whether any process was told to stop, and whether the first one wants to save."""
        engine = self.engine
        count, tokens, flops, stops, dues = engine.all_sum(
            torch.tensor([batch.supervised, batch.tokens, batch.flops, stop, due and engine.rank == 0], dtype=torch.float64)
        ).tolist()
        sums = LossSums(self.task.loss_groups)
        share = math.ceil(self.task.source.clips_in(self.curriculum(batch.step)) / engine.world)
        micro_batches = batch.micro_batches(self.settings.training.micro_batch_size, share)
        for i, micro in enumerate(micro_batches):
            losses, places = self._losses(micro)
            sums.add(losses, places)
            total = losses.sum() / count
            # The gradient tells all processes of a loss that is not finite in one of them, even where its own would be.
            engine.backward(total if sums.table.isfinite().all() else total * math.nan, last=i + 1 == len(micro_batches))
        sums = sums.over_processes(engine)
        self.loss = sums.mean
        lr = self._learning_rate()
        norm = engine.step(lr)
        self.step += 1
        if not math.isfinite(norm):
            self._not_finite(norm)
            return stops > 0, dues > 0
        if self.ema:
            self.ema.update(engine.weights(), self.step)
        self.meter.add("loss", *sums.table[:, 0].tolist())
        self.meter.add_parts(sums.parts(batch.kind))
        for name, value in {"grad_norm": norm, "lr": lr, "tokens": tokens, "flops": flops}.items():
            self.meter.add(name, value)
        self.log.progress(self.loss, lr)
        return stops > 0, dues > 0

    def _losses(self, micro: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        micro = {name: x.to(self.engine.device) if isinstance(x, Tensor) else x for name, x in micro.items()}
        with self.engine.autocast():
            return self.task.losses(self.engine.model, micro)

    def _learning_rate(self) -> float:
        training = self.settings.training
        return learning_rate(
            self.step,
            lr=training.lr,
            min_lr=training.min_lr,
            warmup_steps=training.warmup_steps,
            max_steps=training.max_steps,
            schedule=training.schedule,
            decay_steps=training.decay_steps,
        )

    def _not_finite(self, norm: float) -> None:
        """Step number `step` made no update: put its clips into the log; RunError if too many did so."""
        self.skipped += 1
        allowed = self.settings.training.skip_not_finite
        what = f"the gradient norm is {norm}" if math.isfinite(self.loss) else f"the loss is {self.loss}"
        clips = None
        if self.log.enabled:
            shape = self.curriculum(self.step - 1)
            clips = self.task.batch(self.step - 1, shape, range(self.task.source.clips_in(shape))).names
        self.log.write(event="not_finite", step=self.step, error=what, clips=clips, skipped=self.skipped)
        if self.skipped > allowed:
            limit = f", as in {allowed} steps before (training.skip_not_finite)" if allowed else ""
            raise RunError(
                f"step {self.step}: {what}; the weights were not updated{limit}; the clips are named in {self.log.path}; "
                "resume with a lower training.lr or training.clip_grad, or let training.skip_not_finite leave such updates out"
            )
        self.log.say(f"step {self.step}: {what}; update left out, {self.skipped} of {allowed} allowed; clips in {self.log.path}")

    def _report(self) -> None:
        if self.step % self.settings.training.log_every:
            return
        means = self.meter.means()
        self.meter = Meter()
        if "tokens" not in means:  # no step since the last line made an update
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
        """Render the sample clips on the first process, with the averaged weights if there are any; the others wait."""
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
        """Validation losses by kind, with the current weights and, as `..._ema`, with the averaged ones."""
        results = self.validation.losses(self.engine, self._losses)
        if self.ema:
            with self._averaged_weights():
                averaged = self.validation.losses(self.engine, self._losses)
            results |= {f"{name}_ema": value for name, value in averaged.items()}
        return results

    def save(self, export: bool) -> Path:
        """Write a checkpoint of the current step; with `export` the model folder too."""
        engine, training, root = self.engine, self.settings.training, self.checkpoints
        first, folder = engine.rank == 0, checkpoint.writing_folder(root, self.step)
        averages = engine.labelled(checkpoint.AVERAGE, self.ema.average) if self.ema else {}
        tensors = engine.state() | checkpoint.random_state() | averages
        state = {
            "settings": self.settings.to_dict(),
            "identity": self.task.resume_fingerprint(),
            "task": self.task.export_metadata(),
            "engine": engine.kind,
            "world": engine.world,
            "updates": engine.updates,
            "skipped": self.skipped,
            "averaged": self.ema is not None,
            "meter": self.meter.sums,
            **versions(),
        }
        kept = {"keep_last": training.keep_last, "keep_every": training.keep_every, "fields": checkpoint.RUN_FIELDS}
        written = torch.zeros(engine.world, 2, dtype=torch.float64)  # size and checksum of each process's file

        def write() -> None:
            written[engine.rank] = torch.tensor(checkpoint.save_tensors(folder, engine.rank, tensors), dtype=torch.float64)

        def finish() -> None:
            self.log.sync()
            checkpoint.finish(root, folder, self.step, state, [tuple(map(int, file)) for file in files.tolist()], **kept)

        try:
            self._together(lambda: checkpoint.begin(root, self.step) if first else None)
            self._together(write)
            files = engine.all_sum(written)
            self._together(lambda: finish() if first else None)
        except RunError as error:
            if first:
                checkpoint.give_up(root, self.step)
            raise RunError(f"the checkpoint of step {self.step} cannot be written: {error}; older ones are kept") from error
        if export:
            self.export()
        return checkpoint.checkpoint_folder(root, self.step)

    def export(self) -> Path:
        """Write <output_dir>/export from the checkpoint of this step, and put it in place when it is whole."""
        target, folder = self.settings.output_dir / "export", checkpoint.checkpoint_folder(self.checkpoints, self.step)
        self._together(lambda: self.task.export(folder, target) if self.engine.rank == 0 else None)
        return target

    def _together(self, action: Callable[[], Any]) -> None:
        """Do it; RunError in all processes if it fails in one, so that the others do not wait for that one."""
        failure = None
        try:
            action()
        except (OSError, SafetensorError, UserError, RunError) as error:
            failure = error
        if self.engine.any_of(failure is not None):
            raise RunError(str(failure or "another process failed, see its own message")) from failure

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Inside, the model has the averaged weights, if there are any."""
        if not self.ema:
            yield
            return
        self.ema.swap(self.engine.weights())
        self.engine.weights_changed()
        try:
            yield
        finally:
            self.ema.swap(self.engine.weights())
            self.engine.weights_changed()

    def _resume(self) -> int:
        """Load the newest good checkpoint of the output folder; returns the number of steps done."""
        engine = self.engine
        found = checkpoint.latest(self.checkpoints, engine.rank, engine.world, engine.any_of, checkpoint.RUN_FIELDS)
        step = found[1]["step"] if found else 0
        if float(engine.all_sum(torch.tensor([step], dtype=torch.float64))) != step * engine.world:
            raise RunError(f"processes see different checkpoints in {self.checkpoints}; it must be a folder that all of them share")
        # For dropout, where a run or a process begins; a checkpoint's own state goes before it.
        torch.manual_seed(sample_generator(self.settings.training.seed, step, engine.rank, "process").initial_seed())
        if found is None:
            return 0
        folder, state = found
        checkpoint.check_fits(folder, state, identity=self.task.resume_fingerprint(), max_steps=self.settings.training.max_steps)
        self.changed = differences(state["settings"], self.settings.to_dict())
        written, now = (f"{kind}, {world} process{'es' * (world > 1)}" for kind, world in
                        ((state["engine"], state["world"]), (engine.kind, engine.world)))  # fmt: skip
        if written != now:
            self.changed.append(
                f"written by {written}, this is {now}: weights, optimizer state and averages were divided anew; losses agree "
                "with those of an uninterrupted run up to rounding, not bit by bit"
            )
        stored = checkpoint.Stored(folder)
        engine.load(stored, state["updates"])
        if self.ema:
            self.ema = Ema(engine.weights(), self.ema.decay)
            if state["averaged"]:
                engine.fill(stored, checkpoint.AVERAGE, self.ema.average)
        checkpoint.set_random_state(stored.own(engine.rank))
        self.meter, self.skipped = Meter(state["meter"]), state["skipped"]
        return step
