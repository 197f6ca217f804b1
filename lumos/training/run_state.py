"""The state of a training run: its networks, its log, its checkpoints, and the model folder that it exports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lumos.data.curriculum import Curriculum, check_shares
from lumos.data.seeding import sample_generator
from lumos.device_peak import peak_flops
from lumos.errors import RunError, UserError
from lumos.runtime import versions
from lumos.settings import differences
from lumos.training import checkpoint
from lumos.training.auxiliary import Auxiliary
from lumos.training.ema import Ema
from lumos.training.engine import pick_precision
from lumos.training.launch import make_engine
from lumos.training.logging import Meter, RunLog
from lumos.training.samples import random_states_kept
from lumos.training.settings import TrainingSettings
from lumos.training.task import Measured, TrainingTask
from lumos.training.trackers import open_writers
from lumos.training.validation import Validation
from lumos.video.io import write_video


class RunState:
    """The part of a training run that one process holds. `step` is the number of optimizer steps that are done."""

    def __init__(self, settings: TrainingSettings, task: TrainingTask, device: torch.device):
        training = settings.training
        self.settings, self.task = settings, task
        self.curriculum = Curriculum(settings.data.stages, training.batch_size, training.tokens_per_batch)
        model = task.build_model()
        self.engine = make_engine(model, settings, device, task.muon_matrices(model))
        second = task.build_auxiliary()
        self.auxiliary = None if second is None else Auxiliary(second, task, settings, device)
        check_shares(self.curriculum, task.source.most_codes, self.engine.world)
        self.ema = Ema(self.engine.weights(), training.ema_decay) if training.ema_decay else None
        self.validation = Validation(task, self.curriculum.kinds, settings)
        self.checkpoints = settings.output_dir / "checkpoints"
        self.meter = Meter()
        self.loss = math.nan
        self.skipped = 0
        self.changed: list[str] = []
        self.fault: str | None = None
        self.seconds = self.first_seconds = 0.0  # seconds of all steps, and of `TrainingTask.first_weights`
        self.time_share = 0.0  # share of training.max_minutes that has passed
        self.resumed = False
        self.step = self._resume()
        first = self.engine.rank == 0
        writers = open_writers(settings, self.step) if first else ()
        self.log = RunLog(
            settings.output_dir, first_step=self.step, max_steps=training.max_steps, enabled=first, writers=writers
        )
        self._together(lambda: None)  # Processes of one machine share its cores, so all of them measure at the same time.
        peak, known = peak_flops(device, pick_precision(training.precision, device), settings.logging.peak_tflops)
        self.peak_flops = float(self.engine.all_sum(torch.tensor(peak, dtype=torch.float64)))
        facts = {"world": self.engine.world, "threads": torch.get_num_threads()}
        facts |= {"peak_flops": self.peak_flops, "peak_flops_from": known}
        self.log.write(event="start", step=self.step, settings=settings.to_dict(), **facts, **versions())
        self.log.say(f"checkpoints, log and export go to {settings.output_dir}")
        if self.resumed:
            self.log.say(f"resumed from step {self.step} in {self.checkpoints}")
        for change in self.changed:
            self.log.say(f"changed since that checkpoint: {change}")

    def save(self, export: bool) -> Path:
        """Write a checkpoint of the current step, and return its folder. With `export`, also write the model folder."""
        engine, training, root = self.engine, self.settings.training, self.checkpoints
        first, folder = engine.rank == 0, checkpoint.writing_folder(root, self.step)
        averages = engine.labelled(checkpoint.AVERAGE, self.ema.average) if self.ema else {}
        second = {"auxiliary_updates": self.auxiliary.engine.updates} if self.auxiliary else {}
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
            "task_state": self.task.state(),
            "seconds": self.seconds,
            "first_seconds": self.first_seconds,
            **second,
            **versions(),
        }
        tensors = engine.state() | averages | (self.auxiliary.engine.state() if self.auxiliary else {})
        tensors |= checkpoint.random_state()
        kept = {"keep_last": training.keep_last, "keep_every": training.keep_every, "fields": checkpoint.RUN_FIELDS}
        written = torch.zeros(engine.world, 2, dtype=torch.float64)  # the size and checksum of the file of each process

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

    def export(self) -> dict[str, Any]:
        """Write the model folder from the checkpoint of this step, completely or not at all, and return measurements of it."""
        target = self.settings.output_dir / self.task.export_folder
        folder, values = checkpoint.checkpoint_folder(self.checkpoints, self.step), {}

        def write() -> None:
            with random_states_kept():
                measured = self.task.export(folder, target)
            if measured is not None:
                values.update(self._shown(measured))
                self.log.write(step=self.step, **values)

        self._together(write if self.engine.rank == 0 else lambda: None)
        return values

    def _resume(self) -> int:
        """Load the newest undamaged checkpoint of the output folder, if there is one, and return its step, else 0."""
        engine = self.engine
        found = checkpoint.latest(self.checkpoints, engine.rank, engine.world, engine.any_of, checkpoint.RUN_FIELDS)
        step = found[1]["step"] if found else 0
        if float(engine.all_sum(torch.tensor([step], dtype=torch.float64))) != step * engine.world:
            raise RunError(f"processes see different checkpoints in {self.checkpoints}; it must be a folder that all of them share")
        # The random state for dropout in a new run or process. The state of this process in a checkpoint replaces it below.
        torch.manual_seed(sample_generator(self.settings.training.seed, step, engine.rank, "process").initial_seed())
        if found is None:
            return 0
        folder, state = found
        self.resumed = True
        checkpoint.check_fits(
            folder, state, identity=self.task.resume_fingerprint(), max_steps=self.settings.training.max_steps,
            defaults=self.task.fingerprint_defaults(), key=self.settings.key,
        )  # fmt: skip
        if (self.auxiliary is None) == ("auxiliary_updates" in state):
            having = "without" if self.auxiliary else "with"
            raise UserError(f"{folder} is of another run, {having} an auxiliary network; name another training.output_dir")
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
        if self.auxiliary:
            self.auxiliary.engine.load(stored, state["auxiliary_updates"])
        if self.ema:
            self.ema = Ema(engine.weights(), self.ema.decay)
            if state["averaged"]:
                engine.fill(stored, checkpoint.AVERAGE, self.ema.average)
        checkpoint.set_random_state(stored.own(engine.rank))
        self.meter, self.skipped = Meter(state["meter"]), state["skipped"]
        self.task.load_state(state.get("task_state", {}))
        self.seconds, self.first_seconds = state.get("seconds", 0.0), state.get("first_seconds", 0.0)
        return step

    def _shown(self, measured: Measured) -> dict[str, float]:
        """Log the numbers, write the pictures to <output_dir>/samples/<name>-<step>.png, and return the numbers."""
        if self.log.enabled:
            self.log.say(f"step {self.step}: " + ", ".join(f"{name} {value:.3f}" for name, value in measured.values.items()))
            for name, frames in measured.pictures.items():
                path = self.settings.output_dir / "samples" / f"{name}-{self.step:06d}.png"
                write_video(path, frames, fps=1)
                self.log.clip(self.step, f"samples/{name}", path, frames, 1)
        return measured.values

    def _together(self, action: Callable[[], Any]) -> None:
        """Run `action`. If it fails in one process, raise RunError in all of them, so that no process waits for that one."""
        failure = None
        try:
            action()
        except (OSError, SafetensorError, UserError, RunError) as error:
            failure = error
        if self.engine.any_of(failure is not None):
            raise RunError(str(failure or "another process failed, see its own message")) from failure

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Within the block, set the model to the averaged weights, if the run has them."""
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
