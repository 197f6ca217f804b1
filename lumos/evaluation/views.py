"""Measurement of generated views of solids: PSNR and SSIM against the true views, beside those of copying the input view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lumos.data.synthetic.drawing import render
from lumos.data.synthetic.sampling import SyntheticScenes
from lumos.data.synthetic.scene import NUM_VIEWS, Solid
from lumos.errors import UserError, instead, shown
from lumos.evaluation.quality import MAX_PSNR, ssim
from lumos.runtime import check_memory
from lumos.video.frames import psnr

SOLID_KINDS: dict[str, dict[str, Any]] = {
    "solids": {"kinds": ("solids",)},
    "held_out_solids": {"kinds": ("solids",), "split": "held_out"},
}
"""The settings of the synthetic scenes of each kind of solids.

solids           solids in combinations of shape and colour that training shows
held_out_solids  solids in combinations that training never shows
"""


def check_solid_kinds(kinds: Sequence[str]) -> None:
    """Raise UserError for a kind that is unknown or named twice."""
    for kind in kinds:
        if kind not in SOLID_KINDS:
            raise UserError(f"kind of solids {shown(kind)} is unknown{instead(kind, SOLID_KINDS)}")
        if list(kinds).count(kind) > 1:
            raise UserError(f"kind {shown(kind)} is named twice; name it once")


def solid_set(kind: str, count: int, seed: int, **shape: int) -> list[tuple[str, np.ndarray, Solid]]:
    """Return (empty caption, true views uint8 [T, H, W, 3], solid) of `count` solids.

    seed: must differ from the seed of training, so that the solids are new. shape: num_frames,
    height, width and fps; num_frames is the number of views, all by default. UserError for an unknown
    kind, and if the views do not fit into memory.
    """
    check_solid_kinds([kind])
    source = SyntheticScenes(seed=seed, **{"num_frames": NUM_VIEWS} | shape, **SOLID_KINDS[kind])
    pixels = source.num_frames * source.height * source.width
    check_memory(3 * count * pixels, f"{count:,} times {source.num_frames} views of {source.width}x{source.height} pixels")
    scenes = [source.scene(index) for index in range(count)]
    return [(scene.caption, render(scene), scene.objects[0]) for scene in scenes]


def view_quality(generated: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> dict[str, dict[str, float]]:
    """Return the quality of generated views of solids, in the form {"generated", "copy"} x {"psnr", "ssim"}.

    generated, truth: the views of each solid, uint8 [T, H, W, 3], the input view first. The input view
    is given and does not count. "copy" is the quality of the true input view in the place of all other
    views, which a model must exceed. PSNR is in dB. The PSNR of a solid is that of all values of its
    views, its SSIM is the mean over views, and the result is the mean over solids. ValueError if there
    are no views, or if generated and true views differ in number or size.
    """
    if not truth or len(generated) != len(truth):
        raise ValueError(f"{len(generated)} generated solids for {len(truth)} true ones: give equally many, 1 or more")
    for ours, theirs in zip(generated, truth, strict=True):
        if ours.shape != theirs.shape or len(theirs) < 2:
            raise ValueError(f"views {ours.shape} for true views {theirs.shape}: give equal shapes with 2 views or more")
        if ours.dtype != np.uint8 or theirs.dtype != np.uint8:
            raise ValueError(f"views must be uint8, got {ours.dtype} and {theirs.dtype}")
    copies = [np.broadcast_to(views[0], views.shape) for views in truth]
    return {name: _quality(views, truth) for name, views in (("generated", generated), ("copy", copies))}


def _quality(views: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> dict[str, float]:
    pairs = [(ours[1:], theirs[1:]) for ours, theirs in zip(views, truth, strict=True)]
    return {
        "psnr": round(float(np.mean([min(psnr(*pair), MAX_PSNR) for pair in pairs])), 3),
        "ssim": round(float(np.mean([ssim(*pair) for pair in pairs])), 5),
    }
