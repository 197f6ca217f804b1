"""Uploads are read as by the pipeline, within limits of time and length; messages name the visitor's file."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
from hostile_media import growing_gif, lying_avi
from PIL import Image

from lumos.demo import reading
from lumos.demo.reading import Allowed, read_upload
from lumos.demo.worker import Cancelled
from lumos.errors import RunError, UserError
from lumos.video.io import read_video, write_video

CLIP = np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3), dtype=np.uint8)
PATIENT = Allowed(seconds=60)


def never() -> None:
    pass


@pytest.fixture
def clip(tmp_path):
    return write_video(tmp_path / "clip.mp4", CLIP, 8)


def test_a_picture_is_read_whole(tmp_path):
    Image.fromarray(CLIP[0]).save(tmp_path / "a.png")
    assert np.array_equal(read_upload(tmp_path / "a.png", never, PATIENT), CLIP[0])


@pytest.mark.parametrize(("most", "there"), [(9, 9), (33, 20)])
def test_the_last_frames_of_a_clip_are_read_at_its_size(clip, most, there):
    frames = read_upload(clip, never, Allowed(60, clip_seconds=3), (8, most, 16, 24))
    assert frames.shape == (there, 16, 24, 3)
    assert np.array_equal(frames, read_video(clip, fps=8, num_frames=there, from_end=True, size=(16, 24))[0])


def test_a_long_clip_is_refused(clip):
    with pytest.raises(UserError, match=r"^clip\.mp4 lasts 2\.5 s; at most 2 s are allowed"):
        read_upload(clip, never, Allowed(60, clip_seconds=2), (8, 9, 16, 24))


@pytest.mark.parametrize("name", ["notes.png", "notes.mp4", "notes.gif"])
def test_an_error_shows_the_upload_name_without_its_folder(tmp_path, name):
    (tmp_path / name).write_text("no picture")
    with pytest.raises(UserError) as told:
        read_upload(tmp_path / name, never, PATIENT, None if name.endswith("png") else (8, 9, 16, 24))
    assert f" {name} " in str(told.value)
    assert str(tmp_path) not in str(told.value)


@pytest.fixture
def slow(tmp_path):
    """A picture that takes a while to read."""
    Image.new("RGB", (6000, 6000)).save(tmp_path / "slow.png", compress_level=1)
    return tmp_path / "slow.png"


def test_reading_ends_after_its_time(slow):
    with pytest.raises(UserError, match=r"reading slow\.png took longer than 0 s"):
        read_upload(slow, never, Allowed(0, 40_000_000))


def test_reading_ends_when_the_work_is_cancelled(slow):
    def stop():
        raise Cancelled

    with pytest.raises(Cancelled):
        read_upload(slow, stop, Allowed(60, 40_000_000))


def dies(*_) -> None:
    os._exit(3)


def test_a_reader_that_breaks_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_read", dies)
    with pytest.raises(UserError, match=r"reading a\.png broke off"):
        read_upload(tmp_path / "a.png", never, PATIENT)


def test_a_frame_larger_than_stated_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"small\.avi: it holds a frame of more than 1 megapixels"):
        read_upload(lying_avi(tmp_path / "small.avi", 8000, 6000, 8), never, Allowed(60, 1_000_000), (8, 9, 16, 24))
    with pytest.raises(UserError, match=r"a\.gif has (more than 1 megapixels|2000x2000 pixels)"):
        read_upload(growing_gif(tmp_path / "a.gif", 2000), never, Allowed(60, 1_000_000), (8, 9, 16, 24))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space")
@pytest.mark.parametrize("name", ["large.png", "large.avi"])
def test_reading_ends_at_its_memory(tmp_path, name):
    """A picture of 24 megapixels is allowed here, but the memory that it takes is not."""
    if name.endswith("avi"):
        path, clip = lying_avi(tmp_path / name, 6000, 4000, 4), (8, 9, 16, 24)
    else:
        Image.new("L", (6000, 4000)).save(tmp_path / name)
        path, clip = tmp_path / name, None
    with pytest.raises(UserError, match=rf"{name}.*memory|{name} broke off") as told:
        read_upload(path, never, Allowed(60, memory_mb=32), clip)
    assert str(tmp_path) not in str(told.value)
    assert read_upload(path, never, Allowed(60), clip).shape[-1] == 3


def test_readers_start_again_where_their_parent_has_died(tmp_path, monkeypatch):
    Image.fromarray(CLIP[0]).save(tmp_path / "a.png")
    start, failures = reading.start_reader, [EOFError("unexpected EOF")]

    def failing(*args):
        if failures:
            raise failures.pop()
        return start(*args)

    monkeypatch.setattr(reading, "start_reader", failing)
    assert np.array_equal(read_upload(tmp_path / "a.png", never, PATIENT), CLIP[0])
    failures += [EOFError(), BrokenPipeError()]
    with pytest.raises(RunError, match=r"^the server cannot read a\.png now; try again later$"):
        read_upload(tmp_path / "a.png", never, PATIENT)
