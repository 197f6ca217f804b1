"""Uploads: read as the pipeline would, bounded in time and length, and named as the visitor names them."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from lumos.demo import reading
from lumos.demo.reading import read_upload
from lumos.demo.worker import Cancelled
from lumos.errors import UserError
from lumos.video_io import read_video, write_video

CLIP = np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3), dtype=np.uint8)


def never() -> None:
    pass


@pytest.fixture
def clip(tmp_path):
    return write_video(tmp_path / "clip.mp4", CLIP, 8)


def test_a_picture_is_read_whole(tmp_path):
    Image.fromarray(CLIP[0]).save(tmp_path / "a.png")
    assert np.array_equal(read_upload(tmp_path / "a.png", 60, never), CLIP[0])


@pytest.mark.parametrize(("most", "there"), [(9, 9), (33, 20)])
def test_the_last_frames_of_a_clip_are_read_at_its_size(clip, most, there):
    frames = read_upload(clip, 60, never, (8, most, 16, 24), longest=3)
    assert frames.shape == (there, 16, 24, 3)
    assert np.array_equal(frames, read_video(clip, fps=8, num_frames=there, from_end=True, size=(16, 24))[0])


def test_a_long_clip_is_refused(clip):
    with pytest.raises(UserError, match=r"^clip\.mp4 lasts 2\.5 s; at most 2 s are allowed"):
        read_upload(clip, 60, never, (8, 9, 16, 24), longest=2)


@pytest.mark.parametrize("name", ["notes.png", "notes.mp4", "notes.gif"])
def test_a_bad_file_is_one_line_with_the_visitors_name_and_no_folder(tmp_path, name):
    (tmp_path / name).write_text("no picture")
    with pytest.raises(UserError) as told:
        read_upload(tmp_path / name, 60, never, None if name.endswith("png") else (8, 9, 16, 24), longest=9)
    assert f" {name} " in str(told.value)
    assert str(tmp_path) not in str(told.value)


@pytest.fixture
def slow(tmp_path):
    """A picture that takes a while to read."""
    Image.new("RGB", (6000, 6000)).save(tmp_path / "slow.png", compress_level=1)
    return tmp_path / "slow.png"


def test_reading_ends_after_its_time(slow):
    with pytest.raises(UserError, match=r"reading slow\.png took longer than 0 s"):
        read_upload(slow, 0, never)


def test_reading_ends_when_the_work_is_cancelled(slow):
    def stop():
        raise Cancelled

    with pytest.raises(Cancelled):
        read_upload(slow, 60, stop)


def dies(*_) -> None:
    os._exit(3)


def test_a_reader_that_breaks_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_read", dies)
    with pytest.raises(UserError, match=r"reading a\.png broke off"):
        read_upload(tmp_path / "a.png", 60, never)
