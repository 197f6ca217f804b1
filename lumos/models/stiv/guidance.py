"""Guidance by text and by image, and sampling with it. It knows a velocity as a callable, not the network.

A branch is one prediction of the network: with text or without, with the given frames or without. F_TI has both,
F_I the given frames only, F_0 neither.

    joint       F_0 + s (F_TI - F_0)                          two branches
    separate    F_0 + s_I (F_I - F_0) + s (F_TI - F_I)        three branches

Shapes: B clips, K branches, T latent frames, C channels, h w rows and columns. Rows of a batch of branches are
ordered by branch, then by clip.
Source: reference, section 8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lumos.errors import UserError, shown
from lumos.models.stiv.flow import given_latents, replaced
from lumos.models.stiv.settings import NULL_IMAGES, RENORMS
from lumos.models.stiv.solvers import Field, solve

EPS = 1e-12


class GuidanceBranch(NamedTuple):
    """One prediction: whether it has the text, and whether it has the given frames."""

    text: bool
    image: bool


FULL, IMAGE_ONLY = GuidanceBranch(text=True, image=True), GuidanceBranch(text=False, image=True)
TEXT_ONLY, NULL = GuidanceBranch(text=True, image=False), GuidanceBranch(text=False, image=False)

Velocity = Callable[[Tensor, float, Sequence[GuidanceBranch]], Tensor]
"""A function (x [K B, T, C, h, w], t, branches [K]) -> velocity [K B, T, C, h, w].

