"""Films as recorders, browsers and broadcasts write them: without an index, cut off, joined, at a rate that varies."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from lumos.errors import UserError
from lumos.video.av_clip import AvClip
from lumos.video.hdr import HighDynamicRange
from lumos.video.matroska import stated_bytes
from lumos.video.reading import count_frames, read_video


def numbered(n: int) -> np.ndarray:
    """A frame with six stripes, which are the bits of its number."""
    bits = [220 if n >> bit & 1 else 30 for bit in range(6)]
    return np.broadcast_to(np.repeat(np.array(bits, np.uint8), 16)[None, :, None], (64, 96, 3)).copy()


def numbers(frames: np.ndarray) -> list[int]:
    return [sum(int(frame[32, 16 * bit + 8].mean() > 125) << bit for bit in range(6)) for frame in frames]


def film(
    path: Path, count: int = 36, codec: str = "libx264", *, gop: int = 60, b_frames: int = 2, times: list[int] | None = None,
    unit: Fraction = Fraction(1, 30), options: dict[str, str] | None = None, written: dict[str, str] | None = None,
) -> Path:  # fmt: skip
    """Frames at `times` in `unit` s; default: 30 frames per second."""
    with av.open(str(path), "w", options=written or {}) as container:
        stream = container.add_stream(codec, rate=round(1 / unit), options={"crf": "10", "qscale": "2", **(options or {})})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, b_frames
        for n, time in enumerate(times or range(count)):
            frame = av.VideoFrame.from_ndarray(numbered(n), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = time, unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


FORMS = [
    ("a.ts", "libx264", 0), ("a.ts", "libx264", 15), ("a.mpg", "mpeg2video", 0), ("a.avi", "libx264", 15),
    ("a.avi", "mpeg4", 15), ("a.mkv", "libx264", 15), ("a.mp4", "libx264", 15), ("a.flv", "libx264", 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "codec", "begin"), FORMS)
def test_the_end_of_a_film_of_one_key_frame(tmp_path, name, codec, begin):
    """FFmpeg finds no key frame near the end of containers without an index, and the file may begin late."""
    path = film(tmp_path / name, codec=codec, times=[*range(begin, begin + 36)])
    assert numbers(read_video(path)[0]) == numbers(read_video(path, fps=30)[0]) == list(range(36))
    assert count_frames(path, 30) == 36
    assert numbers(read_video(path, fps=30, num_frames=4, from_end=True)[0]) == [32, 33, 34, 35]
    assert numbers(read_video(path, fps=30, num_frames=2, start=1.1)[0]) == [33, 34]


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_broadcast_begins_with_its_first_key_frame(tmp_path, share):
    """What stands before cannot be decoded, and must not be filled with copies of the first frame."""
    data = film(tmp_path / "whole.ts", gop=12).read_bytes()
    (tmp_path / "cut.ts").write_bytes(data[int(share * len(data)) // 188 * 188 :])
    shown = numbers(read_video(tmp_path / "cut.ts")[0])
    assert shown == list(range(shown[0], 36))
    assert 0 < shown[0] < 24
    assert numbers(read_video(tmp_path / "cut.ts", fps=30)[0]) == shown
    assert count_frames(tmp_path / "cut.ts", 30) == len(shown)


def test_joined_recordings_are_refused_by_name(tmp_path):
    first, second = film(tmp_path / "a.ts", 12), film(tmp_path / "b.ts", 36)
    (tmp_path / "both.ts").write_bytes(first.read_bytes() + second.read_bytes())
    for read in (read_video, lambda path: count_frames(path, 30), lambda path: read_video(path, fps=30, num_frames=20)):
        with pytest.raises(UserError, match=r"times in .*both.ts jump back by 0\.\d s.*joined"):
            read(tmp_path / "both.ts")


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libx264"), ("a.webm", "libvpx-vp9")])
def test_matroska_that_is_cut_off_is_refused(tmp_path, name, codec):
    path = film(tmp_path / name, codec=codec)
    data = path.read_bytes()
    assert stated_bytes(path) == len(data)
    path.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(UserError, match=r"is cut off: [\d,]+ of [\d,]+ bytes are there"):
        read_video(path)
    assert numbers(read_video(path, num_frames=4)[0]) == [0, 1, 2, 3]


@pytest.mark.parametrize("data", [b"", b"RIFF", b"\x1a\x45\xdf\xa3", b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\x01" + b"\xff" * 7])
def test_files_that_state_no_size(tmp_path, data):
    (tmp_path / "a").write_bytes(data)
    assert stated_bytes(tmp_path / "a") is None


def test_a_live_recording_states_no_size_and_no_rate(tmp_path):
    """Browsers state no duration, and as the rate the unit of their times."""
    times = [0, 33, 66, 100, 1100, 1133, 1166, 2000, 2033, 2066]
    path = film(
        tmp_path / "live.webm", codec="libvpx-vp9", times=times, unit=Fraction(1, 1000), b_frames=0, written={"live": "1"}
    )
    assert stated_bytes(path) is None
    frames, rate = read_video(path)
    assert numbers(frames) == list(range(10))
    assert rate == pytest.approx(9 / 2.066, rel=0.01)
    shown = [max(n for n, time in enumerate(times) if time <= 100 * k + 1) for k in range(21)]
    assert numbers(read_video(path, fps=10)[0]) == shown


def test_the_last_frame_counts_however_short_it_is(tmp_path):
    """Its duration is one unit here, which is shorter than what the rounding of times may take from it."""
    path = film(tmp_path / "a.mp4", times=[0, 100, 4_000_000], unit=Fraction(1, 1000), b_frames=0)
    assert count_frames(path, 30) == 120_001
    assert numbers(read_video(path, fps=30, num_frames=5, from_end=True)[0]) == [1, 1, 1, 1, 2]


def test_columns_that_h264_hides_at_the_left_are_not_shown(tmp_path):
    path = film(tmp_path / "a.mp4", 3, options={"x264-params": "crop-rect=16,8,0,0"})
    assert read_video(path)[0].shape[1:3] == (56, 80)


def test_a_thumbnail_that_is_the_default_stream_is_not_the_film(tmp_path):
    """The writer of matroska makes the first stream the default, if no other is."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        small, stream = container.add_stream("mjpeg", rate=25), container.add_stream("libx264", rate=30)
        small.width, small.height, small.pix_fmt, small.disposition = 32, 32, "yuvj420p", Disposition.attached_pic
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        container.mux(small.encode(av.VideoFrame(32, 32, "yuvj420p")))
        container.mux(small.encode())
        for n in range(6):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(n), format="rgb24").reformat(format="yuv420p")))
        container.mux(stream.encode())
    assert numbers(read_video(tmp_path / "a.mkv")[0]) == list(range(6))


