"""The output of a pipeline and its conversion to the output types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.utils import ModelOutput

from lumos.errors import UserError, instead, shown
from lumos.video.animation import data_url
from lumos.video.frames import as_uint8
from lumos.video.io import write_video

SHOWN_CLIPS = 8
"""The most clips that a notebook shows."""
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


    def clips(self) -> list[np.ndarray]:
        """Return the clips as uint8 [T, H, W, 3] each. UserError for latents, which are no pixels."""
        if self.frames is None or self.frames is self.latents:
            raise UserError("the output holds latents; call the pipeline with another output_type, or decode them with pipe.decode")
        return [as_uint8(clip) for clip in self.frames]

    def save(self, path: str | Path, fps: float | None = None) -> list[Path]:
        """Write the clips and return the files: `path`, or for several clips NAME-0, NAME-1, ... with its suffix.

        The suffix is .mp4, .gif, .webp or .png. fps: default the frame rate of the clips.
        """
        clips, path = self.clips(), Path(path)
        if not path.name:
            raise UserError(f"{shown(str(path))} is no name of a file; give one that ends in .mp4, .gif, .webp or .png")
        rate = (self.settings or {}).get("fps", 1) if fps is None else fps
        names = [path] if len(clips) == 1 else [path.with_name(f"{path.stem}-{n}{path.suffix}") for n in range(len(clips))]
        return [write_video(name, clip, rate) for name, clip in zip(names, clips, strict=True)]

    def _repr_html_(self) -> str:
        """Return the clips as animated pictures, which Jupyter shows; at most SHOWN_CLIPS of them."""
        try:
            clips = self.clips()
        except UserError:
            return f"<pre>{escape(repr(self))}</pre>"
        rate, seeds = (self.settings or {}).get("fps", 1), self.seeds or range(len(clips))
        shown_clips = "".join(
            f'<figure style="display:inline-block;margin:4px"><img alt="clip" src="{data_url(clip, rate)}">'
            f"<figcaption>seed {seed}</figcaption></figure>"
            for seed, clip in list(zip(seeds, clips, strict=True))[:SHOWN_CLIPS]
        )
        more = f"<p>and {len(clips) - SHOWN_CLIPS} more</p>" if len(clips) > SHOWN_CLIPS else ""
        return shown_clips + more


def check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"output_type {shown(output_type)} is unknown{instead(output_type, OUTPUT_TYPES)}")


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


def with_pixels(decode: Callable[[Tensor], np.ndarray], pictures: Mapping[int, np.ndarray]) -> Callable[[Tensor], np.ndarray]:
    """Return the function of `VideoPipeline.decoder` with pictures, by frame number, in place of decoded frames."""
    done = 0

    def push(latents: Tensor) -> np.ndarray:
        nonlocal done
        frames, begin = decode(latents), done
        done += len(frames)
        for number, picture in pictures.items():
            if begin <= number < done:
                frames[number - begin] = picture
        return frames

    return push if pictures else decode
