"""The path from noise to data, its times and its loss, as pure functions.

x_t = t x1 + (1 - t) eps, and the velocity to learn is x1 - eps. Times run from 0 (noise) to 1 (data).

Shapes: B batch, T latent frames, C channels, h w rows and columns; s places (tokens) of a frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lumos.errors import shown

TIME_DISTRIBUTIONS = ("uniform", "logit_normal")
MIN_TIME = 0.05
"""The time below which a velocity is computed from a predicted noise as at this time: at time 0 it is not defined."""


def interpolated(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return x_t = t data + (1 - t) noise; t [B] belongs to the first dimension, t [B, T] to the first two."""
    t = t.reshape(*t.shape, *[1] * (data.dim() - t.dim()))
    return t * data + (1 - t) * noise


def target_velocity(data: Tensor, noise: Tensor) -> Tensor:
    """Return data - noise."""
    return data - noise


def velocity_of_noise(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return the velocity (x_t - noise) / t for a predicted noise; x, noise [B, ...], t [B], at least MIN_TIME."""
    return (x - noise) / clamped_time(t, x.dim())


def clamped_time(t: Tensor, dimensions: int) -> Tensor:
    """Return times t [B], at least MIN_TIME, with `dimensions` dimensions."""
    return t.clamp(min=MIN_TIME).reshape(-1, *[1] * (dimensions - 1))


def replaced(x: Tensor, values: Tensor, given: Tensor | None) -> Tensor:
    """Return x [B, T, C, h, w] with the frames of `given`, bool [B, T], taken from `values`; None: none are given."""
    return x if given is None else torch.where(given[:, :, None, None, None], values, x)


def shifted(t: Tensor, shift: float) -> Tensor:
    """Return times with more of them near noise for shift > 1: u = 1 - t becomes shift u / (1 + (shift - 1) u)."""
    if shift == 1:
        return t
    u = 1 - t
    return 1 - shift * u / (1 + (shift - 1) * u)


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """Return the times 0 = t_0 < ... < t_steps = 1 of a sampler with `steps` steps."""
    if steps < 1 or not shift > 0:
        raise ValueError(f"steps {shown(steps)} and shift {shown(shift)} are not allowed; steps are at least 1, shift is above 0")
    inner = shifted(torch.arange(steps, dtype=torch.float64) / steps, shift).tolist()
    return [0.0, *inner[1:], 1.0]


def drawn_times(
    generators: Sequence[torch.Generator], distribution: str = "uniform", mean: float = 0.0, std: float = 1.0, shift: float = 1.0
) -> Tensor:
    """Return a time in [0, 1] for each clip, float32 [B], each drawn from the clip's own CPU generator.

    distribution: "uniform", or "logit_normal", the logistic function of a normal draw with `mean` and `std`.
    shift: see `shifted`. Raises ValueError for an unknown distribution.
    """
    if distribution == "uniform":
        t = torch.stack([torch.rand((), generator=g) for g in generators])
    elif distribution == "logit_normal":
        t = torch.sigmoid(mean + std * torch.stack([torch.randn((), generator=g) for g in generators]))
    else:
        raise ValueError(f"time distribution {shown(distribution)} is unknown; allowed: {', '.join(TIME_DISTRIBUTIONS)}")
    return shifted(t, shift)


def drawn_noise(generators: Sequence[torch.Generator], frames: int, channels: int, height: int, width: int) -> Tensor:
    """Return noise [B, frames, channels, height, width], float32, each clip from its own CPU generator, frame by frame.

    A longer clip begins with the noise of a shorter one.
    """
    return torch.stack([
        torch.stack([torch.randn(channels, height, width, generator=g) for _ in range(frames)]) for g in generators
    ])  # fmt: skip


def given_latents(data: Tensor, noise: Tensor, level: float | Tensor) -> Tensor:
    """Return what stands in given frames: (1 - level) data + level noise, [B, T, C, h, w]; level is a number or [B].

    Their own time is 1 - level. Level 0 gives the data unchanged.
    """
    if isinstance(level, Tensor):
        return interpolated(data, noise, 1 - level)
    return data if level == 0 else (1 - level) * data + level * noise


def kept_values(keep: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """Return which values belong to kept places, bool [B, 1, 1, h, w], for keep int64 [B, k] of rows x columns places."""
    places = torch.zeros(len(keep), rows * columns, dtype=torch.bool, device=keep.device).scatter(1, keep, True)
    values = places.unflatten(1, (rows, columns)).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    return values[:, None, None]


def frame_losses(prediction: Tensor, target: Tensor, given: Tensor | None = None) -> Tensor:
    """Return the mean squared error of each frame, float32 [B, T]; 0 at given frames, whose target has no effect."""
    error = prediction.float() - target.float()
    if given is not None:
        error = error.masked_fill(given[:, :, None, None, None], 0.0)
    return error.square().mean(dim=(2, 3, 4))


def masked_frame_losses(
    prediction: Tensor, target: Tensor, noisy: Tensor, kept: Tensor, given: Tensor | None = None, weight: float = 0.1
) -> Tensor:
    """Return the loss of each frame with dropped places (MaskDiT), float32 [B, T]; 0 at given frames.

    It is the mean squared error of the velocity over kept values, plus `weight` times the mean squared difference of the
    prediction from the network's input over dropped values.

    noisy: the input x_t [B, T, C, h, w]. kept: bool [B, 1, 1, h, w], see `kept_values`.
    """
    error = torch.where(kept, prediction.float() - target.float(), 0.0)
    rebuilt = torch.where(kept, 0.0, prediction.float() - noisy.float())
    if given is not None:
        frames = given[:, :, None, None, None]
        error, rebuilt = error.masked_fill(frames, 0.0), rebuilt.masked_fill(frames, 0.0)
    channels = prediction.shape[2]
    count = kept.sum(dim=(2, 3, 4)) * channels  # [B, 1]
    dropped = (~kept).sum(dim=(2, 3, 4)) * channels
    loss = error.square().sum(dim=(2, 3, 4)) / count.clamp(min=1)
    return loss + weight * rebuilt.square().sum(dim=(2, 3, 4)) / dropped.clamp(min=1)


def flow_loss(losses: Tensor, given: Tensor | None = None) -> Tensor:
    """Return the mean of frame losses [B, T] over the supervised frames, so that its scale is the same for every pattern.

    It is 0, with a gradient of 0, if all frames are given.
    """
    supervised = torch.ones_like(losses) if given is None else (~given).to(losses)
    return (losses * supervised).sum() / supervised.sum().clamp(min=1)


def min_snr_weights(t: Tensor, gamma: float) -> Tensor:
    """Return weights of squared errors of the velocity at times t, with mean 1 over uniform times.

    The squared error of the data is (1 - t)^2 times that of the velocity. It is weighted by the lower of gamma and
    signal / noise, t^2 / (1 - t)^2 (Min-SNR, arXiv 2303.09556).
    """
    meet = gamma**0.5 / (1 + gamma**0.5)  # the time at which both are equal
    return torch.minimum(t.square(), gamma * (1 - t).square()) * (3 / meet**2)
