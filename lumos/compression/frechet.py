"""The Fréchet distance between clips that a network and a smaller one generate from the same prompts and noise.

The published measure is arXiv 2411.18375's; `lumos.pipeline.frechet` says what the features are. The distance ranks units of one
network on the same clips.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lumos.errors import UserError
from lumos.pipeline.base import VideoPipeline
from lumos.pipeline.frechet import clip_features, frechet_distance


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
