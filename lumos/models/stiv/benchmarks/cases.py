"""The transformers of the benchmark, with random weights and inputs, and diffusers' transformer of the same width and depth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lumos.models.stiv import fused
from lumos.models.stiv.configuration import HEAD_DIM, StivConfig
from lumos.models.stiv.flow import drawn_noise
from lumos.models.stiv.modeling import StivForVideoGeneration
from lumos.models.stiv.text_encoder import TextStates


@dataclass(frozen=True)
class Size:
    """A transformer and the clip that it makes or learns.

    channels, layers, width   of the transformer; the text has the same width
    latents                   frames, rows and columns
    text                      tokens of the prompt
    clips                     clips of a training step
    """

    channels: int
    layers: int
    width: int
    latents: tuple[int, int, int]
    text: int
    clips: int = 1

    def config(self) -> StivConfig:
        return StivConfig(
            latent_channels=self.channels, num_hidden_layers=self.layers, hidden_size=self.width, text_width=self.width,
            text_encoder="folder",  # text states are an input: a clip encodes its prompt once, not in each step
        )  # fmt: skip


SIZES = {
    "tiny": Size(5, 8, 192, (17, 8, 8), 16, clips=8),  # checkpoints/stiv-tiny
    "large": Size(8, 12, 512, (16, 32, 32), 32),
    "micro": Size(3, 3, 64, (4, 6, 6), 5, clips=2),
}


@dataclass(frozen=True)
class StivCase:
    """A transformer and one batch of clips.

    noise   float32 [B, T, C, h, w]
    full    the encoded prompts, m tokens each
    empty   the encoded empty prompts, padded to m tokens
    """

    model: StivForVideoGeneration
    noise: Tensor
    full: TextStates
    empty: TextStates


def make_case(size: str, device: str, dtype: str, clips: int = 1) -> StivCase:
    """Return the case of a size in SIZES. No weight is 0, so that every part has an effect on the result."""
    of, draws = SIZES[size], torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = StivForVideoGeneration(of.config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    frames, *grid = of.latents
    noise = drawn_noise([draws] * clips, frames, of.channels, *grid)

    def text(tokens: int) -> TextStates:
        states = torch.randn(clips, of.text, of.width, generator=draws)
        mask = (torch.arange(of.text) < tokens).expand(clips, -1)
        return TextStates(*(part.to(device) for part in (states, mask, states[:, tokens - 1])))

    return StivCase(model.to(device, getattr(torch, dtype)).eval(), noise.to(device), text(of.text), text(1))


@contextmanager
def plain_operators() -> Iterator[None]:
    """Use the plain forms of the operators of `lumos.models.stiv.fused` for the block."""
    before = set(fused.DEVICES)
    fused.DEVICES.clear()
    try:
        yield
    finally:
        fused.DEVICES.update(before)


def latte_of(size: str, device: str, dtype: str) -> nn.Module:
    """Return diffusers' LatteTransformer3DModel of a size in SIZES, as Latte configures it, with random weights.

    Each of its layers is a block of spatial attention, cross-attention and an MLP, and one of temporal attention and an MLP.
    """
    from diffusers import LatteTransformer3DModel

    of = SIZES[size]
    frames, rows, columns = of.latents
    torch.manual_seed(0)
    model = LatteTransformer3DModel(
        num_attention_heads=of.width // HEAD_DIM, attention_head_dim=HEAD_DIM, in_channels=of.channels, out_channels=of.channels,
        num_layers=of.layers, cross_attention_dim=of.width, attention_bias=True, sample_size=max(rows, columns), patch_size=2,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False,
        norm_eps=1e-6, caption_channels=of.width, video_length=frames,
    )  # fmt: skip
    return nn.Module.to(model, device, getattr(torch, dtype)).eval()  # its own `to` warns of any dtype


