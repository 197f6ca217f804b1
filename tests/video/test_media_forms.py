"""Media with hidden frames, missing times, pixels that are not square, mirrors, cover art, colours and wrong names."""

from __future__ import annotations

import io
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image, ImageCms, ImageOps

from lumos.errors import UserError
from lumos.video.av_picture import displayed
from lumos.video.boxes import edit_lists
from lumos.video.frames import as_uint8, picture_rgb
from lumos.video.reading import can_read, count_frames, is_still, read_image, read_video

ONE = 1 << 16  # of a display matrix


def grey(n: int, height: int = 96, width: int = 128) -> np.ndarray:
    return np.full((height, width, 3), 20 + 6 * n, np.uint8)


def numbers(frames: np.ndarray) -> list[int]:
    return [round((int(frame[40, 40].mean()) - 20) / 6) for frame in frames]


def film(path: Path, frames: list[np.ndarray], codec: str = "libx264", pix: str = "yuv420p", rate: int = 30, **context) -> Path:
    """A file with B-frames and one key frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"crf": "4", "auto-alt-ref": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 60, 2
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for frame in frames:
            made = av.VideoFrame.from_ndarray(frame, format="rgba" if frame.shape[2] == 4 else "rgb24")
            container.mux(stream.encode(made.reformat(format=pix)))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def thirty(tmp_path_factory) -> Path:
    return film(tmp_path_factory.mktemp("film") / "long.mp4", [grey(i) for i in range(30)])


def patched(path: Path, to: Path, atom: bytes, offset: int, data: bytes) -> Path:
    """A copy of an mp4 with other bytes in the content of an atom."""
    content = bytearray(path.read_bytes())
    at = content.find(atom) + offset
    content[at : at + len(data)] = data
    to.write_bytes(content)
    return to


# ---- time


def test_frames_behind_an_edit_list_do_not_exist(thirty, tmp_path):
    content = thirty.read_bytes()
    (scale,) = struct.unpack(">I", content[(at := content.find(b"mvhd")) + 16 : at + 20])
    trimmed = patched(thirty, tmp_path / "trim.mp4", b"elst", 12, struct.pack(">I", scale // 2))
    assert count_frames(trimmed, 30) == 15
    assert numbers(read_video(trimmed)[0]) == list(range(15))
    assert numbers(read_video(trimmed, fps=30, num_frames=5, from_end=True)[0]) == [10, 11, 12, 13, 14]


def with_edits(path: Path, to: Path, edits: list[tuple[int, int]], speed: float = 1) -> Path:
    """A copy of an mp4, whose boxes stand behind the film, with other edits: (duration, time in the film); -1: show nothing."""
    content = bytearray(path.read_bytes())
    at = content.find(b"elst")
    before = int.from_bytes(content[at - 4 : at])
    box = struct.pack(">4sII", b"elst", 0, len(edits)) + b"".join(struct.pack(">IiI", *edit, int(speed * ONE)) for edit in edits)
    content[at - 4 : at - 4 + before] = struct.pack(">I", 4 + len(box)) + box
    for name in (b"edts", b"trak", b"moov"):
        place = content.rfind(name, 0, at)
        content[place - 4 : place] = struct.pack(">I", int.from_bytes(content[place - 4 : place]) + 4 + len(box) - before)
    to.write_bytes(content)
    return to


@pytest.mark.parametrize("b_frames", [0, 2])
def test_several_pieces_of_a_film_with_b_frames_are_refused(tmp_path, b_frames):
    """FFmpeg counts the delay of B-frames again in each piece; without B-frames the pieces are read right."""
    whole = film(tmp_path / "whole.mp4", [grey(i) for i in range(30)], max_b_frames=b_frames, gop_size=10)
    with av.open(str(whole)) as container:
        stream = container.streams.video[0]
        scale = stream.time_base.denominator
    content = whole.read_bytes()
    (shown,) = struct.unpack(">I", content[(at := content.find(b"mvhd")) + 16 : at + 20])
    first = struct.unpack(">i", content[(at := content.find(b"elst")) + 16 : at + 20])[0]
    third = shown // 3
    one = with_edits(whole, tmp_path / "one.mp4", [(third, -1), (third, first)])
    assert [[edit.is_shown for edit in edits] for edits in edit_lists(one)] == [[False, True]]
    assert numbers(read_video(one)[0]) == list(range(10))
    two = with_edits(whole, tmp_path / "two.mp4", [(third, first), (third, first + 2 * scale // 3)])
    assert [[edit.is_shown for edit in edits] for edits in edit_lists(two)] == [[True, True]]
    if b_frames:
        with pytest.raises(UserError, match=r"two\.mp4 shows several pieces of its film"):
            read_video(two)
    else:
        assert numbers(read_video(two)[0]) == [*range(10), *range(20, 30)]
        assert count_frames(two, 30) == 20


def test_gaps_behind_pieces_of_a_film_are_refused(tmp_path):
    """FFmpeg shows the film again in the gap; a gap before all pieces is no part of the film."""
    whole = film(tmp_path / "whole.mp4", [grey(i) for i in range(30)], max_b_frames=0, gop_size=10)
    first, behind, gap = (333, 0), (333, 10240), (500, -1)  # times of the film count in 1/15360 s
    for edits in ([first, gap, behind], [first, gap]):
        with pytest.raises(UserError, match="shows a gap behind a piece of its film"):
            read_video(with_edits(whole, tmp_path / "gap.mp4", edits))
    assert numbers(read_video(with_edits(whole, tmp_path / "late.mp4", [gap, first, behind]))[0]) == [*range(10), *range(20, 30)]


@pytest.mark.parametrize("speed", [0, 0.5, 2])
def test_a_film_that_plays_slower_or_faster_is_refused(thirty, tmp_path, speed):
    """FFmpeg shows it as it was recorded."""
    with pytest.raises(UserError, match="plays its film slower or faster than it was recorded"):
        count_frames(with_edits(thirty, tmp_path / "other.mp4", [(1000, 1024)], speed), 30)


@pytest.mark.parametrize("flags", ["faststart", "frag_keyframe+empty_moov+delay_moov"])
@pytest.mark.parametrize("b_frames", [0, 2])
def test_hidden_frames_of_a_fragmented_film_do_not_exist(tmp_path, flags, b_frames):
    """A film that was cut without encoding it anew begins with the frames from a key frame on, which an edit list hides."""
    with av.open(str(tmp_path / "cut.mp4"), "w", options={"movflags": flags}) as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 30, b_frames
        for n in range(30):
            frame = av.VideoFrame.from_ndarray(grey(n), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = n - 10, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert count_frames(tmp_path / "cut.mp4", 30) == 20
    assert numbers(read_video(tmp_path / "cut.mp4")[0]) == list(range(10, 30))
    assert numbers(read_video(tmp_path / "cut.mp4", fps=30)[0]) == list(range(10, 30))
    assert numbers(read_video(tmp_path / "cut.mp4", fps=10, num_frames=7, from_end=True)[0]) == list(range(11, 30, 3))


@pytest.mark.parametrize("name", ["a.avi", "a.h264", "a.mp4", "a.flv", "a.mkv"])
def test_each_frame_is_read_once_and_in_order(tmp_path, name):
    path = film(tmp_path / name, [grey(i) for i in range(30)])
    assert read_video(path)[1] == pytest.approx(30, rel=1e-3)
    assert numbers(read_video(path)[0]) == list(range(30))
    assert numbers(read_video(path, fps=30)[0]) == list(range(30))
    assert numbers(read_video(path, fps=10)[0]) == list(range(0, 30, 3))
    assert count_frames(path, 30) == 30
    assert numbers(read_video(path, fps=30, num_frames=5, from_end=True)[0]) == [25, 26, 27, 28, 29]


def test_frames_of_old_avi_are_in_order(tmp_path):
    """MPEG-4 with B-frames loses some greys, so frames are compared with their neighbours."""
    frames = [np.full((96, 128, 3), 20, np.uint8) for _ in range(30)]
    for i, frame in enumerate(frames):
        frame[:, 4 * i : 4 * i + 8] = 230  # a bar that moves to the right
    found, rate = read_video(film(tmp_path / "a.avi", frames, "mpeg4"))
    assert rate == 30
    bars = (found[:, 48, :, 0].astype(float) - 60).clip(0)
    places = bars @ np.arange(128) / bars.sum(1)
    assert np.abs(places - (4 * np.arange(30) + 3.5)).max() < 2


def test_sound_with_a_cover_holds_no_video(tmp_path):
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        sound, cover = container.add_stream("aac", rate=48000), container.add_stream("mjpeg", rate=25)
        cover.width = cover.height = 64
        cover.pix_fmt, cover.disposition = "yuvj420p", Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(grey(0, 64, 64), format="rgb24").reformat(format="yuvj420p")))
        for n in range(46):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, n * 1024, Fraction(1, 48000)
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
    for read in (read_video, lambda file: count_frames(file, 24)):
        with pytest.raises(UserError, match="holds no video"):
            read(path)
    assert not can_read(path)


# ---- geometry


def test_pixels_that_are_not_square_are_made_square(tmp_path):
    for aspect, width in ((Fraction(64, 45), 1024), (Fraction(16, 15), 768)):
        path = film(tmp_path / "pal.mp4", [grey(3, 576, 720)] * 2, sample_aspect_ratio=aspect)
        assert read_video(path)[0].shape[1:3] == (576, width)
    narrow = film(tmp_path / "ntsc.mp4", [grey(3, 480, 720)] * 2, sample_aspect_ratio=Fraction(8, 9))
    assert read_video(narrow)[0].shape[1:3] == (480, 640)
    with pytest.raises(UserError, match="1024x576 pixels"):
        read_video(film(tmp_path / "p.mp4", [grey(3, 576, 720)], sample_aspect_ratio=Fraction(64, 45)), max_pixels=500_000)


CORNER = np.zeros((48, 64, 3), np.uint8)
CORNER[:16, :32] = 250  # bright at the top left, wider than high
SHOWN = {  # display matrix (a, b, c, d) -> what is shown
    (1, 0, 0, 1): CORNER, (-1, 0, 0, 1): CORNER[:, ::-1], (1, 0, 0, -1): CORNER[::-1], (-1, 0, 0, -1): CORNER[::-1, ::-1],
    (0, 1, -1, 0): np.rot90(CORNER, -1), (0, -1, 1, 0): np.rot90(CORNER, 1), (0, 1, 1, 0): CORNER.swapaxes(0, 1),
    (0, -1, -1, 0): np.rot90(CORNER, 1)[:, ::-1],
}  # fmt: skip


@pytest.mark.parametrize("matrix", SHOWN)
def test_display_matrices_turn_and_mirror(tmp_path, matrix):
    a, b, c, d = (ONE * value for value in matrix)
    assert np.array_equal(displayed(CORNER, (a, b, 0, c, d, 0, 0, 0, 1 << 30)), SHOWN[matrix])
    plain = film(tmp_path / "plain.mp4", [CORNER] * 2)
    path = patched(plain, tmp_path / "turned.mp4", b"tkhd", 44, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30))
    found = read_video(path)[0][0]
    assert found.shape == SHOWN[matrix].shape
    assert np.abs(found.astype(int) - SHOWN[matrix]).mean() < 12  # of H.264 at the edges


def test_exif_orientation_counts_in_every_form(tmp_path):
    picture = Image.fromarray(CORNER)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    data = io.BytesIO()
    picture.save(data, "PNG", exif=exif)
    (tmp_path / "turned.png").write_bytes(data.getvalue())
    expected = np.rot90(CORNER, -1)
    opened = Image.open(io.BytesIO(data.getvalue()))
    assert np.array_equal(read_image(tmp_path / "turned.png"), expected)
    assert np.array_equal(read_video(tmp_path / "turned.png")[0][0], expected)
    assert np.array_equal(as_uint8(opened, ndim=3), expected)
    assert np.array_equal(as_uint8([opened, opened])[1], expected)


# ---- which stream, which form


def test_the_default_stream_is_the_film(tmp_path):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        small, film_ = container.add_stream("mjpeg", rate=1), container.add_stream("libx264", rate=24)
        small.width, small.height, small.pix_fmt = 32, 24, "yuvj420p"
        film_.width, film_.height, film_.pix_fmt, film_.disposition = 128, 96, "yuv420p", Disposition.default
        container.mux(small.encode(av.VideoFrame.from_ndarray(grey(0, 24, 32), format="rgb24").reformat(format="yuvj420p")))
        container.mux(small.encode())
        for i in range(24):
            container.mux(film_.encode(av.VideoFrame.from_ndarray(grey(i), format="rgb24").reformat(format="yuv420p")))
        container.mux(film_.encode())
    assert read_video(path)[0].shape == (24, 96, 128, 3)


def animated(path: Path, kind: str, **options) -> Path:
    pictures = [Image.fromarray(grey(i)) for i in range(5)]
    pictures[0].save(path, kind, save_all=True, append_images=pictures[1:], duration=100, **options)
    return path


@pytest.mark.parametrize(("kind", "name"), [("WEBP", "blob"), ("AVIF", "a.avif"), ("GIF", "a.mp4"), ("PNG", "a.jpg")])
def test_animations_are_known_by_their_content(tmp_path, kind, name):
    path = animated(tmp_path / name, kind, **({"lossless": True} if kind == "WEBP" else {}))
    frames, rate = read_video(path)
    assert (len(frames), rate) == (5, pytest.approx(10))
    assert np.abs(np.array(numbers(frames)) - range(5)).max() <= 1
    assert not is_still(path)
    assert can_read(path)


def test_a_film_and_a_picture_with_wrong_names(thirty, tmp_path):
    (tmp_path / "film.gif").write_bytes(thirty.read_bytes())
    assert numbers(read_video(tmp_path / "film.gif")[0]) == list(range(30))
    with pytest.raises(UserError, match=r"film.gif holds a video and no picture; give it as a video"):
        read_image(tmp_path / "film.gif")
    Image.fromarray(grey(7)).save(tmp_path / "picture.jpg")
    (tmp_path / "picture").write_bytes((tmp_path / "picture.jpg").read_bytes())
    for name in ("picture.jpg", "picture"):
        assert numbers(read_video(tmp_path / name)[0]) == [7]
        assert is_still(tmp_path / name)
        assert count_frames(tmp_path / name, 24) == 1


def test_a_photograph_in_heic_is_refused_by_name(tmp_path):
    """FFmpeg reads one tile of it as a film of one frame."""
    Image.fromarray(grey(3)).save(tmp_path / "a.avif")
    (tmp_path / "a.heic").write_bytes((tmp_path / "a.avif").read_bytes().replace(b"avif", b"heic", 2))
    with av.open(str(tmp_path / "a.heic")) as container:
        assert container.streams.video
    for read in (read_image, read_video, lambda path: count_frames(path, 8)):
        with pytest.raises(UserError, match=r"a.heic is a HEIF picture .* convert it to PNG or JPEG"):
            read(tmp_path / "a.heic")
    assert not can_read(tmp_path / "a.heic")


def test_the_hidden_default_picture_of_an_apng_is_no_frame(tmp_path):
    pictures = [Image.fromarray(grey(i)) for i in (20, 0, 1, 2)]
    pictures[0].save(tmp_path / "a.png", save_all=True, append_images=pictures[1:], duration=100, default_image=True)
    assert numbers(read_video(tmp_path / "a.png")[0]) == [0, 1, 2]
    assert count_frames(tmp_path / "a.png", 10) == 3
    pictures[0].save(tmp_path / "b.png", save_all=True, append_images=pictures[1:2], duration=100, default_image=True)
    assert is_still(tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert numbers(read_image(tmp_path / name)[None]) == [0]


@pytest.mark.parametrize("name", ["film.mjpeg", "film"])
def test_pictures_one_after_another_are_a_film(tmp_path, name):
    """Whatever its name is; a picture with a smaller preview behind it is none, and neither is a picture called .mjpeg."""
    pictures = []
    for n, size in enumerate([(128, 96)] * 3 + [(64, 48)]):
        Image.new("RGB", size, (20 + 6 * n,) * 3).save(tmp_path / "one.jpg", quality=95, progressive=n == 1)
        pictures.append((tmp_path / "one.jpg").read_bytes())
    (tmp_path / name).write_bytes(b"".join(pictures[:3]))
    assert numbers(read_video(tmp_path / name)[0]) == [0, 1, 2]
    assert not is_still(tmp_path / name)
    for still in (pictures[:1], [pictures[1], pictures[3]]):
        (tmp_path / name).write_bytes(b"".join(still))
        assert len(read_video(tmp_path / name)[0]) == 1
        assert is_still(tmp_path / name)


# ---- colour and alpha


@pytest.mark.parametrize(("codec", "pix"), [("libvpx-vp9", "yuva420p"), ("libvpx", "yuva420p")])
def test_transparent_parts_of_webm_are_white(tmp_path, codec, pix):
    picture = np.zeros((96, 128, 4), np.uint8)
    picture[..., 0], picture[:48, :, 3] = 200, 255
    frames, _ = read_video(film(tmp_path / "a.webm", [picture] * 3, codec, pix))
    assert len(frames) == 3
    for frame in frames:
        assert np.abs(frame[80, 80].astype(int) - 255).max() <= 3
        assert frame[20, 80, 0] > 180
        assert frame[20, 80, 1:].max() < 25


def test_a_palette_with_alpha_lies_on_white():
    picture = Image.fromarray(np.array([[[200, 0, 0, 255], [0, 0, 0, 0]]], np.uint8)).quantize(2)
    assert picture.mode == "P"
    assert "transparency" not in picture.info
    for found in (as_uint8(picture, ndim=3), as_uint8([picture])[0]):
        assert found[0].tolist() == [[200, 0, 0], [255, 255, 255]]


def test_transparent_grey_of_16_bits_is_white(tmp_path):
    values = np.array([[0, 40_000], [65_535, 300]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png", transparency=300)
    assert read_image(tmp_path / "a.png")[..., 0].tolist() == [[0, 156], [255, 255]]


def png(path: Path, depth: int, colours: int, pixels: bytes, clear: bytes) -> Path:
    """A PNG of one row of two pixels. colours: 0 for grey, 2 for RGB."""
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 2, 1, depth, colours, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"tRNS", clear) + chunk(b"IDAT", zlib.compress(b"\0" + pixels)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize(("depth", "colours", "pixels", "clear", "other"), [
    (2, 0, bytes([0b01_10_0000]), (1,), 170), (4, 0, bytes([0x12]), (1,), 34), (8, 0, bytes([1, 2]), (1,), 2),
    (16, 2, struct.pack(">6H", 1000, 2000, 3000, 770, 770, 770), (1000, 2000, 3000), 3),
])  # fmt: skip
def test_the_transparent_colour_of_a_png_of_any_depth_is_white(tmp_path, depth, colours, pixels, clear, other):
    path = png(tmp_path / "a.png", depth, colours, pixels, struct.pack(f">{len(clear)}H", *clear))
    expected = [[[255] * 3, [other] * 3]]
    assert read_image(path).tolist() == expected
    assert read_video(path)[0].tolist() == [expected]
    assert as_uint8(Image.open(path), ndim=3).tolist() == expected
    assert as_uint8([Image.open(path)]).tolist() == [expected]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_arrays_and_tensors_with_alpha_lie_on_white(dtype):
    import torch

    picture = np.zeros((2, 4, 6, 4), np.uint8)
    picture[..., 0], picture[:, :2, :, 3] = 200, 255
    expected = np.full((2, 4, 6, 3), 255, np.uint8)
    expected[:, :2] = (200, 0, 0)
    given = picture if dtype == np.uint8 else picture.astype(np.float32) / 255
    assert np.abs(as_uint8(given).astype(int) - expected).max() <= 1
    tensor = torch.from_numpy(np.moveaxis(given, -1, -3).copy())
    assert np.abs(as_uint8(tensor).astype(int) - expected).max() <= 1


def test_colour_profiles_become_srgb(tmp_path):
    """A linear profile: 128 of 255 is 188 in sRGB. Pictures without a profile, or with a damaged one, keep their values."""
    picture = Image.fromarray(np.full((4, 4, 3), 128, np.uint8))
    linear = ImageCms.ImageCmsProfile(io.BytesIO(_linear_profile()))
    picture.save(tmp_path / "linear.png", icc_profile=linear.tobytes())
    assert np.abs(read_image(tmp_path / "linear.png").astype(int) - 188).max() <= 1
    clear = picture.convert("RGBA")
    clear.putpixel((0, 0), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png", icc_profile=linear.tobytes())
    found = read_image(tmp_path / "clear.png")
    assert found[0, 0].tolist() == [255, 255, 255]
    assert np.abs(found[1:].astype(int) - 188).max() <= 1
    for data in (None, b"no profile"):
        picture.info["icc_profile"] = data
        assert (picture_rgb(picture) == 128).all()
    assert (picture_rgb(ImageOps.exif_transpose(Image.open(tmp_path / "linear.png"))) > 180).all()


def test_profiles_of_grey_apply_to_each_form_of_grey(tmp_path):
    profile = ImageCms.ImageCmsProfile(io.BytesIO(_grey_profile())).tobytes()
    deep = Image.fromarray(np.full((2, 2), 128 * 257, np.uint16))
    for picture in (Image.new("L", (2, 2), 128), Image.new("LA", (2, 2), (128, 255)), deep):
        picture.save(tmp_path / "a.png", icc_profile=profile)
        assert np.abs(read_image(tmp_path / "a.png").astype(int) - 188).max() <= 1
    Image.new("LA", (2, 2), (128, 0)).save(tmp_path / "a.png", icc_profile=profile)
    assert (read_image(tmp_path / "a.png") == 255).all()


def _grey_profile() -> bytes:
    """A profile of grey with a tone curve that is a line (ICC.1, 8.3.5)."""
    white = b"XYZ " + struct.pack(">4x3i", *(round(value * 65536) for value in (0.9642, 1, 0.8249)))
    name, curve = b"desc" + struct.pack(">4xI", 2) + b"x" + bytes(80), struct.pack(">4sII", b"curv", 0, 0)
    tags = {b"desc": name, b"wtpt": white, b"kTRC": curve}
    table, body = struct.pack(">I", len(tags)), b""
    for tag, data in tags.items():
        table += struct.pack(">4sII", tag, 128 + 4 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = 128 + len(table) + len(body)
    head = struct.pack(">I4xI4s4s4s12x4s28x", size, 0x02400000, b"mntr", b"GRAY", b"XYZ ", b"acsp") + white[8:]
    return head.ljust(128, b"\0") + table + body


def _linear_profile() -> bytes:
    """The sRGB profile with tone curves that are lines (ICC.1, type curv with no entries)."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack(">I", data[128:132])
    for i in range(count):
        tag, at, _ = struct.unpack(">4sII", data[132 + 12 * i : 144 + 12 * i])
        if tag in (b"rTRC", b"gTRC", b"bTRC"):
            data[at : at + 12] = struct.pack(">4sII", b"curv", 0, 0)
    return bytes(data)
