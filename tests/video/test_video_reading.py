"""Reading of clips and pictures: times, forms, and damaged or missing files."""

from __future__ import annotations

import struct
import warnings
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from hostile_media import growing_gif, lying_avi, tiled_tiff, wide_webp
from PIL import Image

from lumos.errors import UserError
from lumos.video import pillow_clip
from lumos.video import reading as video_reading
from lumos.video.av_clip import AvClip
from lumos.video.io import count_frames, read_image, read_video, write_video


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
    """Write a clip of two seconds at 30 fps."""
    return counting_clip(tmp_path_factory.mktemp("clips") / "thirty.mp4", [1000 * i / 30 for i in range(60)])


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
    """Twelve seconds hold several key frames; a late start must give the frames of reading from the beginning."""
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
    """Return a PNG that states this size and holds almost nothing."""

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

@pytest.mark.parametrize("read", [read_image, read_video, lambda path: count_frames(path, 12)])
def test_broken_and_huge_pictures_are_refused(tmp_path, read):
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


@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4", "list.ffconcat", "list.sdp"])
def test_a_list_of_files_is_not_followed(tmp_path, name):
    """FFmpeg would open the files that a playlist names, which may be any clip of the machine."""
    private = tmp_path / "private.mp4"
    write_video(private, np.zeros((9, 16, 16, 3), np.uint8), 8)
    texts = {
        ".m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1.5,\n{private}\n#EXT-X-ENDLIST\n",
        ".ffconcat": f"ffconcat version 1.0\nfile {private.name}\n", ".sdp": "v=0\nm=video 5004 RTP/AVP 96\n",
    }  # fmt: skip
    path = tmp_path / name
    path.write_text(texts.get(path.suffix, texts[".m3u8"]))
    for read in (read_video, lambda p: count_frames(p, 8)):
        with pytest.raises(UserError, match="cannot read the video"):
            read(path)


# -- limits hold for what arrives --------------------------------------------------------------------------------------


def address_space() -> int:
    return psutil.Process().memory_info().vms


@pytest.mark.parametrize("at", [0, 8])
def test_a_frame_larger_than_stated_is_not_decoded(at: int, tmp_path):
    path = lying_avi(tmp_path / "small.avi", 8000, 6000, at)
    before = address_space()
    with pytest.raises(UserError, match=r"small\.avi: it holds a frame of more than 40 megapixels"):
        read_video(path, size=(16, 24))
    assert address_space() - before < 2**27  # the frame would take more than 60 MB, and its colours 144


def test_every_frame_is_checked_exactly(tmp_path):
    path = lying_avi(tmp_path / "small.avi", 200, 100, 4)
    with pytest.raises(UserError, match=r"200x100 pixels .* the limit is 0\.019999 megapixels"):
        read_video(path, size=(16, 24), max_pixels=19_999)
    assert read_video(path, size=(16, 24), max_pixels=20_000)[0].shape == (9, 16, 24, 3)


@pytest.mark.parametrize(("make", "read", "name"), [
    (growing_gif, read_video, "a.gif"), (wide_webp, read_image, "a.webp"), (wide_webp, read_video, "a.webp"),
    (tiled_tiff, read_image, "a.tif"), (tiled_tiff, read_video, "a.gif"),
])  # fmt: skip
def test_pictures_are_checked_for_what_they_hold(make, read, name, tmp_path):
    with pytest.raises(UserError, match=r"7000x7000 pixels \(49\.0 megapixels\); the limit is 40 megapixels"):
        read(make(tmp_path / name, 7000))


def test_animated_frames_are_bounded_together(tmp_path, monkeypatch):
    frames = [Image.new("RGB", (32, 32), (n, 0, 0)) for n in range(20)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    monkeypatch.setattr(pillow_clip, "MAX_ANIMATION_PIXELS", 20 * 32 * 32)
    assert count_frames(tmp_path / "a.gif", 10) == 20
    monkeypatch.setattr(pillow_clip, "MAX_ANIMATION_PIXELS", 20 * 32 * 32 - 1)
    for read in (read_video, lambda path: count_frames(path, 10)):
        with pytest.raises(UserError, match="megapixels in all its frames"):
            read(tmp_path / "a.gif")


def test_no_memory_is_one_line(thirty: Path, monkeypatch):
    def none_left(*_):
        raise MemoryError

    monkeypatch.setattr(AvClip, "_rgb", none_left)
    with pytest.raises(UserError, match="takes more memory than there is"):
        read_video(thirty)
