"""What a call of a pipeline returns, in the form that was asked for."""

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
    """What a call returns; also by index and as a tuple, like every output of diffusers.

    frames    in the asked output_type: np float32 [B, T, H, W, 3] in [0, 1]; pt the same as a tensor [B, T, 3, H, W]; pil a list
              of pictures for each clip; uint8 a list of arrays [T, H, W, 3]; latent the latents
    latents   what the network made: codes int64 [B, t, h, w] of Lumos-1
    seeds     the seed of each clip
    settings  all settings of the clips
    """

    frames: Any = None
    latents: Tensor | None = None
    seeds: list[int] | None = None
    settings: dict[str, Any] | None = None

    @property
    def codes(self) -> Tensor | None:
        """The latents under the name that they have for a generator of discrete codes."""
        return self.latents


def check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"output_type {shown(output_type)} is unknown; allowed: {', '.join(OUTPUT_TYPES)}")


def as_output_type(clips: list[np.ndarray], output_type: str) -> Any:
    """Clips uint8 [T, H, W, 3] of one size -> np, pil, pt or uint8 frames (see VideoPipelineOutput).

    The floats are value / 255 in float32, so that diffusers' export_to_video, which writes (frame * 255).astype(uint8), gives
    the clip back exactly.
    """
    if output_type == "uint8":
        return clips
    if output_type == "pil":
        return [[Image.fromarray(frame) for frame in clip] for clip in clips]
    frames = np.stack(clips).astype(np.float32) / 255
    return torch.from_numpy(frames).movedim(-1, 2).contiguous() if output_type == "pt" else frames