@pytest.mark.parametrize(("height", "width", "matrix"), [(720, 1280, 1), (576, 720, 5)])
def test_films_without_a_matrix_are_read_as_players_show_them(tmp_path, height, width, matrix):
    """BT.709 in HD, else BT.601."""
    colour = np.broadcast_to(np.array([200, 60, 30], np.uint8), (height, width, 3))
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "4", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        frame = av.VideoFrame.from_ndarray(colour, format="rgb24").reformat(format="yuv420p", dst_colorspace=matrix)
        frame.colorspace = stream.codec_context.colorspace = 2
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    found = read_video(tmp_path / "a.mp4")[0][0, 100, 100]
    assert np.abs(found.astype(int) - [200, 60, 30]).max() <= 3


@pytest.mark.parametrize(("stated", "shown"), [(1, [0, 128, 255]), (2, [16, 126, 235])])
def test_grey_films_have_the_range_that_they_state(tmp_path, stated, shown):
    """FFmpeg's scaler takes the levels of grey for full, so that black and white of HEVC without colours came out as greys."""
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx265", rate=8, options={"crf": "2", "x265-params": "log-level=error"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "gray"
        stream.codec_context.color_range = stated
        frame = av.VideoFrame.from_ndarray(np.repeat(np.repeat(np.uint8([[16, 126, 235]]), 64, 0), 32, 1), format="gray")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    found = read_video(tmp_path / "a.mp4")[0][0, 32, 16::32]
    assert np.abs(found.astype(int) - np.array(shown)[:, None]).max() <= 2


