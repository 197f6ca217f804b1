"""The output of a pipeline and its conversion to the output types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.utils import ModelOutput

from lumos.errors import UserError, shown

OUTPUT_TYPES = ("np", "pil", "pt", "uint8", "latent")


@dataclass
class VideoPipelineOutput(ModelOutput):
    """The output of a call. Its fields are also available by index and as a tuple, as in the outputs of diffusers.

    frames    the clips in the requested output_type:
              np      float32 array [B, T, H, W, 3] in [0, 1]
              pt      float32 tensor [B, T, 3, H, W] in [0, 1]
              pil     a list of PIL pictures for each clip
              uint8   a list of uint8 arrays [T, H, W, 3]
              latent  the latents
    latents   the output of the network, for Lumos-1 codes int64 [B, t, h, w]
    seeds     the seed of each clip
    settings  all settings of the clips
    kept_pixels  for each clip the pictures that take the place of decoded frames, by frame number; None
              if there are none
    """

    frames: Any = None
    latents: Tensor | None = None
    seeds: list[int] | None = None
    settings: dict[str, Any] | None = None
    kept_pixels: list[dict[int, np.ndarray]] | None = None

    @property
    def codes(self) -> Tensor | None:
        """The latents, which are codes for a generator of discrete codes."""
        return self.latents


def check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"output_type {shown(output_type)} is unknown; allowed: {', '.join(OUTPUT_TYPES)}")


def as_output_type(clips: list[np.ndarray], output_type: str) -> Any:
    """Convert clips uint8 [T, H, W, 3] of one size to np, pil, pt or uint8 frames (see VideoPipelineOutput).

    Floats are value / 255 in float32. So diffusers' export_to_video, which writes
    (frame * 255).astype(uint8), restores the clip exactly.
    """
    if output_type == "uint8":
        return clips
    if output_type == "pil":
        return [[Image.fromarray(frame) for frame in clip] for clip in clips]
    frames = np.stack(clips).astype(np.float32) / 255
    return torch.from_numpy(frames).movedim(-1, 2).contiguous() if output_type == "pt" else frames
