"""Textures and random colours are pure functions of the seed and in range, and clips and pictures use them."""

from __future__ import annotations

import numpy as np
import pytest

from lumos.errors import UserError
from lumos.training.tokenizer import clips as clips_module
from lumos.training.tokenizer.clips import TrainingClips
from lumos.training.tokenizer.textures import SIDE, recoloured, spectral_noise, texture
from lumos.video.io import write_video


@pytest.mark.parametrize("seed", range(6))
def test_a_texture_is_a_function_of_the_seed(seed: int):
    first, again, other = (np.asarray(texture(np.random.default_rng(s))) for s in (seed, seed, seed + 100))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert (first.dtype, first.shape) == (np.uint8, (SIDE, SIDE, 3))
    assert first.std() > 5


def test_noise_has_low_frequencies_and_correlated_channels():
    for seed in range(5):
        noise = spectral_noise(np.random.default_rng(seed), 64)
        assert (noise.dtype, noise.shape) == (np.uint8, (64, 64, 3))
        power = np.abs(np.fft.rfft2(noise.astype(float).mean(axis=2))) ** 2
        assert power[1:4, 1:4].mean() > 20 * power[20:28, 20:28].mean()
        assert np.corrcoef(noise.reshape(-1, 3).T)[0, 1] > 0.2


def test_recolouring_changes_half_of_the_clips_in_all_frames():
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, None, :, None], (3, 2, 256, 3))
    made = [recoloured(ramp, np.random.default_rng(seed)) for seed in range(60)]
    assert all(np.array_equal(clip, recoloured(ramp, np.random.default_rng(seed))) for seed, clip in enumerate(made))
    changed = [clip for clip in made if not np.array_equal(clip, ramp)]
    assert 15 < len(changed) < 45
    for clip in changed:
        assert (clip.dtype, clip.shape) == (np.uint8, ramp.shape)
        assert (clip == clip[:1, :1]).all()
        assert (np.diff(clip[0, 0].astype(int), axis=0) >= 0).all()  # a brighter pixel stays the brighter one: nothing wraps
        assert (clip[0, 0, 0] == 0).all()
    colour = np.broadcast_to(np.array([200, 100, 50], np.uint8), (1, 1, 1, 3))
    order = {tuple(np.argsort(-recoloured(colour, np.random.default_rng(seed))[0, 0, 0].astype(int))) for seed in range(200)}
    assert len(order) > 1


def clips_of(**changes) -> TrainingClips:
    options = {
        "seed": 0, "height": 16, "width": 24, "num_frames": 5, "batch_size": 4, "pictures_per_batch": 4, "share_worlds": 0.0,
        "film_sources": [], "share_textures": 1.0,
    }  # fmt: skip
    return TrainingClips(**(options | changes))


@pytest.mark.parametrize("size", [(16, 24), (8 * SIDE // 5, 2 * SIDE)])
def test_batches_of_textures_move_and_need_no_photographs(monkeypatch, size: tuple[int, int]):
    monkeypatch.setattr(clips_module, "photographs", lambda **_: [])
    made = clips_of(height=size[0], width=size[1], batch_size=2, recolour=True)
    batch, again = made.batch(3), clips_of(height=size[0], width=size[1], batch_size=2, recolour=True).batch(3)
    assert batch.clips.shape == (2, 5, *size, 3)
    assert batch.pictures.shape == (4, 1, *size, 3)
    assert (batch.clips == again.clips).all()
    assert (batch.pictures == again.pictures).all()
    assert min((clip[0].float() - clip[-1].float()).abs().mean() for clip in batch.clips) > 0
    with pytest.raises(UserError, match=r"no photographs or films found: .* or set share_worlds=1 or share_textures=1"):
        clips_of(share_textures=0.5)


def test_films_and_textures_without_photographs(monkeypatch, tmp_path):
    """A picture is then a texture or a frame of a film."""
    monkeypatch.setattr(clips_module, "photographs", lambda **_: [])
    white = np.full((6, 48, 64, 3), 255, np.uint8)
    write_video(tmp_path / "white.mp4", white, fps=8)
    made = clips_of(share_textures=0.5, film_sources=[str(tmp_path)], pictures_per_batch=8)
    pictures = np.concatenate([made.batch(step).pictures.numpy() for step in range(5)])
    is_film = (pictures > 245).all(axis=(1, 2, 3, 4))
    assert 8 < is_film.sum() < 32
