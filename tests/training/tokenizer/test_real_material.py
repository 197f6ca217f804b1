"""Photographs, film frames and their augmentation are those of the settings; test material stays out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lumos.errors import UserError
from lumos.training.tokenizer.clips import TrainingClips, films, held_out_films, photographs, turned
from lumos.video.io import write_video

FRAMES = np.random.default_rng(0).integers(0, 255, (9, 40, 48, 3), np.uint8)


def clips_of(**changes) -> TrainingClips:
    options = {
        "seed": 0, "height": 16, "width": 16, "num_frames": 5, "batch_size": 4, "pictures_per_batch": 4, "share_worlds": 0.0,
        "film_sources": [],
    }  # fmt: skip
    return TrainingClips(**(options | changes))


@pytest.fixture
def no_packages(monkeypatch):
    """The packages have no photographs."""
    monkeypatch.setattr("lumos.training.tokenizer.clips.PHOTOGRAPHS", {})


def picture(path, color, size=(40, 30)) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, color).save(path)


def test_a_folder_of_photographs_is_added(tmp_path, no_packages):
    picture(tmp_path / "more" / "red.png", "red")
    picture(tmp_path / "blue.jpg", "blue")
    picture(tmp_path / "coffee.png", "white")  # the name of a test photograph
    (tmp_path / "notes.txt").write_text("no picture")
    assert [path.name for path in photographs(sources=[str(tmp_path)])] == ["blue.jpg", "red.png"]
    clips = clips_of(photograph_sources=[str(tmp_path)])
    assert clips.real_names == ["blue.jpg", "red.png"]
    colors = {tuple(frames[0, 0, 0].tolist()) for step in range(4) for frames in clips.batch(step).pictures}
    assert len(colors) == 2
    with pytest.raises(UserError, match="photographs 'nowhere' do not exist: give a picture file or a folder"):
        photographs(sources=["nowhere"])


def test_real_files_are_known_by_their_content(tmp_path, no_packages, caplog):
    write_video(tmp_path / "film.mp4", FRAMES, fps=8)
    (tmp_path / "film.mp4").rename(tmp_path / "film.jpg")
    picture(tmp_path / "red.png", "red")
    (tmp_path / "red.png").rename(tmp_path / "red.gif")
    (tmp_path / "._red.png").write_bytes(b"of macOS")
    (tmp_path / "old.psd").write_bytes(b"8BPS")
    assert [path.name for path in photographs(sources=[str(tmp_path)])] == ["red.gif"]
    assert [path.name for path in films([str(tmp_path)])] == ["film.jpg"]
    assert "note: 1 files in" in caplog.text
    assert "old.psd" in caplog.text


def test_photographs_have_at_most_the_set_side(tmp_path, no_packages):
    picture(tmp_path / "large.png", "red", (100, 50))
    sides = [clips_of(photograph_sources=[str(tmp_path)], photograph_side=side).photographs[0].size for side in (20, 320)]
    assert sides == [(40, 20), (100, 50)]


def test_films_have_the_set_side(tmp_path):
    write_video(tmp_path / "street.mp4", FRAMES, fps=8)
    assert clips_of(film_sources=[str(tmp_path)], film_side=80).films[0].shape == (9, 80, 96, 3)


def test_film_frames_are_pictures_if_asked(tmp_path, no_packages):
    picture(tmp_path / "red.png", "red")
    write_video(tmp_path / "street.mp4", FRAMES, fps=8)
    found = {}
    for share in (0.0, 0.5, 1.0):
        clips = clips_of(film_sources=[str(tmp_path)], photograph_sources=[str(tmp_path)], share_stills=share)
        pictures = torch.cat([clips.batch(step).pictures for step in range(5)])
        found[share] = int((pictures.float().std(dim=(1, 2, 3)) > 1).any(dim=1).sum())  # the photograph has one color
    assert found[0.0] == 0
    assert 3 <= found[0.5] <= 17
    assert found[1.0] == 20


def test_a_clip_is_turned_to_each_position_of_a_square():
    clip, rng = np.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3), np.random.default_rng(0)
    found = {turned(clip, rng).tobytes() for _ in range(100)}
    assert len(found) == 8
    assert all(np.array_equal(np.sort(np.frombuffer(f, clip.dtype)), np.arange(clip.size)) for f in found)
    assert len({turned(clip[:, :2], rng).tobytes() for _ in range(50)}) == 4


def test_a_glide_of_zero_stands_still(no_packages):
    moves = {}
    for glide in (0.0, 0.1, 0.4):
        clips = clips_of(share_textures=1.0, glide=glide, batch_size=8, pictures_per_batch=0)
        batch = clips.batch(0).clips.float()
        moves[glide] = float((batch[:, 0] - batch[:, -1]).abs().mean())
    assert moves[0.1] < moves[0.4]
    first = clips_of(share_textures=1.0, glide=0.0)
    clip = first._glide(np.random.default_rng(0), Image.fromarray(FRAMES[0]))
    assert (clip == clip[0]).all()


def test_processes_share_a_step_of_all_kinds(tmp_path):
    write_video(tmp_path / "street.mp4", FRAMES, fps=8)
    clips = clips_of(
        film_sources=[str(tmp_path)], share_worlds=0.2, share_textures=0.3, share_stills=0.5, recolour=True, turn=True, glide=0.1
    )
    whole, parts = clips.batch(3), [clips.batch(3, range(rank, 8, 2)) for rank in range(2)]
    for name in ("clips", "pictures"):
        together = torch.stack([getattr(part, name) for part in parts], dim=1).flatten(0, 1)
        assert torch.equal(together, getattr(whole, name))


def test_test_films_are_measured_on_clips_over_their_length(tmp_path):
    write_video(tmp_path / "carphone.mp4", FRAMES, fps=8)
    write_video(tmp_path / "street.mp4", FRAMES, fps=8)
    assert held_out_films([str(tmp_path)], 2, 16, 24).shape == (4, 3, 2, 16, 24)
    assert held_out_films([str(tmp_path)], 9, 16, 24).shape == (1, 3, 9, 16, 24)
    assert held_out_films([], 9, 16, 24).shape == (0, 3, 9, 16, 24)
