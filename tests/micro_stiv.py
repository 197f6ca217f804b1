"""The smallest STIV pipeline that has every part."""

from __future__ import annotations

from typing import Any

import torch

from lumos import StivConfig, StivForVideoGeneration, StivPipeline
from lumos.models.stiv.configuration import PATTERNS
from lumos.models.stiv.latents import LatentSpace
from lumos.models.stiv.settings import StivOptions
from lumos.pipeline.defaults import ClipDefaults
from tokenizer import TextTokenizer, VideoTokenizer, VideoTokenizerConfig

CAPTIONS = ["a red circle moves left on a gray background", "a small blue square grows", "the digit 7 moves up"]


def micro_config(**overrides: Any) -> StivConfig:
    sizes = {
        "latent_channels": 3, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 1, "text_width": 64,
        "text_layers": 1, "text_vocab_size": 600, "max_prompt_tokens": 64, "patterns": list(PATTERNS),
        "trained_grid": {"time": 5, "rows": 1, "columns": 2},
    }  # fmt: skip
    return StivConfig.preset("nano", **{**sizes, **overrides})


def micro_pipeline(**overrides: Any) -> StivPipeline:
    """A pipeline of random weights; `overrides` change its config."""
    config = micro_config(**overrides)
    torch.manual_seed(0)
    video = VideoTokenizer(VideoTokenizerConfig(
        channels=8, channels_mult=(1, 2), num_res_blocks=1, spatial_compression=8, temporal_compression=4, embedding_dim=3,
        levels=(4, 4, 4),
    ))  # fmt: skip
    text = TextTokenizer.train(CAPTIONS, 600)
    model = StivForVideoGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():  # a new model has the velocity 0
            parameter.add_(0.1 * torch.randn_like(parameter))
    space = LatentSpace(video, config.latents, config.latent_mean, config.latent_std)
    return StivPipeline(
        model, text, space, StivOptions(num_inference_steps=2, guidance_scale=2.0), ClipDefaults(5, 16, 32, 8, None)
    )
