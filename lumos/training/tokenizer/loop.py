"""How a video tokenizer is trained: `python -m lumos train-tokenizer --config configs/tokenizer/tiny.yaml steps=200`.

Writes into output_dir: log.jsonl, checkpoints/ (a new start with the same settings resumes from the newest), samples/ (pictures of
held-out clips above what comes back), and at the end the tokenizer folder `video_tokenizer/` with training.json beside its weights.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from lumos.data.prefetch import in_processes
from lumos.errors import RunError, UserError, shown
from lumos.files import write_json
from lumos.runtime import check_memory, pick_device
from lumos.training import checkpoint
from lumos.training.ema import Ema
from lumos.training.logging import Meter, RunLog
from lumos.training.muon import Muon
from lumos.training.schedule import learning_rate
from lumos.training.tokenizer.clips import Batch, TrainingClips, held_out_photographs, held_out_worlds
from lumos.training.tokenizer.fitting import DifferenceFit
from lumos.training.tokenizer.settings import TokenizerTrainingSettings, load_settings
from lumos.video.frames import to_uint8
from lumos.video.io import write_video
from tokenizer.configuration import VideoTokenizerConfig
from tokenizer.resizing import double
from tokenizer.video import VideoTokenizer

__all__ = ["TokenizerTrainingSettings", "load_settings", "train"]


def foreground_weight(video: Tensor, is_world: Tensor, weight: float) -> Tensor:
    """Weight of every pixel's error, [B, 1, T, H, W] with mean 1 per sample.

    In a drawn world the moving thing covers a few per cent of the pixels, so a pixel that differs from its row's median by
    more than 0.1 counts `weight` times. Photographs and film weigh the same everywhere.
    """
    median = video.median(dim=4, keepdim=True).values
    is_foreground = ((video - median).abs() > 0.1).any(dim=1, keepdim=True) & is_world.view(-1, 1, 1, 1, 1)
    weights = 1.0 + (weight - 1) * is_foreground
    return weights / weights.mean(dim=(1, 2, 3, 4), keepdim=True)


def reconstruction_loss(model: VideoTokenizer, video: Tensor, is_world: Tensor, settings: TokenizerTrainingSettings) -> Tensor:
    """Weighted mean absolute and squared error of what comes back, a scalar."""
    values, _ = model.quantize(model.encode_latent(video))
    error = model.decode_latent(values) - video
    weights = foreground_weight(video, is_world, settings.foreground_weight)
    return (weights * (settings.l1_weight * error.abs() + settings.mse_weight * error.square())).mean()


def batch_loss(model: VideoTokenizer, batch: Batch, settings: TokenizerTrainingSettings, device: torch.device) -> Tensor:
    """Loss of the clips plus picture_weight times the loss of the pictures."""
    weights = (1.0, settings.picture_weight)
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        losses = (reconstruction_loss(model, *videos, settings) for videos in batch.videos(device))
        return sum(weight * loss for weight, loss in zip(weights, losses, strict=False))


@torch.inference_mode()
def validate(model: VideoTokenizer, worlds: Tensor, pictures: Tensor) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """(metrics, sheets): PSNR in dB of clamped values, mean over samples, and the share of codes in use; pictures."""
    model.eval()
    metrics, sheets, used = {}, {}, []
    for name, video in (("worlds", worlds), ("photographs", pictures)):
        if not len(video):
            continue
        codes = torch.cat([model.encode(part) for part in video.split(4)])
        back = torch.cat([model.decode(part) for part in codes.split(4)]).clamp(-1, 1)
        mse = ((back - video) / 2).square().mean(dim=(1, 2, 3, 4))
        metrics[f"psnr_{name}"] = float((-10 * torch.log10(mse)).mean())
        used.append(codes.flatten())
        sheets[name] = _sheet(video[:6, :, ::4], back[:6, :, ::4])
    metrics["codes_used"] = len(torch.cat(used).unique()) / model.num_codes
    model.train()
    return metrics, sheets


def _sheet(video: Tensor, back: Tensor) -> np.ndarray:
    """Originals above reconstructions, one column a clip: uint8 [1, T 2 H, B W, 3]."""
    pairs = torch.stack([video, back], dim=3)  # B, 3, T, 2, H, W
    rows = pairs.permute(1, 2, 3, 4, 0, 5).flatten(4).flatten(1, 3)
    return to_uint8(rows[:, None])


def train(settings: TokenizerTrainingSettings) -> dict[str, Any]:
    """Train, or go on where the newest checkpoint in output_dir stopped; returns the final metrics.

    SIGTERM and Ctrl-C save a checkpoint and end the run early. Raises RunError when the loss is no longer finite.
    Under torchrun every process trains on clips of its own and the gradients are averaged.
    """
    output = Path(settings.output_dir)
    device = pick_device(settings.device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if settings.max_minutes is not None:
            raise UserError("max_minutes is not possible with several processes, whose clocks differ: set steps")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(settings.seed)
    config = VideoTokenizerConfig.from_dict(settings.model)
    if config.dropout and not settings.train_encoder:
        raise UserError(f"model.dropout {config.dropout} is not possible with train_encoder=false, which keeps the codes: set 0")
    check_memory_of(settings, config)
    model = VideoTokenizer(config)
    if settings.start_from is not None:
        try:
            start = VideoTokenizer.from_pretrained(settings.start_from)
        except (OSError, ValueError, RunError) as error:
            raise UserError(f"start_from {settings.start_from} cannot be read: {error}") from error
        is_half = config.spatial_patch_size == 2 and start.config.spatial_patch_size == 1
        if is_half:
            start = double(start)
        if replace(start.config, dropout=config.dropout) != config:
            found = "is, at twice its size, of" if is_half else "has"
            raise UserError(
                f"start_from {settings.start_from} {found} another config than model: {differing(start.config, config)}"
            )
        model.load_state_dict(start.state_dict())
    model = model.to(device).train()
    if not settings.train_encoder:
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    torch.backends.cudnn.benchmark = True  # the shapes stay the same
    return _Run(settings, model, output, device).to_the_end()


def check_memory_of(settings: TokenizerTrainingSettings, config: VideoTokenizerConfig) -> None:
    """UserError for a network, or batches of it, that this machine obviously cannot hold, before any is made."""
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in VideoTokenizer(config).parameters())
    check_memory(4 * weights, f"a video tokenizer of {weights:,} weights in float32")
    frames = max(settings.batch_size * settings.num_frames + settings.pictures_per_batch, settings.validation_clips)
    check_memory(3 * frames * settings.height * settings.width, "a batch of so many clips of this size")


def differing(found: VideoTokenizerConfig, wanted: VideoTokenizerConfig) -> str:
    """The fields in which two configs differ, as text."""
    pairs = {name: (value, getattr(wanted, name)) for name, value in vars(found).items()}
    return ", ".join(f"{name} {shown(a, 60)} there, {shown(b, 60)} here" for name, (a, b) in pairs.items() if a != b)


class _Optimizer:
    """AdamW for all weights; or Muon (orthogonalised momentum) for the convolutions, seen as matrices, and AdamW for the rest.

    `step` takes the share of the peak learning rates.
    """

    def __init__(self, parameters: dict[str, Tensor], settings: TokenizerTrainingSettings) -> None:
        matrices = {name: p for name, p in parameters.items() if p.dim() > 1}
        others = {name: p for name, p in parameters.items() if p.dim() <= 1}
        # Muon takes matrices only; a view has the memory of its convolution, and is given its gradient.
        muon = bool(settings.muon_lr)
        self.views = {name: (nn.Parameter(p.data.view(len(p), -1)), p) for name, p in matrices.items() if muon}
        updated = [view for view, _ in self.views.values()] if muon else list(matrices.values())
        groups = [
            {"params": updated, "weight_decay": settings.weight_decay, "muon": muon, "lr": settings.muon_lr or settings.lr},
            {"params": list(others.values()), "weight_decay": 0.0, "muon": False},
        ]
        self.optimizer = Muon(groups, lr=settings.lr, betas=settings.betas)
        self.parameters = parameters
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def step(self, share: float) -> None:
        for view, parameter in self.views.values():
            view.grad = None if parameter.grad is None else parameter.grad.view_as(view)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share
        self.optimizer.step()

    def _owner(self, name: str) -> Tensor:
        return self.views[name][0] if name in self.views else self.parameters[name]

    def state(self) -> dict[str, Tensor]:
        """The moments by name, for a checkpoint."""
        return {
            f"optimizer.{key}.{name}": value
            for name in self.parameters
            for key, value in self.optimizer.state.get(self._owner(name), {}).items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for label, value in tensors.items():
            if label.startswith("optimizer."):
                _, key, name = label.split(".", 2)
                owner = self._owner(name)
                # AdamW wants its count of steps on the CPU, wherever the weights are.
                self.optimizer.state[owner][key] = value.to(owner.device) if value.dim() else value


class _Run:
    """The state of one training: model, optimizer, averaged weights, step and the time spent."""

    def __init__(self, settings: TokenizerTrainingSettings, model: VideoTokenizer, output: Path, device: torch.device) -> None:
        self.settings, self.model, self.output, self.device = settings, model, output, device
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = _Optimizer(self.parameters, settings)
        self.ema = Ema(self.parameters, settings.ema_decay) if settings.ema_decay else None
        self.data = TrainingClips(
            seed=settings.seed, height=settings.height, width=settings.width, num_frames=settings.num_frames,
            batch_size=settings.batch_size, pictures_per_batch=settings.pictures_per_batch,
            share_worlds=settings.share_worlds, film_sources=settings.films, world_options=settings.worlds,
            share_textures=settings.share_textures, recolour=settings.recolour,
        )  # fmt: skip
        sizes = (settings.height, settings.width)
        self.held_out = (
            held_out_worlds(settings.validation_clips, settings.num_frames, *sizes, **settings.worlds).to(device),
            held_out_photographs(*sizes).to(device),
        )
        self.step, self.seconds, self.fit_seconds, self.meter = 0, 0.0, 0.0, Meter()
        self.stop_requested = False
        self.resumed = self._resume()

    def to_the_end(self) -> dict[str, Any]:
        """The fit and all remaining steps, then the export."""
        settings = self.settings
        log = RunLog(self.output, first_step=self.step, max_steps=settings.steps, enabled=self.rank == 0)
        previous = {s: signal.signal(s, self._request_stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            if settings.fit_batches and not self.resumed and not self._fit():
                log.say("stopped in the fit, of which nothing is kept; the same command fits again")
                return {"finished": False, "step": 0}
            saved_at, started = time.monotonic(), time.monotonic() - self.seconds
            with closing(self._batches(range(self.step, settings.steps))) as batches:
                while self.step < settings.steps and self._progress() < 1:
                    self._one_step(next(batches), log)
                    self.seconds = time.monotonic() - started
                    if self.rank == 0 and self.step % settings.validate_every == 0 and self.step < settings.steps:
                        self._validate(log)
                    if self.stop_requested or time.monotonic() - saved_at > 60 * settings.checkpoint_minutes:
                        saved_at = time.monotonic()
                        if self.rank == 0:
                            self._save(log)
                    if self.stop_requested:
                        log.say(f"stopped at step {self.step}; the same command goes on from there")
                        return {"finished": False, "step": self.step}
            if self.rank != 0:
                return {"finished": True, "step": self.step}
            self._save(log)
            return self._export(log)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            log.close()

    def _fit(self) -> bool:
        """Begin with the differences of least squared error, over batches that the steps do not see; False if told to stop."""
        settings, fit = self.settings, DifferenceFit(self.model.eval())
        begun = time.monotonic()
        numbers = range(settings.steps, settings.steps + settings.fit_batches)
        with closing(self._batches(numbers)) as batches:
            for batch in tqdm(batches, total=len(numbers), desc="fit", unit="batch", disable=self.rank != 0):
                for weight, (video, is_world) in zip((1.0, settings.picture_weight), batch.videos(self.device), strict=False):
                    fit.add(video, weight / video[:, :1].numel() * foreground_weight(video, is_world, settings.foreground_weight))
                if self.stop_requested:
                    return False
        if self.world > 1:
            for sums in (fit.squares, fit.products):
                dist.all_reduce(total := sums.to(self.device))
                sums.copy_(total)
        fit.solve()
        self.model.train()
        self.fit_seconds = time.monotonic() - begun
        if self.ema:
            self.ema = Ema(self.parameters, settings.ema_decay)
        return True

    def _request_stop(self, *_: object) -> None:
        self.stop_requested = True

    def _progress(self) -> float:
        """How much of the run is done, by steps or, with max_minutes, by time if that is further."""
        by_steps = self.step / self.settings.steps
        return by_steps if self.settings.max_minutes is None else max(by_steps, self.seconds / (60 * self.settings.max_minutes))

    def _batches(self, steps: range) -> Generator[Batch, None, None]:
        processes = self.settings.processes
        yield from in_processes(self._batch, steps, processes=processes) if processes else map(self._batch, steps)

    def _batch(self, step: int) -> Batch:
        return self.data.batch(step * self.world + self.rank)

    def _one_step(self, batch: Batch, log: RunLog) -> None:
        settings = self.settings
        step_by_time = max(self.step, int(self._progress() * settings.steps))
        lr = learning_rate(
            step_by_time,
            lr=settings.lr,
            min_lr=settings.min_lr,
            max_steps=settings.steps,
            warmup_steps=settings.warmup_steps,
        )
        torch.manual_seed(settings.seed + self.step)
        loss = batch_loss(self.model, batch, settings, self.device)
        if not math.isfinite(value := loss.item()):
            raise RunError(f"the loss is {value} at step {self.step}; lower lr and start again from the last checkpoint")
        self.optimizer.zero_grad()
        loss.backward()
        self._average_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), settings.max_grad_norm)
        self.optimizer.step(lr / settings.lr)
        self.step += 1
        if self.ema:
            self.ema.update(self.parameters, self.step)
        self.meter.add("loss", value)
        self.meter.add("grad_norm", float(norm))
        log.progress(value, lr)
        if self.step % settings.log_every == 0:
            log.write(step=self.step, lr=lr, seconds=round(self.seconds, 1), **self.meter.means())
            self.meter = Meter()

    def _average_gradients(self) -> None:
        """Mean over processes. The wish to stop travels along, so that all stop at the same step."""
        if self.world == 1:
            return
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        stop = gradients[0].new_tensor([float(self.stop_requested)])
        flat = torch.cat([g.flatten() for g in gradients] + [stop])
        dist.all_reduce(flat)
        self.stop_requested = bool(flat[-1] > 0)
        for gradient, mean in zip(gradients, flat[:-1].div_(self.world).split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def _validate(self, log: RunLog) -> dict[str, float]:
        if self.ema:
            self.ema.swap(self.parameters)
        metrics, sheets = validate(self.model, *self.held_out)
        if self.ema:
            self.ema.swap(self.parameters)
        for name, sheet in sheets.items():
            write_video(self.output / "samples" / f"{name}-{self.step:06d}.png", sheet, fps=1)
        log.write(step=self.step, seconds=round(self.seconds, 1), **metrics)
        log.say(f"step {self.step}: " + ", ".join(f"{key} {value:.3f}" for key, value in metrics.items()))
        return metrics

    def _save(self, log: RunLog) -> None:
        """A checkpoint: weights, optimizer moments, averaged weights; sums of the log since its last line."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.named_parameters()}
        tensors |= self.optimizer.state()
        if self.ema:
            tensors |= {f"ema.{name}": average for name, average in self.ema.average.items()}
        root = self.output / "checkpoints"
        folder = checkpoint.begin(root, self.step)
        written = checkpoint.save_tensors(folder, 0, tensors)
        log.sync()
        state = {"settings": self.settings.to_dict(), "processes": self.world, "meters": dict(self.meter.sums)}
        state |= {"seconds": self.seconds, "fit_seconds": self.fit_seconds}
        checkpoint.finish(root, folder, self.step, state, [written], keep_last=2)

    def _resume(self) -> bool:
        """Whether there was a checkpoint to go on from."""
        fields = {"settings": dict, "meters": dict, "seconds": float}
        found = checkpoint.latest(self.output / "checkpoints", fields=fields)
        if found is None:
            return False
        folder, state = found
        self.settings.check_same_run(state["settings"], folder)
        if (processes := state.get("processes", state.get("world"))) != self.world:
            raise UserError(
                f"{folder} was made with {processes} processes, this run has {self.world}: start as many, "
                "or take another output_dir"
            )
        tensors = checkpoint.Stored(folder).own(0)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
        self.optimizer.load_state(tensors)
        if self.ema:
            self.ema.average = {name: tensors[f"ema.{name}"].to(p.device) for name, p in self.parameters.items()}
        self.step, self.seconds, self.meter = state["step"], state["seconds"], Meter(state["meters"])
        self.fit_seconds = state.get("fit_seconds", 0.0)
        return True

    def _export(self, log: RunLog) -> dict[str, Any]:
        """Write the tokenizer folder and training.json; returns the metrics of the exported weights."""
        settings = self.settings
        if self.ema:
            self.ema.swap(self.parameters)
            self.ema = None
        folder = self.output / "video_tokenizer"
        self.model.to(getattr(torch, settings.export_dtype)).save_pretrained(folder)
        self.model = VideoTokenizer.from_pretrained(folder, device=self.device)
        metrics: dict[str, Any] = self._validate(log)
        metrics |= {
            "finished": True,
            "step": self.step,
            "minutes": round((self.seconds + self.fit_seconds) / 60, 1),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "codes": self.model.num_codes,
        }
        record = {
            "metrics": metrics,
            "settings": settings.to_dict(),
            "real_data": self.data.real_names,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        write_json(folder / "training.json", record)
        log.say(json.dumps(metrics))
        return metrics
