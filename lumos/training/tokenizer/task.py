"""The training of a video tokenizer: `python -m lumos train-tokenizer --config configs/tokenizer/tiny.yaml steps=200`.

It is a task of the shared loop. The loop writes into output_dir: log.jsonl, checkpoints/ (a new start with the same settings
resumes from the newest), samples/ (held-out clips above their reconstructions), and at the end the tokenizer folder
`video_tokenizer/` with training.json beside its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lumos.data.curriculum import StepShape
from lumos.data.prefetch import in_processes
from lumos.errors import RunError, UserError
from lumos.files import replacing_folder, write_json
from lumos.progress import progress_bar
from lumos.runtime import parameter_count
from lumos.training import checkpoint, loop
from lumos.training.adversarial import critic_losses, generator_losses
from lumos.training.task import Batch, Measured, TrainingTask
from lumos.training.tokenizer import lpips
from lumos.training.tokenizer.clips import DrawnClips, TrainingClips, held_out_films, held_out_photographs, held_out_worlds
from lumos.training.tokenizer.discriminator import Discriminator, mean_loss
from lumos.training.tokenizer.fitting import DifferenceFit
from lumos.training.tokenizer.flops import decoder_flops, encoder_flops
from lumos.training.tokenizer.settings import MAY_CHANGE, LoopSettings, TokenizerTrainingSettings, loop_settings
from lumos.video.frames import from_uint8, to_uint8
from tokenizer.configuration import VideoTokenizerConfig
from tokenizer.resizing import double
from tokenizer.video import VideoTokenizer

FITTED = ("decoder.conv_out.conv3d.weight", "decoder.conv_out.conv3d.bias")
"""Weights of the last layer, which the least-squares fit before the first step sets."""
JUDGED = "judged"
"""The entry of a micro-batch with the pairs (videos, reconstructions) that the discriminator learns from."""


def train(settings: TokenizerTrainingSettings) -> dict[str, Any]:
    """Train, or continue from the newest checkpoint in output_dir. Return the summary of `loop.train`, with measurements."""
    return loop.train(loop_settings(settings), TokenizerTask)


class TokenizerTask(TrainingTask):
    """Trains a `VideoTokenizer` to reconstruct its input. A step has clips and pictures.

    Each clip and each picture has one loss. The losses are weighted: their mean is the mean error of the clips, plus
    picture_weight times the mean error of the pictures.
    """

    export_folder = "video_tokenizer"
    measures = True

    def __init__(self, settings: LoopSettings, device: torch.device):
        self.settings, self.device = settings.video_tokenizer, device
        if self.settings.precision == "bf16" and settings.zero_stage and device.type == "cpu":
            raise UserError(
                f"zero_stage {settings.zero_stage} keeps weights in bf16, which a tokenizer's layers lack on the CPU: take "
                "precision=fp32, or zero_stage=0"
            )
        self.loss_groups = {}
        self.config = VideoTokenizerConfig.from_dict(self.settings.model)
        self.start = self._read_start()
        wanted = self.settings
        self.clips = TrainingClips(
            seed=wanted.seed, height=wanted.height, width=wanted.width, num_frames=wanted.num_frames,
            batch_size=wanted.batch_size, pictures_per_batch=wanted.pictures_per_batch,
            share_worlds=wanted.share_worlds, film_sources=wanted.films, world_options=wanted.worlds,
            share_textures=wanted.share_textures, recolour=wanted.recolour, photograph_sources=wanted.photographs,
            film_side=wanted.film_side, photograph_side=wanted.photograph_side, share_stills=wanted.share_stills,
            turn=wanted.turn, glide=wanted.glide,
        )  # fmt: skip
        self.source = self.clips
        sizes = (wanted.height, wanted.width)
        self.held_out = {
            "worlds": held_out_worlds(wanted.validation_clips, wanted.num_frames, *sizes, **wanted.worlds),
            "photographs": held_out_photographs(*sizes),
            "films": held_out_films(wanted.films, wanted.num_frames, *sizes),
        }
        self.discriminator: Discriminator | None = None
        self.lpips = lpips.load(wanted.lpips_folder, *sizes, device) if wanted.lpips_weight else None
        torch.backends.cudnn.benchmark = True  # allowed, because all steps have the same shapes

    def build_model(self) -> VideoTokenizer:
        torch.manual_seed(self.settings.seed)
        model = VideoTokenizer(self.config)
        if self.start is not None:
            model.load_state_dict(self.start.state_dict())
        if not self.settings.train_encoder:
            model.encoder.requires_grad_(False)
            model.quant_conv.requires_grad_(False)
        return model.train()

    def first_weights(self, stop: Callable[[], bool]) -> dict[str, Tensor] | None:
        """Return the weights of `FITTED` with the least squared error on batches that no training step has."""
        settings = self.settings
        if not settings.fit_batches:
            return {}
        model = self.build_model().to(self.device).eval()
        fit, steps = DifferenceFit(model), range(settings.steps, settings.steps + settings.fit_batches)
        with closing(self._drawn(steps)) as batches:
            for batch in progress_bar(batches, total=len(steps), desc="fit", unit="batch"):
                for weight, (video, is_world) in zip((1.0, settings.picture_weight), batch.videos(self.device), strict=False):
                    fit.add(video, weight / video[:, :1].numel() * foreground_weight(video, is_world, settings.foreground_weight))
                if stop():
                    return None
        fit.solve()
        weights = dict(model.named_parameters())
        return {name: weights[name].detach() for name in FITTED}

    def _drawn(self, steps: range) -> Iterator[DrawnClips]:
        processes = self.settings.processes
        yield from in_processes(self.clips.batch, steps, processes=processes) if processes else map(self.clips.batch, steps)

    def muon_matrices(self, model: nn.Module) -> dict[str, float]:
        """Return all convolutions, which Muon updates as matrices, with the factor of their learning rate."""
        scale = self.settings.muon_lr / self.settings.lr
        return {name: scale for name, p in model.named_parameters() if p.requires_grad and p.dim() > 1}

    def prepare(self, step: int, shape: StepShape, positions: range, *, dropout: bool = True) -> DrawnClips:
        return self.clips.batch(step, positions)

    def encode(self, prepared: DrawnClips) -> Batch:
        settings = self.settings
        frames, is_world, weights, flops = [], [], [], 0.0
        count = settings.batch_size + settings.pictures_per_batch
        parts = (
            (prepared.clips, prepared.clip_is_world, count / settings.batch_size, self._flops(settings.num_frames)),
            (prepared.pictures, prepared.picture_is_world, self._picture_share * count, self._flops(1)),
        )
        for drawn, worlds, weight, each in parts:
            frames += drawn.to(self.device, non_blocking=True).unbind()
            is_world.append(worlds)
            weights += [weight] * len(drawn)
            flops += each * len(drawn)
        tensors = {
            "is_world": torch.cat(is_world).to(self.device),
            "weights": torch.tensor(weights, device=self.device),
            "counts": torch.ones(len(frames), dtype=torch.bool, device=self.device),
        }
        names = [f"step {prepared.step}, {'clip' if len(video) > 1 else 'picture'}" for video in frames]
        return Batch(
            prepared.step, "video", tensors, names, [self._codes(len(video)) for video in frames], flops, len(frames),
            rows={"frames": frames}, padded=(), idle={"counts": False},
        )  # fmt: skip

    def losses(self, model: nn.Module, micro: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return one loss for each clip and picture, [N]: the weighted mean absolute and squared error of the reconstruction."""
        errors, frames = [], micro["frames"]
        for _, members in groupby(range(len(frames)), key=lambda i: len(frames[i])):
            found = list(members)
            video = from_uint8(torch.stack([frames[i] for i in found]))
            back, of_videos = self._reconstructed(model, video, micro["is_world"][found])
            errors.append(of_videos)
            if self.discriminator is not None:
                micro.setdefault(JUDGED, []).append((video, back.detach()))
        return (torch.cat(errors) * micro["weights"])[micro["counts"]], {}

    def _reconstructed(self, model: nn.Module, video: Tensor, is_world: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstructions of videos [B, 3, T, H, W], and their losses [B]."""
        back = model(video.to(next(model.parameters()).dtype))
        return back, self._errors(back, video, is_world)

    def _errors(self, back: Tensor, video: Tensor, is_world: Tensor) -> Tensor:
        """Return the loss [B] of each reconstruction of a video, both [B, 3, T, H, W]."""
        settings = self.settings
        weights = foreground_weight(video, is_world, settings.foreground_weight)
        errors = self._pixel_errors(back - video, weights)
        if self.lpips is not None:
            errors = errors + settings.lpips_weight * self.lpips.distances(back, video)
        if self.discriminator is not None:
            judged = mean_loss([generator_losses(scores) for scores in self.discriminator(back)])
            errors = errors + settings.adversarial_weight * judged
        return errors

    def build_auxiliary(self) -> nn.Module | None:
        if self.settings.adversarial_weight:
            torch.manual_seed(self.settings.seed + 1)
            self.discriminator = Discriminator(self.settings.discriminator_channels).train()
        return self.discriminator

    def auxiliary_optimization(self) -> dict[str, Any]:
        lr = self.settings.discriminator_lr
        least = lr * self.settings.min_lr / self.settings.lr
        return {"optimizer": "adamw", "lr": lr, "min_lr": least, "betas": (0.5, 0.9), "weight_decay": 0.0}

    def auxiliary_losses(self, model: nn.Module, auxiliary: nn.Module, micro: dict[str, Any]) -> Tensor:
        """Return the hinge losses [N] of the discriminator for the clips and pictures, and for their reconstructions."""
        losses = [
            mean_loss([critic_losses(real, fake) for real, fake in zip(auxiliary(video), auxiliary(back), strict=True)])
            for video, back in micro.pop(JUDGED)
        ]
        return torch.cat(losses)[micro["counts"]]

    def _pixel_errors(self, error: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted mean absolute and squared error [B] of differences [B, 3, T, H, W]."""
        settings = self.settings
        return (weights * (settings.l1_weight * error.abs() + settings.mse_weight * error.square())).mean(dim=(1, 2, 3, 4))

    @torch.inference_mode()
    def measure(self, model: VideoTokenizer) -> Measured:
        """Return the mean PSNR of reconstructions of held-out clips in dB, the share of codes in use, and pictures (`sheet`)."""
        dtype = next(model.parameters()).dtype
        training = model.training
        model.eval()
        values, pictures, used = {}, {}, []
        for name, video in self.held_out.items():
            if not len(video):
                continue
            parts = [part.to(self.device) for part in video.split(4)]
            codes = [model.encode(part.to(dtype)) for part in parts]
            back = [model.decode(part).float().clamp(-1, 1) for part in codes]
            mse = torch.cat([((a - b) / 2).square().mean(dim=(1, 2, 3, 4)) for a, b in zip(back, parts, strict=True)])
            values[f"psnr_{name}"] = float((-10 * torch.log10(mse)).mean())
            used += [part.flatten() for part in codes]
            pictures[name] = sheet(torch.cat(parts[:2])[:6, :, ::4], torch.cat(back[:2])[:6, :, ::4])
        values["codes_used"] = len(torch.cat(used).unique()) / model.num_codes
        model.train(training)
        return Measured(values, pictures)

    def resume_fingerprint(self) -> dict[str, Any]:
        return decisive(self.settings)

    def fingerprint_defaults(self) -> dict[str, Any]:
        return decisive(TokenizerTrainingSettings())

    def export_metadata(self) -> dict[str, Any]:
        return {"video_tokenizer": self.config.to_dict(), "real_data": self.clips.real_names}

    def export(self, folder: Path, target: Path) -> Measured:
        """Write the tokenizer folder with training.json, and measure the tokenizer that the folder holds."""
        settings, state = self.settings, checkpoint.read_state(folder)
        stored, kind = checkpoint.Stored(folder), checkpoint.AVERAGE if state["averaged"] else checkpoint.WEIGHT
        model = self.build_model()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(stored.read(kind, name, 0, parameter.numel()).view_as(parameter))
        with replacing_folder(target) as writing:
            model.to(getattr(torch, settings.export_dtype)).save_pretrained(writing)
            model = VideoTokenizer.from_pretrained(writing, device=self.device)
            measured = self.measure(model)
            metrics = measured.values | {
                "finished": True,
                "step": state["step"],
                "minutes": round((state["seconds"] + state["first_seconds"]) / 60, 1),
                "parameters": parameter_count(model),
                "codes": model.num_codes,
            }
            record = {
                "metrics": metrics,
                "settings": settings.to_dict(),
                "real_data": self.clips.real_names,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
            }
            write_json(writing / "training.json", record)
        return measured

    def _read_start(self) -> VideoTokenizer | None:
        """Return the tokenizer that start_from names, doubled if this run has twice its size; None without start_from.

        Raises UserError if it cannot be read or has another shape.
        """
        folder, config = self.settings.start_from, self.config
        if folder is None:
            return None
        try:
            start = VideoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, RunError) as error:
            raise UserError(f"start_from {folder} cannot be read: {error}") from error
        is_half = config.spatial_patch_size == 2 and start.config.spatial_patch_size == 1
        if is_half:
            start = double(start)
        if replace(start.config, dropout=config.dropout) != config:
            found = "is, at twice its size, of" if is_half else "has"
            raise UserError(f"start_from {folder} {found} another config than model: {differing(start.config, config)}")
        return start

    @property
    def _picture_share(self) -> float:
        """The weight of the loss of one picture in the mean."""
        pictures = self.settings.pictures_per_batch
        return self.settings.picture_weight / pictures if pictures else 0.0

    def _codes(self, num_frames: int) -> int:
        stride = self.config.spatial_compression
        latent_frames = 1 + (num_frames - 1) // self.config.temporal_compression
        return latent_frames * (self.settings.height // stride) * (self.settings.width // stride)

    def _flops(self, num_frames: int) -> float:
        """Return the FLOPs of the forward and backward pass of one clip.

        The backward pass of the trained parts has twice the FLOPs of their forward pass.
        """
        clip = self.config, num_frames, self.settings.height, self.settings.width
        times = 3 if self.settings.train_encoder else 1
        return float(times * encoder_flops(*clip) + 3 * decoder_flops(*clip))


def decisive(settings: TokenizerTrainingSettings) -> dict[str, Any]:
    """Return the settings that decide the losses."""
    return {key: value for key, value in settings.to_dict().items() if key not in MAY_CHANGE}


def foreground_weight(video: Tensor, is_world: Tensor, weight: float) -> Tensor:
    """Return the weight of the error of every pixel, [B, 1, T, H, W] with mean 1 for each sample.

    In a synthetic scene the moving object covers a few per cent of the pixels. So a pixel that differs by more than 0.1 from
    the median of its row counts `weight` times. All pixels of photographs and films have the same weight.
    """
    median = video.median(dim=4, keepdim=True).values
    is_foreground = ((video - median).abs() > 0.1).any(dim=1, keepdim=True) & is_world.view(-1, 1, 1, 1, 1)
    weights = 1.0 + (weight - 1) * is_foreground
    return weights / weights.mean(dim=(1, 2, 3, 4), keepdim=True)


def sheet(video: Tensor, back: Tensor) -> np.ndarray:
    """Return originals above their reconstructions, one column for each clip: uint8 [1, T 2 H, B W, 3]."""
    pairs = torch.stack([video, back], dim=3)  # B, 3, T, 2, H, W
    rows = pairs.permute(1, 2, 3, 4, 0, 5).flatten(4).flatten(1, 3)
    return to_uint8(rows[:, None])


def differing(found: VideoTokenizerConfig, wanted: VideoTokenizerConfig) -> str:
    """Return the fields in which two configs differ, as text."""
    pairs: Mapping[str, tuple[Any, Any]] = {name: (value, getattr(wanted, name)) for name, value in vars(found).items()}
    return ", ".join(f"{name} {a} there, {b} here" for name, (a, b) in pairs.items() if a != b)
