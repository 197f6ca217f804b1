"""Losses that compare a pruned model (student) with the model it was made from (teacher).

Features are [B, T, n, C]: B clips, T frames, n places of a frame, C channels. The teacher is detached in
every loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lumos.errors import UserError, shown

EPS = 1e-6
"""The least squared norm of a frame of the teacher by which a squared error is divided."""


def icd(student: Sequence[Tensor], teacher: Sequence[Tensor], k: float = 2.0, raw: bool = False) -> Tensor:
    """Return the content loss (individual content distillation, arXiv 2411.18375) of matching features.

    By default the error is relative, frame by frame, and leaves out values that lie more than `k` standard
    deviations from zero, because a few large values of a transformer otherwise make the loss diverge
    (arXiv 2412.01199, table 5). For the features s and h of one layer:

        w = 1 where |h| <= k std(h) and |s| <= k std(s), else 0       std over places and channels
        e[b, t] = sum w (s - h)^2 / max(sum w h^2, EPS)

    The result is the mean over layers of the mean of e over clips and frames.

    Args:
        student: features of the student's layers, each [B, T, n, C].
        teacher: features of the layers that these came from, with the same shapes.
        k: standard deviations from zero up to which a value counts; `math.inf` counts every value.
        raw: return the published form, the mean of (s - h)^2, summed over layers; `k` has no effect then.

    Raises UserError for no layers, different numbers of layers, other shapes and `k` <= 0.
    """
    if not student or len(student) != len(teacher):
        raise UserError(f"icd compares layers in pairs, at least one; given {len(student)} of the student and "
                        f"{len(teacher)} of the teacher")  # fmt: skip
    if not k > 0:
        raise UserError(f"k {shown(k)} is not allowed; give standard deviations above 0, or inf for all values")
    for s, h in zip(student, teacher, strict=True):
        if s.shape != h.shape or s.ndim != 4:
            raise UserError(f"icd compares features [B, T, n, C]; given {list(s.shape)} and {list(h.shape)}")
    errors = torch.stack([errors_by_frame(s, h, k, raw).mean() for s, h in zip(student, teacher, strict=True)])
    return errors.sum() if raw else errors.mean()


def icd_by_clip(student: Sequence[Tensor], teacher: Sequence[Tensor], k: float = 2.0, raw: bool = False) -> Tensor:
    """Return the content loss of each clip, float32 [B]; the arguments are those of `icd`, which is the mean of it."""
    errors = torch.stack([errors_by_frame(s, h, k, raw).mean(1) for s, h in zip(student, teacher, strict=True)])
    return errors.sum(0) if raw else errors.mean(0)


def errors_by_frame(s: Tensor, h: Tensor, k: float, raw: bool) -> Tensor:
    """Return e of one layer as `icd` defines it, float32 [B, T]; the mean squared error if it is `raw`."""
    return _FrameErrors.apply(s.flatten(2).float(), h.detach().flatten(2).float(), math.inf if raw else k, raw)


class _FrameErrors(torch.autograd.Function):
    """e of features [B, T, n], which saves only the differences that count: autograd would save five tensors of this size."""

    @staticmethod
    def forward(ctx, s: Tensor, h: Tensor, k: float, raw: bool) -> Tensor:
        difference = s - h
        if math.isfinite(k):
            outside = (h.abs() > _reach(h, k)).logical_or_(s.abs() > _reach(s, k))
            difference.masked_fill_(outside, 0.0)
            h = h.masked_fill(outside, 0.0)
        norm = torch.full_like(h[..., 0], h.shape[-1]) if raw else h.square().sum(-1).clamp(min=EPS)
        ctx.save_for_backward(difference, norm)
        return difference.square().sum(-1) / norm

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        difference, norm = ctx.saved_tensors
        return difference * (2 * grad / norm)[..., None], None, None, None


def _reach(x: Tensor, k: float) -> Tensor:
    """Return k standard deviations (population) of each frame of x [B, T, n], [B, T, 1]."""
    return k * (x - x.mean(-1, keepdim=True)).square_().mean(-1, keepdim=True).sqrt_()


def velocity_kd(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error between two predictions of one shape: velocity, noise or pixels."""
    if student.shape != teacher.shape:
        raise UserError(f"output distillation compares predictions of one shape; given {list(student.shape)} and "
                        f"{list(teacher.shape)}")  # fmt: skip
    return (student.float() - teacher.detach().float()).square().mean()


def logits_kd(student: Tensor, teacher: Tensor, places: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Return the mean over places of KL(teacher || student), times temperature^2.

    The factor keeps the size of gradients independent of the temperature (arXiv 1503.02531, section 2).

    Args:
        student: logits [..., V] over the ids that count, for example the visual ids only.
        teacher: logits of the same shape.
        places: bool [...]: the places that count, for example the masked ones. None: all. The result is 0
            if no place counts.
        temperature: both logits are divided by it.

    Raises UserError for other shapes and for a temperature that is not above 0.
    """
    if student.shape != teacher.shape or (places is not None and places.shape != student.shape[:-1]):
        given = [list(x.shape) for x in (student, teacher, places) if x is not None]
        raise UserError(f"logits_kd compares logits [..., V] of one shape, at places [...]; given {given}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise UserError(f"temperature {shown(temperature)} is not allowed; give a number above 0")
    if places is not None:
        student, teacher = student[places], teacher[places]
    if student.numel() == 0:
        return student.float().sum()
    q = torch.log_softmax(student.float() / temperature, -1)
    p = torch.log_softmax(teacher.detach().float() / temperature, -1)
    return (p.exp() * (p - q)).sum(-1).mean() * temperature**2


def motion_by_clip(student: Sequence[Tensor], teacher: Sequence[Tensor], k: float = 2.0) -> Tensor:
    """Return the relative error of the change from each frame to the next, a motion loss of each clip, float32 [B].

    It is `icd_by_clip` of s[t + 1] - s[t] and h[t + 1] - h[t]. It is 0, with a gradient of 0, for clips of one frame.
    """
    if student[0].shape[1] == 1:
        return torch.stack([s.float().sum((1, 2, 3)) for s in student]).sum(0) * 0.0
    return icd_by_clip([s.float().diff(dim=1) for s in student], [h.float().diff(dim=1) for h in teacher], k)