def test_an_open_file_is_read_from_several_places(tmp_path):
    """Two attempts to seek are closed before the file is read from its begin."""
    clip = AvClip(film(tmp_path / "a.mkv", 200, gop=300), 10**6, 1)
    for start in (5.0, 0.0, 6.0):
        shown = next(clip.frames(start))
        assert shown.begin <= start
    clip.close()


def coloured(path: Path, suffix: str) -> Path:
    """Twelve frames of blocks, which take some kilobytes each."""
    with av.open(str(path), "w", format=suffix) as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.codec_context.max_b_frames = 2
        for n in range(12):
            blocks = np.random.default_rng(n).integers(0, 255, (12, 16, 3), np.uint8)
            picture = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")))
        container.mux(stream.encode())
    return path


def test_frames_that_the_decoder_guesses_are_refused(tmp_path):
    """A decoder fills what it cannot read from frames before, and says so."""
    path = coloured(tmp_path / "a", "mp4")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        broken = [packet for packet in container.demux(video=0) if packet.size][9]
        begin, end = broken.pos + broken.size // 3, broken.pos + broken.size
    data[begin:end] = bytes(end - begin)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"is damaged at 0\.\d s; copy it again"):
        read_video(path, threads=1)
    assert len(read_video(path, num_frames=3, threads=1)[0]) == 3


def test_a_broadcast_with_a_gap_is_refused(tmp_path):
    path = coloured(tmp_path / "a", "mpegts")
    data = path.read_bytes()
    middle = len(data) // 376 * 188
    path.write_bytes(data[:middle] + data[middle + 188 :])
    with pytest.raises(UserError, match=r"is damaged at 0\.\d s; copy it again"):
        read_video(path)


def test_a_broadcast_may_end_within_a_packet(tmp_path):
    """One thread, as several do not always mark what they guessed."""
    path = coloured(tmp_path / "a", "mpegts")
    whole = read_video(path, threads=1)[0]
    path.write_bytes(path.read_bytes()[:-1000])
    frames, _ = read_video(path, threads=1)
    assert 8 <= len(frames) < 12
    assert all(any(np.array_equal(frame, other) for other in whole) for frame in frames)
    assert count_frames(path, 30) in (11, 12)


@pytest.mark.parametrize(("tag", "is_read"), [(b"hev1", True), (b"dvhe", False), (b"dvh1", False)])
def test_dolby_vision_without_another_form_is_refused(tmp_path, tag, is_read):
    path = film(tmp_path / "a.mp4", 3, "libx265", options={"x265-params": "log-level=0"})
    path.write_bytes(path.read_bytes().replace(b"hev1", tag))
    if is_read:
        assert len(read_video(path)[0]) == 3
    else:
        with pytest.raises(HighDynamicRange, match="Dolby Vision"):
            read_video(path)


def test_the_fourth_byte_of_a_bitmap_is_no_opacity(tmp_path):
    """Screen recorders leave it at 0."""
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("rawvideo", rate=8)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "bgra"
        clear = np.zeros((16, 16, 4), np.uint8)
        clear[..., 0] = 200
        container.mux(stream.encode(av.VideoFrame.from_ndarray(clear, format="rgba").reformat(format="bgra")))
        container.mux(stream.encode())
    assert read_video(tmp_path / "a.avi")[0][0, 8, 8].tolist() == [200, 0, 0]


GUESSED = [("a.mkv", "mpeg4"), ("a.mkv", "libx264"), ("a.ts", "libx264"), ("a.mpg", "mpeg2video")]


@pytest.mark.parametrize(("name", "codec"), GUESSED)
def test_guessed_times_of_decoding_are_no_jump(tmp_path, name, codec):
    """At a low rate, FFmpeg's guesses of what the file leaves out differ by a second."""
    slow = Fraction(1, 25 if name == "a.mpg" else 2)
    path = film(tmp_path / name, 30, codec, gop=12, unit=slow)
    assert numbers(read_video(path)[0]) == list(range(30))
    assert count_frames(path, float(1 / slow)) == 30
