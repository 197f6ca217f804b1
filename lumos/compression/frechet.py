"""The Fréchet distance between clips that a network and a smaller one generate from the same prompts and noise.

The published measure (arXiv 2411.18375) compares features of a large video classifier, which is not part of this project. The
features here are named FEATURES: the latents of the clip in the space of the model's own video tokenizer, averaged over
2 x 2 areas of a frame; their mean over time, and the mean size of their change from frame to frame. The distance for a few
clips is biased; it ranks units of one network on the same clips, and is no FVD.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lumos.errors import UserError
from lumos.pipeline.base import VideoPipeline

FEATURES = "latents of the video tokenizer over 2 x 2 areas: mean over time, mean size of changes"
AREAS = 2


def clip_features(latents: Tensor) -> Tensor:
    """Return the features of a clip, float64 [2 C AREAS^2], from its latents [C, t, h, w]."""
    pooled = F.adaptive_avg_pool2d(latents.double().transpose(0, 1), AREAS).flatten(1)  # t, C AREAS^2
    change = pooled.diff(dim=0).abs().mean(0) if len(pooled) > 1 else torch.zeros_like(pooled[0])
    return torch.cat([pooled.mean(0), change])


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) for features [N, D] of N >= 2 clips each (Dowson and Landau 1982).

    m and S are means and sample covariances.
    """
    a, b = a.double(), b.double()
    covariances = [torch.atleast_2d(torch.cov(x.T)) for x in (a, b)]
    root = _root(covariances[0])
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    total = a.var(0).sum() + b.var(0).sum() - 2 * cross
    return float((a.mean(0) - b.mean(0)).square().sum() + total.clamp(min=0))


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet_scores(
    pipe: VideoPipeline, units: Sequence[str], prompts: Sequence[str], on_clip: Callable[[], object] = lambda: None,
    *, removed: Sequence[str] = (), seed: int = 0, **options: Any,
) -> dict[str, float]:  # fmt: skip
    """Return {unit: the distance between the clips of the network and those of the network without the unit}.

    The network is the one without the units `removed`.

    Args:
        pipe: a pipeline whose network is `Prunable`.
        units: names of units that can be removed.
        prompts: of at least two clips.
        on_clip: called after each clip.
        removed: further units that are left out.
        seed: of the first clip; each further clip adds 1.
        options: sampling options of the pipeline, such as num_inference_steps.

    Raises UserError for fewer than two prompts and for units that cannot be removed.
    """
    if len(prompts) < 2:
        raise UserError(f"the measure frechet needs at least 2 clips, not {len(prompts)}; give a larger --frechet-clips")
    whole, features = pipe.model, []
    try:
        for one in ([], *([name] for name in units)):
            pipe.model = whole.without([*removed, *one]) if removed or one else whole
            clips = []
            for i, prompt in enumerate(prompts):
                latents = pipe(prompt, seed=seed + i, output_type="latent", **options).frames[0]
                clips.append(clip_features(in_values(pipe, latents)))
                on_clip()
            features.append(torch.stack(clips))
    finally:
        pipe.model = whole
    return {name: frechet_distance(features[0], found) for name, found in zip(units, features[1:], strict=True)}


def in_values(pipe: VideoPipeline, latents: Tensor) -> Tensor:
    """Return the latents of a clip as [C, t, h, w]: the values of codes [t, h, w], or latents [t, C, h, w]."""
    if latents.is_floating_point():
        return latents.cpu().transpose(0, 1)
    return pipe.video_tokenizer.values(latents[None])[0].cpu()
