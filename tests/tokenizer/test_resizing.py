"""A tokenizer of twice the size has the same codes, the smaller one's pixels as means, and can be halved again."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.functional import avg_pool3d

from lumos.errors import UserError
from tokenizer.configuration import VideoTokenizerConfig
from tokenizer.resizing import double, halve, same_codes
from tokenizer.video import VideoTokenizer
from tokenizer.wavelet import spatial_patchify, spatial_unpatchify

CONFIG = VideoTokenizerConfig(
    channels=8, channels_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), resolution=32, z_channels=4, embedding_dim=2,
    levels=(5, 5), pointwise_ends=True, attention_window=2,
)  # fmt: skip


def means(video: torch.Tensor) -> torch.Tensor:
    return avg_pool3d(video, (1, 2, 2))


def trained_like(config: VideoTokenizerConfig = CONFIG) -> VideoTokenizer:
    torch.manual_seed(0)
    model = VideoTokenizer(config).eval().requires_grad_(False)
    model.quant_conv.conv3d.weight.mul_(20)  # else all codes are the middle one
    return model


def clip(frames: int = 9) -> torch.Tensor:
    return torch.rand(2, 3, frames, 64, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_spatial_patches_are_means_and_half_differences():
    video = clip()
    patches = spatial_patchify(video, 2)
    assert patches.shape == (2, 12, 9, 32, 16)
    left, right = video[..., ::2], video[..., 1::2]
    across = torch.cat([(left + right) / 2, (left - right) / 2], dim=1)
    up, down = across[..., ::2, :], across[..., 1::2, :]
    torch.testing.assert_close(patches, torch.cat([(up + down) / 2, (up - down) / 2], dim=1), rtol=0, atol=1e-6)
    torch.testing.assert_close(spatial_unpatchify(patches, 2), video, rtol=0, atol=1e-6)


def test_a_doubled_tokenizer_has_the_codes_of_the_means():
    small = trained_like()
    big = double(small)
    assert (big.spatial_compression, big.config.resolution, big.temporal_compression) == (16, 64, 4)
    codes = big.encode(clip())
    assert torch.equal(codes, small.encode(means(clip())))
    assert len(codes.unique()) > 5
    expected = small.decode(codes).repeat_interleave(2, 3).repeat_interleave(2, 4)
    torch.testing.assert_close(big.decode(codes), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_halving_keeps_the_means_of_what_a_trained_one_draws():
    big = double(trained_like())
    torch.manual_seed(2)
    big.decoder.conv_out.conv3d.weight.add_(0.1 * torch.randn_like(big.decoder.conv_out.conv3d.weight))
    big.decoder.conv_out.conv3d.bias.add_(0.1 * torch.randn_like(big.decoder.conv_out.conv3d.bias))
    codes = big.encode(clip())
    drawn, small = big.decode(codes), halve(big)
    assert small.config == CONFIG
    torch.testing.assert_close(small.decode(codes), means(drawn), rtol=0, atol=1e-5)
    assert (drawn - means(drawn).repeat_interleave(2, 3).repeat_interleave(2, 4)).abs().max() > 0.1  # it has details


def test_streams_of_a_doubled_tokenizer_are_the_whole_clip():
    big = double(trained_like())
    video = clip(17)
    codes = big.encode(video)
    assert torch.equal(torch.cat(list(big.encode_stream(video.split(5, dim=2))), dim=1), codes)
    torch.testing.assert_close(torch.cat(list(big.decode_stream([codes])), dim=2), big.decode(codes), rtol=0, atol=1e-5)


def test_folders_of_doubled_tokenizers(tmp_path):
    big = double(trained_like())
    big.save_pretrained(tmp_path)
    again = VideoTokenizer.from_pretrained(tmp_path)
    assert again.config == big.config
    assert "spatial_patch_size" not in CONFIG.to_dict()
    assert torch.equal(again.decode(big.encode(clip())), big.decode(big.encode(clip())))


def test_same_codes_sees_the_encoder_only():
    small = trained_like()
    big = double(small)
    big.decoder.conv_out.conv3d.weight.add_(1.0)
    assert same_codes(small, big)
    assert same_codes(big, small)
    assert same_codes(big, big)
    assert same_codes(small, double(trained_like()).half().float())
    assert same_codes(small, double(trained_like()).bfloat16().float())
    almost = trained_like()
    for weight in almost.encoder.parameters():
        weight.mul_(1.006)
    assert not same_codes(small, almost)
    for change in (big.encoder.conv_in.conv3d.bias[:1], big.encoder.conv_in.conv3d.weight[:, 3:6], big.quant_conv.conv3d.bias):
        before = change.clone()
        change.add_(0.01)
        assert not same_codes(small, big)
        change.copy_(before)


@pytest.mark.parametrize(("field", "value"), [("pointwise_ends", False), ("patch_method", "rearrange")])
def test_what_cannot_be_resized_is_told(field, value):
    model = trained_like(dataclasses.replace(CONFIG, **{field: value}))
    with pytest.raises(UserError, match=field):
        double(model)
    with pytest.raises(UserError, match="half its size: its spatial_patch_size is 1"):
        halve(model)


@pytest.mark.parametrize("size", [4, 2.0, True])
def test_spatial_patches_are_one_or_two(size):
    with pytest.raises(UserError, match="1 or 2"):
        dataclasses.replace(CONFIG, spatial_patch_size=size)
