"""Several parts of one open file: a result does not depend on earlier reads."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from lumos.errors import UserError
from lumos.video import av_clip
from lumos.video.av_clip import AvClip
from lumos.video.io import write_video
from lumos.video.reading import MAX_PIXELS, count_frames, open_video, read_video

FORMS = [("a.mp4", "libx264"), ("a.mov", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.ts", "libx264"),
         ("a.avi", "libx264"), ("a.h264", "libx264"), ("a.mp4", "mpeg4")]  # fmt: skip


def film(path: Path, codec: str, frames: int = 90, gop: int = 12) -> Path:
    """A film of 30 fps whose frames differ, with frames that are stored in another order than they are shown."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options={"g": str(gop), "bf": "2"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", gop
        stream.codec_context.time_base = Fraction(1, 30)
        for number in range(frames):
            picture = np.zeros((48, 64, 3), np.uint8)
            picture[:, : 1 + number % 64] = (number * 2 % 256, 255 - number * 2 % 256, 99)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    return path


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The files that FFmpeg opens for reading."""
    found, really = [], av.open

    def counting(file, *args, **options):
        found.append(file)
        return really(file, *args, **options)

    monkeypatch.setattr(av_clip.av, "open", counting)
    return found


@pytest.mark.parametrize(("name", "codec"), FORMS)
def test_parts_of_an_open_file_are_those_of_a_new_one(tmp_path, name, codec):
    path = film(tmp_path / name, codec)
    parts = [{"num_frames": 1}, {"fps": 12, "num_frames": 9, "start": 1.5}, {"fps": 8, "num_frames": 5}, {},
             {"num_frames": 7, "from_end": True}, {"fps": 15, "num_frames": 4, "start": 2.0}, {"num_frames": 1}]  # fmt: skip
    with open_video(path) as video:
        for part in parts:
            assert video.count_frames(12) == count_frames(path, 12)
            frames, rate = video.read(**part)
            expected, expected_rate = read_video(path, **part)
            assert rate == expected_rate
            assert np.array_equal(frames, expected), part


@pytest.mark.parametrize(("name", "codec"), FORMS)
@pytest.mark.parametrize("frames", [1, 13, 90])
def test_the_last_time_is_the_largest_one(tmp_path, name, codec, frames):
    clip = AvClip(film(tmp_path / name, codec, frames), MAX_PIXELS, 1)
    assert clip.last_time() == max(clip.times())


def test_the_last_time_leaves_out_what_an_edit_list_hides(tmp_path):
    whole, cut = film(tmp_path / "whole.mp4", "libx264"), tmp_path / "cut.mp4"
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                packet.pts, packet.dts = packet.pts - 20 * 512, packet.dts - 20 * 512  # the first ones are before the begin
                target.mux(packet)
    clip = AvClip(cut, MAX_PIXELS, 1)
    assert clip.last_time() == max(clip.times())


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_file_with_an_index_is_opened_once(tmp_path, name, opened, monkeypatch):
    path, read = film(tmp_path / name, "libx264", 600), []
    times = AvClip._stamped_times
    monkeypatch.setattr(AvClip, "_stamped_times", lambda self, *at: read.append(times(self, *at)) or read[-1])
    opened.clear()
    with open_video(path) as video:
        assert video.count_frames(30) == 600
        video.read(num_frames=1)
        video.read(fps=12, num_frames=5, start=7.0)
        video.read(fps=12, num_frames=5, start=3.0)
    assert len(opened) == 1
    assert sum(map(len, read)) <= 24  # two groups of frames at the end


def test_what_is_cut_off_is_still_found(tmp_path):
    path = film(tmp_path / "a.mkv", "libx264", 300)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    clip = AvClip(path, MAX_PIXELS, 1)
    assert clip.last_time() == max(clip.times()) < 9


def test_an_error_while_reading_does_not_spoil_the_next_part(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", np.zeros((9, 16, 24, 3), np.uint8), 9)
    with open_video(tmp_path / "a.mp4") as video:
        with monkeypatch.context() as patch:
            patch.setattr(AvClip, "_rgb", lambda *_: 1 / 0)
            with pytest.raises(UserError, match="cannot read"):
                video.read()
        assert len(video.read()[0]) == 9
