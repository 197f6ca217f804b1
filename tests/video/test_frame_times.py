"""Which frame is on screen at a time: in files whose time stamps are rounded, and in raw streams, which state a rate only."""

from __future__ import annotations

import math
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
    path: Path, count: int, rate: Fraction | int, codec: str = "libx264", form: str | None = None, b_frames: int = 2,
    left_out: range = range(0),
) -> Path:  # fmt: skip
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate, options={"crf": "4"} if codec == "libx264" else {})
        stream.codec_context.max_b_frames, stream.codec_context.qmin, stream.codec_context.qmax = b_frames, 1, 1
        stream.width, stream.height, stream.pix_fmt = 24, 16, "yuv420p"
        for n in sorted({*range(count)} - {*left_out}):
            frame = av.VideoFrame.from_ndarray(grey(n), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = n, 1 / Fraction(rate)
            container.mux(stream.encode(frame))
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


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("b_frames", [0, 2])
def test_a_frame_before_a_gap_in_an_avi_stays(tmp_path, codec, b_frames):
    """The gap is at the place where the frame before it is decoded, which is not where it is shown."""
    path = film(tmp_path / "film.avi", 30, 30, codec, b_frames=b_frames, left_out=range(10, 15))
    shown = [*range(10), *[9] * 5, *range(15, 30)]
    assert numbers(read_video(path, fps=30)[0]) == shown
    assert count_frames(path, 30) == 30
    assert numbers(read_video(path, fps=30, num_frames=17, from_end=True)[0]) == shown[-17:]
    assert numbers(read_video(path)[0]) == [*range(10), *range(15, 30)]


@pytest.mark.parametrize(("form", "codec"), [("asf", "libx264"), ("asf", "mpeg4"), ("nut", "libx264"), ("nut", "mpeg4")])
def test_containers_without_a_start_or_times_of_presentation(tmp_path, form, codec):
    path = film(tmp_path / "film", 30, 30, codec, form)
    assert count_frames(path, 30) == 30
    assert numbers(read_video(path)[0]) == numbers(read_video(path, fps=30)[0]) == list(range(30))
    assert numbers(read_video(path, fps=30, num_frames=3, start=0.5)[0]) == [15, 16, 17]
    assert numbers(read_video(path, fps=30, num_frames=5, from_end=True)[0]) == [25, 26, 27, 28, 29]


@pytest.mark.parametrize("cut", [math.floor, math.ceil])
@pytest.mark.parametrize("count", [28, 29, 30])
def test_times_that_were_cut_to_milliseconds(tmp_path, cut, count):
    """Recorders cut times where this program rounds them."""
    with av.open(str(tmp_path / "film.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 24, 16, "yuv420p"
        stream.codec_context.time_base, stream.codec_context.max_b_frames = Fraction(1, 1000), 0
        for n in range(count):
            frame = av.VideoFrame.from_ndarray(grey(n), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = cut(n * 1000 / 30), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    path = tmp_path / "film.mkv"
    assert count_frames(path, 30) == count
    assert numbers(read_video(path, fps=30)[0]) == list(range(count))
    assert numbers(read_video(path, fps=30, num_frames=4, from_end=True)[0]) == list(range(count - 4, count))


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


SHOWN_AT_20 = [math.floor(n * 1.5) for n in range(20)]  # of a film of 30 frames per second that is read at 20


COUNTED = [("a.mp4", "libx264"), ("a.avi", "mpeg4"), ("a.mxf", "mpeg2video"), ("a.y4m", "rawvideo")]


@pytest.mark.parametrize(("name", "codec"), COUNTED)
@pytest.mark.parametrize("b_frames", [0, 2])
def test_clocks_that_count_frames_are_exact(tmp_path, name, codec, b_frames):
    """A frame of an AVI was shown half a frame early, so that the same film gave other frames than as an mp4."""
    if codec == "rawvideo" and b_frames:
        pytest.skip("raw pictures have no B-frames")
    path = film(tmp_path / name, 30, 30, codec, b_frames=b_frames)
    assert numbers(read_video(path, fps=20)[0]) == SHOWN_AT_20
    assert numbers(read_video(path, fps=20, num_frames=4, start=0.55)[0]) == [16, 18, 19, 21]


def test_clocks_whose_ticks_are_no_frames_are_rounded(tmp_path):
    """Times in hundredths of a second are those of 30 frames per second to within half a tick."""
    with av.open(str(tmp_path / "film.ivf"), "w") as container:
        stream = container.add_stream("libvpx", rate=30, options={"crf": "4", "b": "2M"})
        stream.width, stream.height, stream.pix_fmt = 24, 16, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 100)
        for n in range(30):
            frame = av.VideoFrame.from_ndarray(grey(n), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = round(n * 100 / 30), Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert numbers(read_video(tmp_path / "film.ivf", fps=30)[0]) == list(range(30))


@pytest.mark.parametrize(("name", "codec"), [("a.mpg", "mpeg2video"), ("a.vob", "mpeg2video"), ("a.mpg", "libx264")])
def test_parts_of_a_program_stream_are_those_of_the_whole(tmp_path, name, codec):
    """Not every frame has a time in it: FFmpeg guessed others behind a seek, and took 5/4 for the rate of H.264."""
    bits = [np.repeat(np.repeat([[n >> 2 * b & 3 for b in range(4)]], 64, 0), 32, 1) for n in range(170)]  # each frame is another
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.codec_context.max_b_frames, stream.codec_context.gop_size, stream.bit_rate = 2, 15, 2_000_000
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        for n, levels in enumerate(bits):
            frame = av.VideoFrame.from_ndarray(np.repeat(np.uint8(30 + 60 * levels)[..., None], 3, 2), format="rgb24")
            frame.pts, frame.time_base = n, Fraction(1, 30)
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode())

    def shown(**part) -> list[int]:
        levels = np.round((read_video(tmp_path / name, **part)[0][:, 32, 16::32].mean(-1) - 30) / 60).astype(int)
        return (levels << 2 * np.arange(4)).sum(1).tolist()

    assert shown() == list(range(170))
    for first in (31, 62, 106, 158):
        assert shown(fps=30, num_frames=9, start=first / 30) == list(range(first, first + 9))
    assert shown(fps=10, num_frames=5, from_end=True) == [157, 160, 163, 166, 169]
    assert count_frames(tmp_path / name, 30) == 170
