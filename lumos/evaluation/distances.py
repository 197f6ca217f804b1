"""The Fréchet distance between the generated and the rendered clips of the same prompts (`lumos.pipeline.frechet`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lumos.errors import UserError
from lumos.pipeline.base import VideoPipeline
from lumos.pipeline.frechet import clip_features, frechet_distance
from lumos.video.frames import from_uint8


def distances(pipe: VideoPipeline, clips: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> dict[str, float]:
    """Return {"frechet", "frechet_shuffled"}: the distances of clips, and of rendered clips with shuffled frames, to rendered ones.

    clips, truth: uint8 [T, H, W, 3] each, two or more. The second distance says how much the features see of motion. UserError for
    a model whose video tokenizer has no codes.
    """
    random = np.random.default_rng(0)
    shuffled = [clip[random.permutation(len(clip))] for clip in truth]
    of_truth, *others = (torch.stack([features(pipe, clip) for clip in of]) for of in (truth, clips, shuffled))
    names = ("frechet", "frechet_shuffled")
    return {name: round(frechet_distance(of_truth, found), 4) for name, found in zip(names, others, strict=True)}


@torch.no_grad()
def features(pipe: VideoPipeline, clip: np.ndarray) -> Tensor:
    """Return `clip_features` of a clip, uint8 [T, H, W, 3], as the video tokenizer of a pipeline encodes it."""
    tokenizer = pipe.video_tokenizer
    if not hasattr(tokenizer, "values"):
        raise UserError("--frechet needs a model whose video tokenizer has codes; leave it out")
    parameter = next(tokenizer.parameters())
    with pipe.stage(tokenizer):
        codes = tokenizer.encode(from_uint8(clip)[None].to(pipe.device, parameter.dtype))
        return clip_features(tokenizer.values(codes)[0].cpu())
