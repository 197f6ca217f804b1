"""Small networks of each kind in which every part has an effect, and whole model folders of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from micro import micro_config
from micro_stiv import CAPTIONS, micro_pipeline

from lumos import LumosForVideoGeneration, LumosPipeline, StivForVideoGeneration
from lumos.models.lumos1.sequence import build_sequence
from lumos.models.lumos1.settings import GenerationSettings
from lumos.pipeline.defaults import ClipDefaults
from tokenizer import TextTokenizer, VideoTokenizer, VideoTokenizerConfig

DECODER = {
    "channels": 8, "channels_mult": (1, 2), "num_res_blocks": 1, "spatial_compression": 8, "temporal_compression": 4,
    "embedding_dim": 3, "levels": (4, 4, 4), "attn_resolutions": (128,),
}  # fmt: skip


def shaken(model: Any, scale: float) -> Any:
    """Return the model with noise on all weights: none is 0, and norms differ from layer to layer."""
    draws = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=draws))
    return model.eval()


def decoder(**overrides: Any) -> LumosForVideoGeneration:
    """A decoder of four layers."""
    torch.manual_seed(0)
    return shaken(LumosForVideoGeneration(micro_config(**{"num_hidden_layers": 4, **overrides})), 0.05)


def transformer(**overrides: Any) -> StivForVideoGeneration:
    """A transformer of STIV of four blocks."""
    return micro_pipeline(num_hidden_layers=4, **overrides).model


def tokenizer(**overrides: Any) -> VideoTokenizer:
    """A video tokenizer with attention at its second level."""
    torch.manual_seed(0)
    made = VideoTokenizer(VideoTokenizerConfig(**{**DECODER, **overrides}))
    return shaken(made, 0.02).requires_grad_(False)


def clip_ids(model: LumosForVideoGeneration) -> torch.Tensor:
    """Ids [2, L] of two clips of 2 x 2 x 3 codes with a prompt, some of them masked."""
    draws = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(2):
        codes = torch.randint(-1, 64, (2, 2, 3), generator=draws)
        rows.append(build_sequence([300, 301, 302], codes, fps=8, duration=1, config=model.config))
    return torch.stack(rows)


def velocity(model: StivForVideoGeneration, **more: Any) -> torch.Tensor:
    """The velocity of two clips of 4 frames of 4 x 6 latents with prompts; `more` are arguments of the network."""
    draws = torch.Generator().manual_seed(2)
    x, ids = torch.randn(2, 4, 3, 4, 6, generator=draws), torch.randint(0, 500, (2, 5), generator=draws)
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    with torch.no_grad():
        return model(x, torch.tensor([0.3, 0.8]), text_ids=ids, text_mask=mask, **more).sample


def codes(seed: int = 3, frames: int = 3) -> torch.Tensor:
    """Codes [1, frames, 2, 3] of the tokenizer."""
    return torch.randint(0, 64, (1, frames, 2, 3), generator=torch.Generator().manual_seed(seed))


def lumos_folder(folder: Path) -> Path:
    """A model folder of Lumos-1 with four layers: clips of 5 frames of 16 x 24 pixels."""
    text = TextTokenizer.train(CAPTIONS, 600, reserved_symbols=[f"<reserved{i:03d}>" for i in range(1, 255)])
    settings, clip = GenerationSettings(num_inference_steps=2, guidance_scale=2.0), ClipDefaults(5, 16, 24, 8, None)
    LumosPipeline(decoder(), text, tokenizer(), settings, clip).save_pretrained(folder)
    return folder


def stiv_folder(folder: Path) -> Path:
    """A model folder of STIV with four blocks: clips of 5 frames of 16 x 32 pixels."""
    micro_pipeline(num_hidden_layers=4).save_pretrained(folder)
    return folder
