"""Clips that are read with FFmpeg: which stream is the film, when each frame is shown, and what it looks like.

A frame is on screen from its presentation time on. AVI, ASF and raw streams have none, and FFmpeg guesses wrongly where frames
are stored in another order than they are shown. AVI and ASF have times of decoding: without B-frames they are those of
presentation; with them, a decoder gives out its first frame when it has read as many packets as it holds back, and then one frame
with each packet. In a raw stream, frame k is shown at k / rate. Frames that the file hides, for example behind an edit list, do
not exist.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from PIL import Image

from lumos.errors import UserError
from lumos.video.boxes import most_edits
from lumos.video.frames import picture_rgb
from lumos.video.hdr import check_transfer

PADDING = 2**21
"""Extra pixels of a coded frame, whose sides are padded to whole blocks."""
# Formats such as playlists, which make FFmpeg open other files or URLs, are not allowed, and the only protocol is "file".
AV_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,vvc,av1,obu,ivf,ogg,flv,"
                        "asf,mxf,dv,nut,rm,mjpeg,yuv4mpegpipe,gif,apng",
    "protocol_whitelist": "file",
}
PROBED_PACKETS = 64
"""Packets at the start in which one without a presentation time is searched for."""
NOT_THE_FILM = Disposition.attached_pic | Disposition.timed_thumbnails
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Decoders that read the alpha channel, which FFmpeg's own decoders of these codecs ignore."""
DECODING_TIMES = ("avi", "asf")
"""Containers whose times are those at which packets are decoded, and not those at which frames are shown."""
INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
"""Containers with an index of their frames, by which FFmpeg finds a place without reading the file up to it."""
ROUNDING = 1e-3
"""Largest error in seconds of a time stamp, as many files have or had time stamps in whole milliseconds, rounded or cut."""
RAW_RATES = {"h264": "codec", "hevc": "codec", "m4v": "guessed", "mpegvideo": "guessed"}
"""Raw streams, whose times and average rate are guessed by FFmpeg, and where the rate that they state is found."""
BEFORE_ALL = -(2**40)
"""A time stamp before that of every frame."""


@dataclass(frozen=True)
class Shown:
    """A frame and the time that it is on screen, in seconds from the start of the clip."""

    begin: float
    end: float
    rgb: Callable[[], np.ndarray]