The given frames are already in x. The function chooses the text of each branch, and whether given frames have
their own time; `over_branches` helps.
"""


@dataclass(frozen=True)
class Guidance:
    """The combination of the branches.

    scale           s; 1 runs one branch if image_scale is None
    image_scale     s_I, which selects separate guidance; None: joint
    renorm          scale the result to the norm of F_TI: "off", or a norm a "sample", a "frame" or a "token"
    null_image      what stands in the given frames of a branch without them: "renoise", the given latents at the noise
                    level of t; "own", what that branch made of them; "noise", the noise of the start; "zeros"
    interval        times from low to high, both included, at which there is guidance; elsewhere there is F_TI alone
    given_noise     the level of noise in given frames, 0 to below 1
    patch           (frames, rows, columns) of a token, for renorm "token"

    Raises UserError for values that are not allowed or do not work together.
    """

    scale: float = 7.5
    image_scale: float | None = None
    renorm: str = "sample"
    null_image: str = "renoise"
    interval: tuple[float, float] = (0.0, 1.0)
    given_noise: float = 0.0
    patch: tuple[int, int, int] = (1, 2, 2)

    def __post_init__(self) -> None:
        for name, value, allowed in (("guidance_renorm", self.renorm, RENORMS), ("null_image", self.null_image, NULL_IMAGES)):
            if value not in allowed:
                raise UserError(f"{name} {shown(value)} is unknown; allowed: {', '.join(allowed)}")
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise UserError(f"guidance_interval {shown([low, high])} is not allowed; give two times, 0 <= low < high <= 1")
        if not 0 <= self.given_noise < 1:
            raise UserError(f"given_noise {shown(self.given_noise)} is not allowed; give a number from 0 to below 1")
        if self.null_image == "own" and self.is_guided and (low, high) != (0.0, 1.0):
            raise UserError("null_image own needs guidance at every step; leave guidance_interval out, or choose renoise")

    @property
    def is_guided(self) -> bool:
        """Whether there is more than one branch at any time."""
        return self.scale != 1 or self.image_scale not in (None, 1)

    def branches(self, t: float) -> tuple[GuidanceBranch, ...]:
        """Return the branches that are needed at time t; the first one is F_TI."""
        s, s_i = self.scale, self.scale if self.image_scale is None else self.image_scale
        if not self.is_guided or not self.interval[0] <= t <= self.interval[1]:
            return (FULL,)
        needed = [branch for branch, weight in ((IMAGE_ONLY, s_i - s), (NULL, 1 - s_i)) if weight != 0]
        return (FULL, *needed)

    def combined(self, branches: Sequence[GuidanceBranch], predictions: Sequence[Tensor]) -> Tensor:
        """Return the guided prediction, before renormalisation, of the predictions of `branches(t)`."""
        if len(branches) == 1:
            return predictions[0]
        found = dict(zip(branches, predictions, strict=True))
        s, s_i = self.scale, self.scale if self.image_scale is None else self.image_scale
        if IMAGE_ONLY not in found:
            return joint(found[FULL], found[NULL], s)
        if NULL not in found:
            return joint(found[FULL], found[IMAGE_ONLY], s)  # s_I = 1: the image is not guided
        return separate(found[FULL], found[IMAGE_ONLY], found[NULL], s, s_i)


def joint(full: Tensor, null: Tensor, scale: float) -> Tensor:
    """Return F_0 + scale (F_TI - F_0)."""
    return torch.lerp(null, full, scale)


def separate(full: Tensor, image: Tensor, null: Tensor, scale: float, image_scale: float) -> Tensor:
    """Return F_0 + image_scale (F_I - F_0) + scale (F_TI - F_I)."""
    return null + image_scale * (image - null) + scale * (full - image)


def renormalised(guided: Tensor, full: Tensor, axis: str, given: Tensor | None = None, patch: Sequence[int] = (1, 2, 2)) -> Tensor:
    """Return the guided prediction [B, T, C, h, w], scaled to the norm of `full` over generated frames.

    axis: "sample", "frame" or "token" (patches of `patch` frames, rows and columns) has a norm each; "off" changes nothing.
    given: bool [B, T], frames that have no part in the norms; None: none. They are scaled with the others.
    """
    if axis == "off":
        return guided
    ratio = _norms(full, axis, given, patch) / _norms(guided, axis, given, patch).clamp(min=EPS)
    if axis == "token":
        for dim, size in zip((1, 3, 4), patch, strict=True):
            ratio = ratio.repeat_interleave(size, dim)
    return guided * ratio.to(guided.dtype)


def _norms(x: Tensor, axis: str, given: Tensor | None, patch: Sequence[int]) -> Tensor:
    """Return norms over the axes of x [B, T, C, h, w], kept as size 1; for "token" [B, f, 1, rows, columns]."""
    squares = x.float().square()
    if given is not None:
        squares = squares.masked_fill(given[:, :, None, None, None], 0.0)
    if axis == "token":
        frames, rows, columns = patch
        cut = squares.unflatten(1, (-1, frames)).unflatten(4, (-1, rows)).unflatten(6, (-1, columns))
        return cut.sum(dim=(2, 3, 5, 7)).sqrt()[:, :, None]
    return squares.sum(dim=(1, 2, 3, 4) if axis == "sample" else (2, 3, 4), keepdim=True).sqrt()


def over_branches(branches: Sequence[GuidanceBranch], with_: Tensor, without: Tensor, part: str = "text") -> Tensor:
    """Return one batch [K B, ...]: for each branch `with_` [B, ...] if it has the `part` ("text" or "image"), else `without`."""
    return torch.cat([with_ if getattr(branch, part) else without for branch in branches])


def null_latents(kind: str, state: Tensor, values: Tensor, noise: Tensor, t: float) -> Tensor:
    """Return what stands in the given frames of a branch without them, [B, T, C, h, w]; see `Guidance.null_image`."""
    if kind == "renoise":
        return t * values + (1 - t) * noise
    return {"own": state, "noise": noise, "zeros": torch.zeros_like(noise)}[kind]


def guided_field(
    velocity: Velocity, guidance: Guidance, noise: Tensor, values: Tensor | None = None, given: Tensor | None = None
) -> Field:
    """Return the field (x, t) -> dx/dt that a solver integrates, [B, T, C, h, w].

    The given frames of x hold no result: each call puts the given latents into them, for each branch its own. With
    null_image "own" they hold what the null branch made; otherwise their slope is 0.

    noise: the noise of the start. values: the latents of given frames. given: bool [B, T]; None: nothing is given.
    """
    conditioned = None if given is None else given_latents(values, noise, guidance.given_noise)

    def field(x: Tensor, t: float) -> Tensor:
        branches = guidance.branches(t)
        if given is None:
            inputs = x.repeat(len(branches), 1, 1, 1, 1)
        else:
            with_image = replaced(x, conditioned, given)
            has_null = any(not branch.image for branch in branches)
            without = replaced(x, null_latents(guidance.null_image, x, values, noise, t), given) if has_null else with_image
            inputs = over_branches(branches, with_image, without, "image")
        predictions = velocity(inputs, t, branches).chunk(len(branches))
        slope = guidance.combined(branches, predictions)
        if len(branches) > 1:
            slope = renormalised(slope, predictions[0], guidance.renorm, given, guidance.patch)
        if given is None:
            return slope
        own = dict(zip(branches, predictions, strict=True)).get(NULL) if guidance.null_image == "own" else None
        return replaced(slope, torch.zeros_like(slope) if own is None else own, given)

    return field


def sample(
    velocity: Velocity,
    noise: Tensor,
    grid: Sequence[float],
    solver: str = "euler",
    guidance: Guidance = Guidance(),
    values: Tensor | None = None,
    given: Tensor | None = None,
    after_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Return the latents [B, T, C, h, w] that the velocity makes of noise; given frames are bitwise those of `values`.

    Args:
        velocity: see `Velocity`. It is not called if all frames are given.
        noise: float32 [B, T, C, h, w].
        grid: times from 0 to 1.
        values: latents of the given frames, [B, T, C, h, w]; other frames have no effect. given: bool [B, T].
        after_step: called with the number of each step and the latents after it, which it may change in place.
            Given frames stay as they are.

    Raises UserError for an image scale if no clip has given frames.
    """
    if given is None or not given.any():
        if guidance.image_scale is not None:
            raise UserError(f"image_guidance_scale {guidance.image_scale:g} needs a given frame; give an image, or leave it out")
        return solve(guided_field(velocity, guidance, noise), noise, grid, solver, after_step)
    if given.all():
        return values.clone()
    values = torch.where(given[:, :, None, None, None], values, 0.0)  # other frames may hold anything

    def watched(step: int, x: Tensor) -> None:
        state = replaced(x, values, given)
        after_step(step, state)
        x.copy_(replaced(state, x, given))  # what after_step has changed, except in given frames

    field = guided_field(velocity, guidance, noise, values, given)
    return replaced(solve(field, noise, grid, solver, watched if after_step else None), values, given)
