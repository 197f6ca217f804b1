"""Clips that are read with FFmpeg: which stream is the film, when each frame is shown, and what it looks like.

A frame is on screen from its presentation time on. AVI, ASF and raw streams have none, and FFmpeg guesses wrongly where frames
are stored in another order than they are shown. AVI and ASF have times of decoding: without B-frames they are those of
presentation; with them, a decoder gives out its first frame when it has read as many packets as it holds back, and then one frame
with each packet. In a raw stream, frame k is shown at k / rate. Frames that the file hides, for example behind an edit list, do
not exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.codec.context import Flags
from av.stream import Disposition

from lumos.errors import UserError
from lumos.video.av_picture import rgb_of
from lumos.video.boxes import edit_lists
from lumos.video.cropping import cropping_of
from lumos.video.hdr import check_codec_tag, check_transfer
from lumos.video.matroska import stated_bytes

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
SEEK_MARGINS = (0, 3, 15)
"""Seconds before the wanted time to which FFmpeg is sent, in turn: without an index it may land behind the last key frame."""
JUMP = 0.1
"""Most seconds by which the time of a frame may lie before that of the frame before it. In joined recordings it is more."""
BROADCASTS = ("mpegts", "mpeg")
"""Containers of streams that begin and end anywhere: their last packet may be cut off, and its frame is left out."""
ORDERED = "mpegts"
"""The container whose times of decoding are those of the file; in others, FFmpeg guesses some, and they may jump back."""
STILL_CODECS = ("mjpeg", "png", "bmp", "tiff", "gif", "webp")
"""Codecs of pictures, in which a thumbnail beside a film is stored."""
UNTIMED = "mpeg"
"""A container in which not every frame has a time stamp. FFmpeg counts on from the last one, but behind a seek it has none."""
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
    2/30 s. Where a frame lasts a whole number of ticks, as in AVI, which counts frames, it is 1.1 ms,
    as nothing is rounded.
    """

    rounding = ROUNDING

    def __init__(self, path: Path, max_pixels: int, threads: int, form: str | None = None):
        """form: FFmpeg's name of the format of the file; None: FFmpeg finds it out."""
        self.path, self.max_pixels, self.threads, self.form = path, max_pixels, threads, form
        self._kept: tuple[Any, Any] | None = None
        self._in_use = False
        self._number: int | None = None
        with self._open() as (container, stream):
            aspect = stream.sample_aspect_ratio or Fraction(1)
            size = stream.codec_context.width, stream.codec_context.height
            self.cropping = cropping_of(path, container.format.name, stream.index, *size)
            self.aspect = self.cropping.aspect or (aspect if aspect > 0 else Fraction(1))
            self._check_size(*size)
            self.fps = float(stream.average_rate or stream.guessed_rate or Fraction(25))
            self.tick = float(stream.time_base)
            packets = (packet for packet in container.demux(stream) if packet.size)
            self.of_decoding = container.format.name in DECODING_TIMES
            # PyAV frees the name of the profile of a PNG twice if it is asked for what stands beside the pixels.
            self.is_png = stream.codec_context.name in ("png", "apng")
            # In a bitmap of 32 bits, of which such an AVI consists, the fourth byte of a pixel has no meaning, and is often 0.
            self.is_plain = container.format.name == "avi" and stream.codec_context.name == "rawvideo"
            is_mov = container.format.name.startswith("mov")
            begins_with_gap = is_mov and self._check_edits(bool(stream.codec_context.has_b_frames))
            first = list(islice(packets, PROBED_PACKETS))
            probed = [self._time_of(packet) for packet in first]
            has_times = None not in probed
            self.raw = container.format.name in RAW_RATES
            self.stamped = has_times and not self.raw and not (self.of_decoding and stream.codec_context.has_b_frames)
            start = stream.start_time
            if has_times and probed and (self.of_decoding or start is None):
                start = probed[0] if self.of_decoding else min(probed)
            # A fragmented mp4 stores what its edit list hides at the begin, and it has times below 0.
            self.origin = max(start or 0, 0 if is_mov else BEFORE_ALL) * self.tick
            # From where the stated duration counts: AVI, and a film behind a gap, count what stands before the first frame.
            begin = self.origin if stream.start_time is None else stream.start_time * self.tick
            begin = 0.0 if self.of_decoding or begins_with_gap else begin
            duration = stream.duration
            if self.stamped and probed and not self.of_decoding and not is_mov:
                self.fps = _usual_rate(self.fps, [time * self.tick for time in probed])
            if (stated := RAW_RATES.get(container.format.name)) is not None:
                rate = stream.codec_context.framerate if stated == "codec" else stream.guessed_rate
                self.fps = float(rate or stream.guessed_rate or self.fps)
            elif not has_times and stream.codec_context.framerate != stream.average_rate:  # else the codec states it
                self.fps = float(stream.guessed_rate or self.fps)
            indexed = container.format.name in INDEXED
            self.seekable = self.stamped and container.format.name != UNTIMED
        ticks = 1 / (self.fps * self.tick)  # of the clock in a frame
        is_exact = ticks > 0.5 and abs(ticks - round(ticks)) < 1e-3
        self.early = max(0 if is_exact else self.tick / 2, ROUNDING + 1e-4) + 1e-6
        if self.stamped and not indexed and not self.of_decoding and not _begins_with_key_frame(first):
            self.origin = self._first_shown()
        self.length = None if duration is None else duration * self.tick - (self.origin - begin)

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
        if self._number is None:
            self._number = self._number_of_film(container)
        stream = container.streams[self._number]
        codec = stream.codec_context
        codec.options = self._limit
        codec.flags |= Flags.unaligned  # without it, a few columns at the left that a film hides would be shown
        stream.thread_type, codec.thread_count = "AUTO", self.threads
        return stream

    def _number_of_film(self, container: Any) -> int:
        """Return the number of the default stream, or of the first one; a stream of one picture beside others is a thumbnail."""
        films = [stream for stream in container.streams.video if not stream.disposition & NOT_THE_FILM]
        if not films:
            container.close()
            raise UserError(f"{self.path} holds no video; give a file with a video stream")
        films.sort(key=lambda stream: not stream.disposition & Disposition.default)
        film = films[0]
        if len(films) > 1 and film.codec_context.name in STILL_CODECS:
            with closing(self._new_container()) as other:
                packets = (packet for packet in other.demux([other.streams[stream.index] for stream in films]) if packet.size)
                of_film = [packet for packet in islice(packets, PROBED_PACKETS) if packet.stream_index == film.index]
            film = films[len(of_film) < 2]
        return film.index

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

    def _check_edits(self, has_b_frames: bool) -> bool:
        """Return whether an edit list of an mp4 or mov file begins with a gap; UserError if FFmpeg reads its times wrong."""
        lists = edit_lists(self.path)
        for edits in lists:
            shown = [edit for edit in edits if edit.is_shown]
            if not all(edit.is_usual_speed for edit in shown):
                raise UserError(
                    f"{self.path} plays its film slower or faster than it was recorded (an edit list), which cannot be read; "
                    "export it from a program for video"
                )
            has_gaps = any(before.is_shown and not edit.is_shown for before, edit in pairwise(edits))
            if has_gaps or (len(shown) > 1 and has_b_frames):
                what = "a gap behind a piece of its film" if has_gaps else "several pieces of its film"
                raise UserError(
                    f"{self.path} shows {what} (an edit list){'' if has_gaps else ' and has B-frames'}, and FFmpeg reads the times "
                    "wrong; export it as one piece from the program that cut it"
                )
        return any(edits and not edits[0].is_shown for edits in lists)

    def _time_of(self, found: Any) -> int | None:
        """Return the time stamp of a packet or frame, for streams in which it is the time of presentation."""
        return found.dts if self.of_decoding else found.pts

    def _stamped_times(self, container: Any, stream: Any) -> list[float]:
        """Return the times of the packets that are shown, from the present place in the file on."""
        times = []
        for packet in self._packets(container, stream):
            if packet.is_discard or packet.is_corrupt or not packet.size:
                continue
            if (stamp := self._time_of(packet)) is not None:
                times.append(stamp * self.tick - self.origin)
        return [max(time, 0.0) for time in times if time >= -self.early]

    def _packets(self, container: Any, stream: Any) -> Iterator[av.Packet]:
        """Yield the packets from the present place in the file on; raise UserError if their times of decoding jump back."""
        decoded = -math.inf
        for packet in container.demux(stream):
            if packet.size and packet.dts is not None and container.format.name == ORDERED:
                self._check_order(decoded, decoded := packet.dts * self.tick)
            yield packet

    def _check_order(self, before: float, time: float) -> None:
        if time < before - JUMP:
            raise UserError(
                f"the times in {self.path} jump back by {before - time:.1f} s, as in recordings that were joined byte by byte; "
                "join them with a program for video, or convert the file to mp4 (H.264)"
            )

    def _first_shown(self) -> float:
        """Return the time stamp in seconds of the first frame that can be decoded: a broadcast may begin between key frames."""
        with suppress(av.FFmpegError), self._open() as (container, stream):
            for frame in container.decode(stream):
                if frame.pts is not None:
                    return frame.pts * self.tick
        return self.origin

    def times(self) -> list[float]:
        """Return the time in seconds at which each frame comes on screen, in no particular order.

        They are read from the packets without decoding, except in raw streams. Raises UserError if there is no frame.
        """
        with self._open() as (container, stream):
            if self.stamped:
                found = self._stamped_times(container, stream)
            else:
                found, _ = self._times_in_order(container, stream)
        if not found:
            with self._open() as (container, stream):
                found = [number / self.fps for number, _ in enumerate(self._decoded(container, stream))]
        if not found:
            raise self._no_frame()
        return found

    def _times_in_order(self, container: Any, stream: Any) -> tuple[list[float], float]:
        """Return the times at which frames are shown, from the packets' times of decoding, in order, and what stands before them.

        ([], 0.0) if a packet has no time of decoding, and in a raw stream.
        """
        if self.raw:
            return [], 0.0
        stamps = [packet.dts for packet in container.demux(stream) if packet.size]
        if None in stamps or not stamps:
            return [], 0.0
        stamps.sort()
        times = [(stamp - stamps[0]) * self.tick for stamp in stamps]
        steps = [after - before for before, after in pairwise(times)]
        if not steps or max(steps) - min(steps) <= 2 * ROUNDING:
            return times, 0.0  # how many frames the decoder holds back makes no difference
        held = min(self._held_back(stamps), len(times) - 1)
        after_end = (times[-1] + number / self.fps for number in range(1, held + 1))
        return [time - times[held] for time in (*times[held:], *after_end)], times[held]

    def _held_back(self, stamps: list[int]) -> int:
        """Return the most packets, with these times of decoding, that the decoder reads before it gives out an earlier frame."""
        with self._open() as (container, stream):
            decoded = [frame.dts for frame in islice(self._decoded(container, stream), PROBED_PACKETS)]
        place = {stamp: number for number, stamp in enumerate(stamps)}
        return max((place.get(stamp, 0) - number for number, stamp in enumerate(decoded)), default=0)

    def frames(self, start: float) -> Iterator[Shown]:
        """Yield the frames in order, beginning with the frame that is on screen at ``start`` or an earlier one."""
        for margin in SEEK_MARGINS if self.seekable else ():
            if start - margin <= 1:
                break
            with closing(self._decode(start - margin)) as near:
                first = next(near, None)
                if first is not None and first.begin <= start:
                    yield first
                    yield from near
                    return
        yield from self._decode(None)

    def _decode(self, seek: float | None) -> Iterator[Shown]:
        """Yield the frames from a key frame at or before ``seek`` seconds; None: from the first frame.

        Nothing is yielded if FFmpeg finds no key frame with a time stamp there.
        """
        with self._open() as (container, stream):
            times, before = ([], 0.0) if self.stamped else self._times_in_order(container, stream)
        with self._open() as (container, stream):
            if seek is not None:
                container.seek(int((seek + self.origin) / self.tick), stream=stream)
            held, held_begin = None, 0.0
            for number, frame in enumerate(self._decoded(container, stream)):
                if seek is not None and held is None and (not frame.key_frame or self._time_of(frame) is None):
                    return
                if not self.stamped:
                    begin = (times[number] if number < len(times) else number / self.fps) - self.early
                elif (stamp := self._time_of(frame)) is None:
                    begin = 0.0 if held is None else held_begin + 1 / self.fps
                else:
                    begin = stamp * self.tick - self.origin - self.early
                if held is not None:
                    self._check_order(held_begin, begin)
                    yield Shown(held_begin, begin, partial(self._rgb, held))
                held, held_begin = frame, begin
            if held is None:
                if seek is not None:
                    return
                raise self._no_frame()
            # Many programs give the last frame no duration, or one of a tick, which would end before its own time.
            lasts = held.duration * self.tick if held.duration and self.stamped else 1 / self.fps
            end = held_begin + max(lasts, 2 * (self.early + ROUNDING))
            if self.length is not None and end < 0.9 * (length := self.length - before) - 0.1:
                raise UserError(f"{self.path} is cut off: {end:.1f} s of {length:.1f} s are there; copy it again")
            there = self.path.stat().st_size
            if (size := stated_bytes(self.path)) is not None and size > there:
                raise UserError(f"{self.path} is cut off: {there:,} of {size:,} bytes are there; copy it again")
            yield Shown(held_begin, end, partial(self._rgb, held))

    def _decoded(self, container: Any, stream: Any) -> Iterator[av.VideoFrame]:
        """Yield each decoded frame; raise UserError for a frame of more than ``max_pixels``, and for HDR video."""
        check_transfer(self.path, stream.codec_context.color_trc, "video")  # some decoders do not pass it on to their frames
        check_codec_tag(self.path, stream.codec_context.codec_tag)
        try:
            for frame in self._frames_of(container, stream):
                self._check_size(frame.width, frame.height)
                if frame.is_corrupt:
                    raise self._damaged(frame)
                check_transfer(self.path, frame.color_trc, "video")
                yield frame
        except av.error.ArgumentError as error:  # the error of a decoder for a frame above `max_pixels`
            raise UserError(
                f"cannot read the video {self.path}: it holds a frame of more than {self.max_pixels / 1e6:g} megapixels, which is "
                "the limit, or is damaged; make it smaller or convert it to mp4 (H.264)"
            ) from error

    def _frames_of(self, container: Any, stream: Any) -> Iterator[av.VideoFrame]:
        """Yield the frames as the decoder gives them; raise UserError at a packet that is damaged.

        FFmpeg marks what it guessed always with one thread, and mostly with several.
        """
        codec = stream.codec_context
        name = ALPHA_DECODERS.get(codec.name)
        if name is None or {key.lower(): value for key, value in stream.metadata.items()}.get("alpha_mode") != "1":
            decoder = codec
        else:
            decoder = av.CodecContext.create(name, "r")
            decoder.extradata, decoder.options, decoder.thread_count = codec.extradata, codec.options, self.threads
        begun, held = False, None
        for packet in self._packets(container, stream):
            if held is not None and packet.size:
                begun = begun or held.is_keyframe
                if begun and held.is_corrupt:
                    raise self._damaged(held)
                yield from decoder.decode(held)
            if packet.size:
                held = packet
        for frame in (*(decoder.decode(held) if held is not None else ()), *decoder.decode(None)):
            may_be_cut = container.format.name in BROADCASTS and held is not None and frame.pts == held.pts
            if not (may_be_cut and (frame.is_corrupt or held.is_corrupt)):
                yield frame

    def _damaged(self, found: Any) -> UserError:
        stamp = self._time_of(found)
        place = "" if stamp is None else f" at {max(stamp * self.tick - self.origin, 0.0):.1f} s"
        return UserError(f"{self.path} is damaged{place}; copy it again, or read a part without this place")

    def _rgb(self, frame: av.VideoFrame) -> np.ndarray:
        return rgb_of(frame, self.path, self.cropping, self.aspect, self.is_png, self.is_plain)

    def _check_size(self, width: int, height: int) -> None:
        check_pixels(self.path, max(width, round(width * self.aspect)), height, self.max_pixels)

    def _no_frame(self) -> UserError:
        return UserError(f"{self.path} holds no frame that can be decoded; convert it to mp4 (H.264)")


def _usual_rate(stated: float, times: list[float]) -> float:
    """Return the frames per second that a file states, or those between its first times if the two are far apart.

    Recordings of a browser state 1000, the unit of their times.
    """
    span = max(times) - min(times)
    measured = (len(times) - 1) / span if span > 0 else stated
    return stated if 0.9 < measured / stated < 1.1 else measured


def _begins_with_key_frame(packets: list[Any]) -> bool:
    """Return whether the first packets of a stream begin with a key frame, and none of them is shown before it."""
    shown = [packet.pts for packet in packets if packet.pts is not None]
    return bool(packets) and packets[0].is_keyframe and packets[0].pts == min(shown, default=None)


def check_pixels(path: str | Path, width: int, height: int, max_pixels: int, of: str = "") -> None:
    """Raise UserError if a picture or frame has more than ``max_pixels`` pixels."""
    if width * height > max_pixels:
        raise UserError(
            f"{path} has {of}{width}x{height} pixels ({width * height / 1e6:.1f} megapixels); the limit is "
            f"{max_pixels / 1e6:g} megapixels: make it smaller"
        )
