"""The FLOPs of a video tokenizer for one clip, counted on a network without values.

Counting takes up to a second of Python, so a process keeps each result.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from tokenizer.configuration import VideoTokenizerConfig
from tokenizer.video import VideoTokenizer


@lru_cache(maxsize=256)
def encoder_flops(config: VideoTokenizerConfig, frames: int, height: int, width: int) -> int:
    """Return the FLOPs that make the codes or latents of a clip of `frames` frames of `height` x `width` pixels."""
    with torch.device("meta"):
        model = VideoTokenizer(config)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model.quantize(model.encode_latent(torch.empty(1, config.in_channels, frames, height, width, device="meta")))
    return counted.get_total_flops()


@lru_cache(maxsize=256)
def decoder_flops(config: VideoTokenizerConfig, frames: int, height: int, width: int) -> int:
    """Return the FLOPs that decode such a clip."""
    with torch.device("meta"):
        model = VideoTokenizer(config)
    latent_frames = 1 + (frames - 1) // model.temporal_compression
    grid = (side // model.spatial_compression for side in (height, width))
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model.decode_latent(torch.empty(1, model.value_channels, latent_frames, *grid, device="meta"))
    return counted.get_total_flops()
