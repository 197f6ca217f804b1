"""Training in bfloat16 on a CPU has the gradients of training in float32, up to rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenizer import VideoTokenizer, VideoTokenizerConfig
from tokenizer.layers import SPATIAL_KERNEL, TEMPORAL_KERNEL, CausalConv3d


def gradients(module: torch.nn.Module, x: Tensor, half: bool) -> dict[str, Tensor]:
    """Return the gradients of a weighted sum of the module's output for the input and the parameters."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        found = module(x)
    (found.float() * torch.linspace(-1, 1, found.numel()).view(found.shape)).sum().backward()
    return {"x": x.grad} | {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "shape"),
    [
        (128, SPATIAL_KERNEL, (1, 1, 1), (1, 1, 32, 32)),  # the weight's gradient of torch's 3-D convolution is NaN, with AMX
        (192, (1, 1, 1), (1, 1, 1), (1, 1, 32, 32)),  # this one's too
        (32, SPATIAL_KERNEL, (1, 2, 2), (2, 3, 17, 17)),
        (32, TEMPORAL_KERNEL, (1, 1, 1), (2, 3, 8, 8)),
    ],
)
def test_a_convolution_has_the_gradients_of_whole_precision(channels, kernel, stride, shape):
    torch.manual_seed(0)
    layer = CausalConv3d(channels, 128, kernel, stride)
    batch, frames, *size = shape
    x = torch.randn(batch, channels, frames, *size)
    half, whole = (gradients(layer, x, which) for which in (True, False))
    assert all(distance(half[name], whole[name]) < 0.02 for name in whole), {n: distance(half[n], whole[n]) for n in whole}


def test_a_picture_has_the_same_gradients_as_a_frame_of_a_batch():
    """Frames that are convolved as a batch of pictures keep their places."""
    torch.manual_seed(0)
    layer, x = CausalConv3d(4, 6, SPATIAL_KERNEL), torch.randn(2, 4, 3, 5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    assert half.shape == (2, 6, 3, 5, 7)
    assert distance(half.detach().float(), layer(x).detach()) < 0.01


def test_a_tokenizer_has_the_gradients_of_whole_precision():
    torch.manual_seed(0)
    config = VideoTokenizerConfig(
        channels=32, channels_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), resolution=32, embedding_dim=3, levels=(8, 8, 8)
    )
    model = VideoTokenizer(config).decoder.train()
    latent = torch.randn(1, 16, 2, 8, 8)
    half, whole = (gradients(model, latent, which) for which in (True, False))
    largest = max(g.norm() for g in whole.values())
    strong = [name for name, g in whole.items() if g.norm() > 1e-3 * largest]
    assert len(strong) > len(whole) / 2
    assert all(torch.cosine_similarity(half[n].flatten(), whole[n].flatten(), dim=0) > 0.99 for n in strong)