class AvClip:
    """A clip that is read with FFmpeg.

    A frame counts as on screen a little before its time stamp (half a clock tick, at least 1.1 ms),
    because many files have time stamps in whole milliseconds: the frame at 0.067 s is the frame for
    2/30 s.
    """

    rounding = ROUNDING

    def __init__(self, path: Path, max_pixels: int, threads: int, form: str | None = None):
        """form: FFmpeg's name of the format of the file; None: FFmpeg finds it out."""
        self.path, self.max_pixels, self.threads, self.form = path, max_pixels, threads, form
        self._kept: tuple[Any, Any] | None = None
        self._in_use = False
        with self._open() as (container, stream):
            aspect = stream.sample_aspect_ratio or Fraction(1)
            self.aspect = aspect if aspect > 0 else Fraction(1)
            self._check_size(stream.codec_context.width, stream.codec_context.height)
            self.fps = float(stream.average_rate or stream.guessed_rate or Fraction(25))
            self.tick = float(stream.time_base)
            self.early = max(self.tick / 2, ROUNDING + 1e-4) + 1e-6
            self.length = None if stream.duration is None else stream.duration * self.tick
            packets = (packet for packet in container.demux(stream) if packet.size)
            self.of_decoding = container.format.name in DECODING_TIMES
            if container.format.name.startswith("mov") and stream.codec_context.has_b_frames and most_edits(path) > 1:
                raise UserError(
                    f"{path} shows several pieces of its film (an edit list) and has B-frames, and FFmpeg reads the times of such "
                    "pieces wrong; export it as one piece from the program that cut it"
                )
            probed = [self._time_of(packet) for packet in islice(packets, PROBED_PACKETS)]
            has_times = None not in probed
            self.raw = container.format.name in RAW_RATES
            self.stamped = has_times and not self.raw and not (self.of_decoding and stream.codec_context.has_b_frames)
            start = stream.start_time
            if has_times and probed and (self.of_decoding or start is None):
                start = probed[0] if self.of_decoding else min(probed)
            self.origin = (start or 0) * self.tick
            if (stated := RAW_RATES.get(container.format.name)) is not None:
                rate = stream.codec_context.framerate if stated == "codec" else stream.guessed_rate
                self.fps = float(rate or stream.guessed_rate or self.fps)
            elif not has_times:
                self.fps = float(stream.guessed_rate or self.fps)

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        """Yield the container and the stream of the film, at its begin.

        A file that is read by its index is opened once and kept until `close`. Other files are opened anew each time, and so is
        one that is in use.
        """
        if self._in_use:
            with closing(self._new_container()) as container:
                yield container, self._film(container)
            return
        if self._kept is None:
            container = self._new_container()
            self._kept = container, self._film(container)
        else:
            container, stream = self._kept
            container.seek(BEFORE_ALL, stream=stream)
        self._in_use = True
        try:
            yield self._kept
        except GeneratorExit:  # the reader of the frames needs no more of them
            raise
        except BaseException:
            self.close()
            raise
        finally:
            self._in_use = False
            if self._kept is not None and self._kept[0].format.name not in INDEXED:
                self.close()

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._kept is not None:
            self._kept[0].close()
            self._kept = None

    def _new_container(self) -> Any:
        # The options of `av.open` apply to the decoders with which FFmpeg probes a stream. The decoder of the
        # stream has its own options, so the limit is set there as well.
        # The path is absolute, so that FFmpeg does not take a part of a name such as "concat:a" for a protocol.
        return av.open(str(self.path.resolve()), format=self.form, metadata_errors="replace", options=AV_OPTIONS | self._limit)

    @property
    def _limit(self) -> dict[str, str]:
        return {"max_pixels": str(self.max_pixels + PADDING)}

    def _film(self, container: Any) -> Any:
        films = [stream for stream in container.streams.video if not stream.disposition & NOT_THE_FILM]
        if not films:
            container.close()
            raise UserError(f"{self.path} holds no video; give a file with a video stream")
        stream = next((stream for stream in films if stream.disposition & Disposition.default), films[0])
        stream.codec_context.options = self._limit
        stream.thread_type, stream.codec_context.thread_count = "AUTO", self.threads
        return stream

    def last_time(self) -> float:
        """Return the time in seconds at which the last frame comes on screen: the largest one of `times`.

        Where the file has an index, only the packets from the last key frame on are read. No frame before that one is shown
        later, as the frames between two key frames are shown between them. UserError as for `times`.
        """
        if self.stamped:
            with self._open() as (container, stream):
                length = (container.duration or 0) / av.time_base if self.length is None else self.length
                if container.format.name in INDEXED and length > 0:
                    container.seek(int((self.origin + length) / self.tick), stream=stream)
                    if found := self._stamped_times(container, stream):
                        return max(found)
        return max(self.times())

    def _time_of(self, found: Any) -> int | None:
        """Return the time stamp of a packet or frame, for streams in which it is the time of presentation."""
        return found.dts if self.of_decoding else found.pts

    def _stamped_times(self, container: Any, stream: Any) -> list[float]:
        """Return the times of the packets that are shown, from the present place in the file on."""
        shown = (self._time_of(packet) for packet in container.demux(stream) if packet.size and not packet.is_discard)
        return [max(time * self.tick - self.origin, 0.0) for time in shown if time is not None]

    def times(self) -> list[float]:
        """Return the time in seconds at which each frame comes on screen, in no particular order.

        They are read from the packets without decoding, except in raw streams. Raises UserError if there is no frame.
        """
        with self._open() as (container, stream):
            if self.stamped:
                found = self._stamped_times(container, stream)
            else:
                found = self._times_in_order(container, stream)
        if not found:
            with self._open() as (container, stream):
                found = [number / self.fps for number, _ in enumerate(self._decoded(container, stream))]
        if not found:
            raise self._no_frame()
        return found

    def _times_in_order(self, container: Any, stream: Any) -> list[float]:
        """Return the times at which frames are shown, from the packets' times of decoding, in order.

        [] if a packet has none, and in a raw stream.
        """
        if self.raw:
            return []
        stamps = [packet.dts for packet in container.demux(stream) if packet.size]
        if None in stamps or not stamps:
            return []
        stamps.sort()
        times = [(stamp - stamps[0]) * self.tick for stamp in stamps]
        steps = [after - before for before, after in pairwise(times)]
        if not steps or max(steps) - min(steps) <= 2 * ROUNDING:
            return times  # how many frames the decoder holds back makes no difference
        held = min(self._held_back(stamps), len(times) - 1)
        after_end = (times[-1] + number / self.fps for number in range(1, held + 1))
        return [time - times[held] for time in (*times[held:], *after_end)]

    def _held_back(self, stamps: list[int]) -> int:
        """Return the most packets, with these times of decoding, that the decoder reads before it gives out an earlier frame."""
        with self._open() as (container, stream):
            decoded = [frame.dts for frame in islice(self._decoded(container, stream), PROBED_PACKETS)]
        place = {stamp: number for number, stamp in enumerate(stamps)}
        return max((place.get(stamp, 0) - number for number, stamp in enumerate(decoded)), default=0)

    def frames(self, start: float) -> Iterator[Shown]:
        """Yield the frames in order, beginning with the frame that is on screen at ``start`` or an earlier one."""
        if start > 1 and self.stamped:
            near = self._decode(start)
            first = next(near, None)
            if first is not None and first.begin <= start:
                yield first
                yield from near
                return
        yield from self._decode(None)

    def _decode(self, seek: float | None) -> Iterator[Shown]:
        """Yield the frames from a key frame at or before ``seek`` seconds; None: from the first frame."""
        with self._open() as (container, stream):
            times = [] if self.stamped else self._times_in_order(container, stream)
        with self._open() as (container, stream):
            if seek is not None:
                container.seek(int((seek + self.origin) / self.tick), stream=stream)
            held, held_begin = None, 0.0
            for number, frame in enumerate(self._decoded(container, stream)):
                if not self.stamped:
                    begin = (times[number] if number < len(times) else number / self.fps) - self.early
                elif (stamp := self._time_of(frame)) is None:
                    begin = 0.0 if held is None else held_begin + 1 / self.fps
                else:
                    begin = stamp * self.tick - self.origin - self.early
                if held is not None:
                    yield Shown(held_begin, begin, partial(self._rgb, held))
                held, held_begin = frame, begin
            if held is None:
                raise self._no_frame()
            end = held_begin + (held.duration * self.tick if held.duration and self.stamped else 1 / self.fps)
            if self.length is not None and end < 0.9 * self.length - 0.1:
                raise UserError(f"{self.path} is cut off: {end:.1f} s of {self.length:.1f} s are there; copy it again")
            yield Shown(held_begin, end, partial(self._rgb, held))

    def _decoded(self, container: Any, stream: Any) -> Iterator[av.VideoFrame]:
        """Yield each decoded frame; raise UserError for a frame of more than ``max_pixels``, and for HDR video."""
        check_transfer(self.path, stream.codec_context.color_trc, "video")  # some decoders do not pass it on to their frames
        try:
            for frame in self._frames_of(container, stream):
                self._check_size(frame.width, frame.height)
                check_transfer(self.path, frame.color_trc, "video")
                yield frame
        except av.error.ArgumentError as error:  # the error of a decoder for a frame above `max_pixels`
            raise UserError(
                f"cannot read the video {self.path}: it holds a frame of more than {self.max_pixels / 1e6:g} megapixels, which is "
                "the limit, or is damaged; make it smaller or convert it to mp4 (H.264)"
            ) from error

    def _frames_of(self, container: Any, stream: Any) -> Iterator[av.VideoFrame]:
        codec = stream.codec_context
        name = ALPHA_DECODERS.get(codec.name)
        if name is None or {key.lower(): value for key, value in stream.metadata.items()}.get("alpha_mode") != "1":
            yield from container.decode(stream)
            return
        decoder = av.CodecContext.create(name, "r")
        decoder.extradata, decoder.options, decoder.thread_count = codec.extradata, codec.options, self.threads
        for packet in container.demux(stream):
            yield from decoder.decode(packet if packet.size else None)

    def _rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """Return a decoded frame as it is shown, uint8 [H, W, 3]: with square pixels, turned and mirrored as the file says."""
        if any(component.is_alpha for component in frame.format.components):
            rgb = picture_rgb(Image.fromarray(frame.to_ndarray(format="rgba")))
        else:
            rgb = frame.to_ndarray(format="rgb24")
        if self.aspect != 1:
            wide = max(1, round(rgb.shape[1] * self.aspect))
            rgb = np.asarray(Image.fromarray(rgb).resize((wide, rgb.shape[0]), Image.Resampling.BICUBIC))
        matrix = frame.side_data.get("DISPLAYMATRIX")
        return rgb if matrix is None else displayed(rgb, struct.unpack("9i", bytes(matrix)))

    def _check_size(self, width: int, height: int) -> None:
        check_pixels(self.path, max(width, round(width * self.aspect)), height, self.max_pixels)

    def _no_frame(self) -> UserError:
        return UserError(f"{self.path} holds no frame that can be decoded; convert it to mp4 (H.264)")


def displayed(picture: np.ndarray, matrix: tuple[int, ...]) -> np.ndarray:
    """Return a picture [H, W, C] as a display matrix shows it, for right angles and mirrors.

    matrix: a b u c d v x y w by rows, which maps the point (column, row) to (a column + c row, b column + d row). Other
    angles are rounded to the nearest of these.
    """
    a, b, _, c, d, *_ = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):  # rows become columns
        picture, across, down = picture.swapaxes(0, 1), c, b
    else:
        across, down = a, d
    picture = picture[:, ::-1] if across < 0 else picture
    return np.ascontiguousarray(picture[::-1] if down < 0 else picture)


def check_pixels(path: str | Path, width: int, height: int, max_pixels: int, of: str = "") -> None:
    """Raise UserError if a picture or frame has more than ``max_pixels`` pixels."""
    if width * height > max_pixels:
        raise UserError(
            f"{path} has {of}{width}x{height} pixels ({width * height / 1e6:.1f} megapixels); the limit is "
            f"{max_pixels / 1e6:g} megapixels: make it smaller"
        )
