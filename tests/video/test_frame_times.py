"""Which frame is on screen at a time: in files whose time stamps are rounded, and in raw streams, which state a rate only."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from lumos.video.io import write_video
from lumos.video.reading import count_frames, read_video


def grey(n: int) -> np.ndarray:
    return np.full((16, 24, 3), 8 * n, np.uint8)


def numbers(frames: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 8) for frame in frames]


def film(
    path: Path, count: int, rate: Fraction | int, codec: str = "libx264", form: str | None = None, b_frames: int = 2
) -> Path:
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate, options={"crf": "4"} if codec == "libx264" else {})
        stream.codec_context.max_b_frames, stream.codec_context.qmin, stream.codec_context.qmax = b_frames, 1, 1
        stream.width, stream.height, stream.pix_fmt = 24, 16, "yuv420p"
        for n in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey(n), format="rgb24").reformat(format="yuv420p")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".gif"])
@pytest.mark.parametrize("fps", [8, 12, 15, 24, 30])
def test_a_clip_that_was_written_is_read_with_the_same_frames(tmp_path, suffix, fps):
    path = write_video(tmp_path / f"clip{suffix}", np.stack([grey(n) for n in range(30)]), fps)
    assert numbers(read_video(path, fps=fps)[0]) == list(range(30))
    assert numbers(read_video(path, fps=fps, start=8 / fps, num_frames=7)[0]) == list(range(8, 15))
    assert count_frames(path, fps) == 30
    for last in (7, 29, 30):
        assert numbers(read_video(path, fps=fps, num_frames=last, from_end=True)[0]) == list(range(30 - last, 30))


@pytest.mark.parametrize("count", [5, 6, 7, 8, 29, 30, 31])
def test_the_end_of_a_film_in_whole_milliseconds(tmp_path, count):
    """The time of its last frame is rounded up, not at all, or down."""
    path = film(tmp_path / "film.mkv", count, 30)
    assert count_frames(path, 30) == count
    for last in (3, count - 2, count):
        assert numbers(read_video(path, fps=30, num_frames=last, from_end=True)[0]) == list(range(count - last, count))


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("b_frames", [0, 2])
def test_each_frame_of_an_avi_is_read_once(tmp_path, codec, b_frames):
    path = film(tmp_path / "film.avi", 30, 25, codec, b_frames=b_frames)
    assert count_frames(path, 25) == 30
    assert numbers(read_video(path, fps=25)[0]) == list(range(30))
    assert numbers(read_video(path, fps=25, num_frames=4, from_end=True)[0]) == [26, 27, 28, 29]
    assert numbers(read_video(path, fps=25, num_frames=2, start=1.12)[0]) == [28, 29]


def test_durations_of_parts_of_a_millisecond_do_not_add_up(tmp_path):
    first, *rest = (Image.fromarray(grey(n % 30)) for n in range(120))
    first.save(tmp_path / "film.png", save_all=True, append_images=rest, duration=1000 / 30)
    assert numbers(read_video(tmp_path / "film.png", fps=30)[0]) == [n % 30 for n in range(120)]


RAW = [("h264", "libx264"), ("m4v", "mpeg4"), ("mpeg1video", "mpeg1video"), ("mpeg2video", "mpeg2video")]


@pytest.mark.parametrize(("form", "codec"), RAW)
@pytest.mark.parametrize("rate", [12, Fraction(24000, 1001), 30, 50, 120])
def test_the_rate_of_a_raw_stream_is_the_one_it_states(tmp_path, form, codec, rate):
    if form == "mpeg1video" and rate in (12, 120):
        pytest.skip("MPEG-1 has a list of rates, without these")
    path = film(tmp_path / "film", 12, rate, codec, form)
    frames, fps = read_video(path)
    assert fps == pytest.approx(float(rate), rel=1e-3)
    assert numbers(frames) == list(range(12))
    assert count_frames(path, float(rate)) == 12
    assert numbers(read_video(path, fps=float(rate))[0]) == list(range(12))
