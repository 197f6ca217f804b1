"""Recovers a pruned U-Net or transformer of diffusers with the user's own data and training loop.

A step calls both models with the same input and compares their features and predictions:

    student, teacher = load("FOLDER2"), load("FOLDER").requires_grad_(False).eval()
    pairs = taps("FOLDER2")
    for batch in loader:
        found = compare(student, teacher, pairs, batch.inputs, num_frames=14)
        loss = task_loss(found.prediction, batch.target) + found.kd + 0.1 * found.icd
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lumos.compression.features import chosen_layers, tapped
from lumos.compression.losses import icd as icd_loss
from lumos.compression.losses import velocity_kd
from lumos.compression.record import RECORD, read_record
from lumos.errors import RunError, UserError, shown

Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Comparison:
    """The student's prediction, and the losses that were asked for; the others are None. `target` is the teacher's prediction.

    The motion loss follows from the predictions, see `lumos.compression.motion.MotionCritic`.
    """

    prediction: Tensor
    kd: Tensor | None
    icd: Tensor | None
    target: Tensor | None = None


def taps(folder: str | Path, layers: str | int = "all") -> list[tuple[str, str]]:
    """Return the pairs of modules (student, teacher) whose outputs match, from the compression.json of a pruned model.

    For a U-Net these are its down and up blocks; where the deepest stage was removed, the last attention of
    the last down block stands for that block. For a transformer they are its blocks.

    Args:
        folder: folder of the pruned model.
        layers: "all"; "last"; or n for every n-th, so that the last one is among them.
    """
    pairs = read_record(folder).get("taps")
    if not pairs or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise RunError(f"{Path(folder) / RECORD} is missing or names no modules to compare; prune the model again")
    return [tuple(pairs[i]) for i in chosen_layers(len(pairs), layers)]


def features(model: nn.Module, names: Iterable[str], num_frames: int) -> AbstractContextManager[dict[str, Tensor]]:
    """Return a context manager that gives a dictionary, which each forward pass of a model within the block fills.

    It has the outputs of some of the model's modules by their names.
    A value is [B, T, n, C]: clips, frames, places of a frame, channels. Of a block with several outputs it
    is the one of the visual places.

    Args:
        model: U-Net or transformer of diffusers.
        names: names of modules, as in `model.get_submodule`.
        num_frames: T, the number of latent frames; for a transformer with temporal patches, of patches.
    """
    return tapped(
        {name: model.get_submodule(name) for name in names},
        lambda output: by_frame(output[0] if isinstance(output, tuple) else output, num_frames),
    )


def by_frame(output: Tensor, num_frames: int) -> Tensor:
    """Return the output of a block as [B, T, n, C].

    A U-Net's block gives [B T, C, h, w], a transformer's [B, T n, C]. Raises UserError if T does not divide it.
    """
    is_map = output.ndim == 4
    count = output.shape[0 if is_map else 1]
    if num_frames < 1 or count % num_frames:
        what = "frames" if is_map else "places of a clip"
        raise UserError(f"num_frames {shown(num_frames)} does not divide the {count} {what} of a block's output")
    if is_map:
        return output.flatten(2).transpose(1, 2).unflatten(0, (-1, num_frames))
    return output.unflatten(1, (num_frames, -1))


def compare(
    student: nn.Module,
    teacher: nn.Module,
    pairs: Pairs,
    inputs: Mapping[str, Any],
    num_frames: int,
    *,
    kd: bool = True,
    icd: bool = True,
    raw: bool | None = None,
    k: float = 2.0,
) -> Comparison:
    """Call a student and its teacher with the same input and return the student's prediction and their distances.

    Without `kd` and `icd` the teacher is not called. It gets no gradient.

    Args:
        student: the pruned model.
        teacher: the model that it was made from, in eval mode.
        pairs: the modules to compare, from `taps`.
        inputs: keyword arguments of both models: noisy latents, time, conditions.
        num_frames: the number of latent frames, see `features`.
        kd: compute `losses.velocity_kd` of the predictions.
        icd: compute `losses.icd` of the features.
        raw: use the published form of `losses.icd`. None: for U-Nets, not for transformers.
        k: see `losses.icd`.

    Raises UserError if the teacher is the student.
    """
    if student is teacher:
        raise UserError("the teacher is the student itself; load the model that it was pruned from")
    names = [[pair[side] for pair in pairs] if icd else [] for side in (0, 1)]
    with features(student, names[0], num_frames) as own:
        prediction = student(**inputs, return_dict=False)[0]
    if not (kd or icd):
        return Comparison(prediction, None, None)
    with features(teacher, names[1], num_frames) as theirs, torch.no_grad():
        target = teacher(**inputs, return_dict=False)[0]
    raw = hasattr(student, "up_blocks") if raw is None else raw
    return Comparison(
        prediction,
        velocity_kd(prediction, target) if kd else None,
        icd_loss([own[name] for name in names[0]], [theirs[name] for name in names[1]], k, raw) if icd else None,
        target,
    )
