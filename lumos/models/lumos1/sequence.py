"""The grammar of a sequence: it turns text, header and frames into one row of ids, and back.

    [bos] prompt text [sep]
    [video_start] [number: duration in s] [number: fps]
    per latent frame: [frame_start] [number: H / unit] [number: W / unit]  h rows of (w codes, [newline])  [frame_end]
    [video_end] [sep]

A frame may follow the one before it with [number: time] between them: it then stands at the time of that
latent frame. So the picture of the last frame of a clip of t latent frames, with the time t - 1, can stand
behind the first latent frame, where all others see it. The other frames have the times 0, 1, 2, ... in order.

Without a prompt (unconditional branch, text dropout) a sequence begins at video_start. The span of a frame
is all its tokens from frame_start to frame_end, and its content is the codes and newlines.
`parse_layout` reads from the ids all that the decoder needs to know of a sequence: the spans of the frames,
from which the positions follow. Source: reference, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lumos.errors import UserError
from lumos.models.lumos1.configuration import LumosConfig

FRAME_HEADER = 3  # frame_start and the two size tokens


@dataclass(frozen=True)
class Frame:
    """The place of a latent frame in a sequence: its span [start, end) with `rows` x `cols` codes.

    stated_time: the time that a number token before the span states; None without one.
    """

    start: int
    rows: int
    cols: int
    stated_time: int | None = None

    @property
    def content_length(self) -> int:
        """The number of codes and newlines, without the four tokens around them."""
        return self.rows * (self.cols + 1)

    @property
    def content_start(self) -> int:
        """The index of the first code in the sequence."""
        return self.start + FRAME_HEADER

    @property
    def end(self) -> int:
        """The index after frame_end in the sequence."""
        return self.content_start + self.content_length + 1


@dataclass(frozen=True)
class SequenceLayout:
    """The structure of one row of ids: its length without padding, and its frames in order."""

    length: int
    frames: tuple[Frame, ...]

    @cached_property
    def times(self) -> tuple[int, ...]:
        """The time of each frame, in latent frames: the stated one, else its number among frames without one."""
        times, count = [], 0
        for frame in self.frames:
            times.append(count if frame.stated_time is None else frame.stated_time)
            count += frame.stated_time is None
        return tuple(times)

    @property
    def num_latent_frames(self) -> int:
        """The number of latent frames of the clip, without a picture of its last frame."""
        return sum(frame.stated_time is None for frame in self.frames)

    @cached_property
    def segments(self) -> tuple[tuple[int, int, bool], ...]:
        """Segments (start, end, bidirectional) in order, which cover [0, length).

        A frame is a bidirectional segment; the tokens between frames are a causal one.
        """
        segments, at = [], 0
        for frame in self.frames:
            if frame.start > at:
                segments.append((at, frame.start, False))
            segments.append((frame.start, frame.end, True))
            at = frame.end
        if self.length > at:
            segments.append((at, self.length, False))
        return tuple(segments)

    @property
    def origin(self) -> int | None:
        """P0, the index of the first content token of the first frame; None without frames."""
        return self.frames[0].content_start if self.frames else None


@dataclass(frozen=True)
class Parsed:
    """The parts of a sequence.

    text_ids: None if the sequence has no text. duration: in seconds. codes: [t, h, w], -1 for the mask token.
    last: codes [h, w] of the picture of the last frame, None without one.
    """

    text_ids: list[int] | None
    duration: int
    fps: int
    codes: Tensor
    last: Tensor | None = None


def num_latent_frames(num_frames: int, temporal_compression: int = 4) -> int:
    """Return the number of latent frames of `num_frames` RGB frames.

    For a temporal compression of 4: 1 -> 1, 17 -> 5, 24 or 25 -> 7 (reference, section 6.1).
    """
    return math.ceil((num_frames - 1) / temporal_compression) + 1


def clip_header(num_frames: int, fps: int) -> tuple[int, int]:
    """Return (duration in s, fps) for the header; they are (1, 1) for a picture (reference, sections 5.4 and 9)."""
    return (1, 1) if num_frames == 1 else (max(1, round(num_frames / fps)), fps)


def prompt_text(config: LumosConfig, prompt: str, *, height: int, width: int, num_frames: int, fps: int) -> str:
    """Return the text that the decoder reads for a prompt: the filled template (reference, section 2.2).

    The published prompts state fps * duration frames. This is one less than the video tokenizer decodes, for
    example 24 for a clip of 25 frames.
    """
    stated = num_frames - 1 if num_frames > 1 else 1
    return config.prompt_template.format(prompt=prompt, height=height, width=width, num_frames=stated, fps=fps)


def number_token(value: int, what: str, config: LumosConfig) -> int:
    """Return the id of a number in the header or in a frame's size.

    what: the name of the value for the message. Raises UserError if there is no token for the number.
    """
    if not 0 <= value < config.number_token_count:
        raise UserError(f"{what} {value} has no number token; allowed: up to {config.number_token_count - 1}")
    return config.number_token_start + value


def size_units(pixels: int, what: str, config: LumosConfig) -> int:
    """Return the size units of a height or width in pixels, which the size tokens of a frame state.

    what: "height" or "width", for the message. Raises UserError for a size that the tokens cannot state.
    """
    unit, most = config.pixels_per_size_unit, config.number_token_count - 1
    if pixels <= 0 or pixels % unit:
        down = max(unit, pixels // unit * unit)
        raise UserError(f"{what} {pixels} is not a multiple of {unit}; the nearest sizes are {down} and {down + unit}")
    if pixels // unit > most:
        raise UserError(f"{what} {pixels} is too large for this model's number tokens; allowed: {unit} to {most * unit}")
    return pixels // unit


def build_prefix(text_ids: list[int] | None, *, fps: int, duration: int, config: LumosConfig) -> list[int]:
    """Return the ids before the first frame: the text, if there is any, and the video header.

    Raises ValueError if text ids are reserved, and UserError for a duration or fps without a number token.
    """
    if reserved := [i for i in text_ids or () if config.is_reserved(i)]:
        raise ValueError(f"text ids hold {reserved[0]}, a special, number or visual id of this model: the wrong text tokenizer?")
    text = [] if text_ids is None else [config.bos_token_id, *text_ids, config.sep_token_id]
    header = [
        config.video_start_token_id,
        number_token(duration, "the duration in seconds, num_frames / fps,", config),
        number_token(fps, "fps", config),
    ]
    return text + header


def build_frames(codes: Tensor, config: LumosConfig) -> Tensor:
    """Return the spans of latent frames: codes [t, h, w] -> ids [t, 4 + h * (w + 1)]. Code -1 becomes the mask token.

    Raises ValueError for codes out of range, and UserError for a size that the size tokens cannot state.
    """
    t, h, w = codes.shape
    if codes.numel() and not -1 <= int(codes.min()) <= int(codes.max()) < config.visual_token_count:
        raise ValueError(
            f"codes from {int(codes.min())} to {int(codes.max())}; allowed: 0 to {config.visual_token_count - 1}"
        )
    stride = config.spatial_compression
    size = [
        number_token(size_units(h * stride, "height", config), "height in size units", config),
        number_token(size_units(w * stride, "width", config), "width in size units", config),
    ]
    ids = torch.where(codes < 0, config.mask_token_id, codes + config.visual_token_start)
    content = torch.cat([ids, ids.new_full((t, h, 1), config.newline_token_id)], dim=2).flatten(1)
    head = ids.new_tensor([config.frame_start_token_id, *size]).expand(t, -1)
    return torch.cat([head, content, ids.new_full((t, 1), config.frame_end_token_id)], dim=1)


def last_token(time: int, config: LumosConfig) -> int:
    """Return the id of the number before the picture of a clip's last frame.

    time: the number of the last latent frame. Raises UserError if there is no token for it.
    """
    return number_token(time, "the last latent frame", config)


def build_last(codes: Tensor, time: int, config: LumosConfig) -> Tensor:
    """Return the ids [1 + n] of the picture of a clip's last frame, codes [h, w], behind the number of its time.

    The arguments and errors are those of `last_token`.
    """
    frame = build_frames(codes[None], config)[0]
    return torch.cat([frame.new_tensor([last_token(time, config)]), frame])


def build_sequence(
    text_ids: list[int] | None, codes: Tensor, *, fps: int, duration: int, config: LumosConfig, last: Tensor | None = None
) -> Tensor:
    """Return the ids [L] of a whole clip in the published layout, from text ids and codes [t, h, w].

    text_ids: None leaves the text part out. last: codes [h, w] of the picture of the last frame, which then
    stands behind the first latent frame. The errors are those of `build_prefix` and `build_frames`.
    """
    prefix = build_prefix(text_ids, fps=fps, duration=duration, config=config)
    tail = [config.video_end_token_id, config.sep_token_id]
    frames = build_frames(codes, config)
    if last is None:
        frames = frames.flatten()
    else:
        frames = torch.cat([frames[0], build_last(last, len(codes) - 1, config), frames[1:].flatten()])
    return torch.cat([frames.new_tensor(prefix), frames, frames.new_tensor(tail)])


def parse_sequence(ids: Tensor, config: LumosConfig) -> Parsed:
    """Return the parts of a sequence, ids [L]; this is the inverse of `build_sequence`.

    Raises ValueError if the ids do not follow the grammar.
    """
    row = ids.tolist()
    (layout,) = parse_layout(ids[None], config)
    if config.video_start_token_id not in row[:-2]:
        raise ValueError("the sequence has no video_start token with a header behind it")
    at = row.index(config.video_start_token_id)
    if at > 0 and (row[0] != config.bos_token_id or row[at - 1] != config.sep_token_id):
        raise ValueError("the text before video_start does not begin with bos and end with sep")
    sizes = {(f.rows, f.cols) for f in layout.frames}
    if len(sizes) > 1:
        raise ValueError(f"frames of different sizes in one sequence: {sorted(sizes)}")
    rows, cols = sizes.pop() if sizes else (0, 0)
    codes = torch.stack(
        [ids[f.content_start : f.end - 1].view(rows, cols + 1)[:, :cols] for f in layout.frames]
    ) if layout.frames else ids.new_zeros(0, 0, 0)
    codes = torch.where(codes == config.mask_token_id, -1, codes - config.visual_token_start)
    stated = torch.tensor([frame.stated_time is not None for frame in layout.frames], dtype=torch.bool)
    if stated.sum() > 1:
        raise ValueError("the sequence has several frames with a stated time; allowed: one, the picture of the last frame")
    last, codes = (codes[stated][0] if stated.any() else None), codes[~stated]
    parsed = Parsed(
        text_ids=row[1 : at - 1] if at > 0 else None,
        duration=row[at + 1] - config.number_token_start,
        fps=row[at + 2] - config.number_token_start,
        codes=codes,
        last=last,
    )
    if not layout.frames:
        raise ValueError("the sequence has no frames")
    again = build_sequence(parsed.text_ids, codes, fps=parsed.fps, duration=parsed.duration, config=config, last=last)
    length = min(len(ids), len(again))
    differs = (ids[:length] != again[:length]) & (ids[:length] != config.mask_token_id)
    if len(ids) != len(again) or differs.any():
        where = int(differs.nonzero()[0]) if differs.any() else length
        raise ValueError(f"the sequence leaves the grammar at token {where}")
    return parsed


def parse_layout(input_ids: Tensor, config: LumosConfig) -> list[SequenceLayout]:
    """Return the layout of each row of ids [B, L], which are padded on the right with pad.

    Frames are searched from the first video_start on. Equal layouts are the same object, see `by_layout`.
    Raises ValueError for a frame that is cut off or malformed.
    """
    known: dict[SequenceLayout, SequenceLayout] = {}
    found = (_row_layout(row, b, config) for b, row in enumerate(input_ids.cpu().numpy()))
    return [known.setdefault(layout, layout) for layout in found]


def _row_layout(row, sample: int, config: LumosConfig) -> SequenceLayout:
    used = (row != config.pad_token_id).nonzero()[0]
    length = int(used[-1]) + 1 if len(used) else 0
    starts = (row[:length] == config.video_start_token_id).nonzero()[0]
    frames: list[Frame] = []
    if len(starts):
        marks = (row[:length] == config.frame_start_token_id).nonzero()[0]
        at = int(starts[0])
        for mark in marks.tolist():
            if mark < at:
                continue
            frame = read_frame(row[:length], mark, config, f"frame {len(frames)} of sample {sample}")
            number = int(row[mark - 1]) - config.number_token_start
            if frames and mark == at + 1 and 0 <= number < config.number_token_count:
                frame = replace(frame, stated_time=number)
            frames.append(frame)
            at = frame.end
    return SequenceLayout(length, tuple(frames))


def read_frame(row, start: int, config: LumosConfig, what: str = "frame") -> Frame:
    """Return the frame that begins at `start` in a row of ids.

    what: the name of the frame for the message. Raises ValueError if it is cut off or malformed.
    """
    length = len(row)
    if start + FRAME_HEADER > length:
        raise ValueError(f"{what} is cut off: the sequence ends at {length}; frames must be whole")
    scale = config.pixels_per_size_unit // config.spatial_compression
    rows, cols = ((int(row[start + i]) - config.number_token_start) * scale for i in (1, 2))
    if rows <= 0 or cols <= 0:
        raise ValueError(f"{what} has no valid size tokens after its start at {start}")
    frame = Frame(start, rows, cols)
    if frame.end > length:
        raise ValueError(f"{what} is cut off: it needs {frame.end} tokens and the sequence ends at {length}")
    if row[frame.end - 1] != config.frame_end_token_id:
        raise ValueError(f"{what} ({rows} x {cols}) is not closed by frame_end at {frame.end - 1}")
    return frame


def pad_sequences(sequences: list[Tensor], value: int, multiple: int = 1) -> Tensor:
    """Stack rows of different lengths to [B, L], padded on the right with `value`.

    L is the longest length, rounded up to a multiple of `multiple`.
    """
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value)
    return torch.nn.functional.pad(padded, (0, -padded.shape[1] % multiple), value=value)


def by_layout(layouts: list[SequenceLayout], make: Callable[[SequenceLayout], Tensor]) -> Tensor:
    """Stack the results of `make` for each layout to [B, ...].

    `make` is called once for rows that share a layout object, as equal rows from `parse_layout` do.
    """
    distinct = {id(layout): layout for layout in layouts}
    number = {key: i for i, key in enumerate(distinct)}
    return torch.stack([make(layout) for layout in distinct.values()])[[number[id(layout)] for layout in layouts]]


def content_mask(layouts: list[SequenceLayout], length: int) -> Tensor:
    """Return bool [B, L], True for the codes and newlines of frames."""

    def row(layout: SequenceLayout) -> Tensor:
        mask = torch.zeros(length, dtype=torch.bool)
        for frame in layout.frames:
            mask[frame.content_start : frame.end - 1] = True
        return mask

    return by_layout(layouts, row)


def code_mask(layouts: list[SequenceLayout], length: int) -> Tensor:
    """Return bool [B, L], True for the codes of frames, without newlines."""

    def row(layout: SequenceLayout) -> Tensor:
        mask = torch.zeros(length, dtype=torch.bool)
        for frame in layout.frames:
            mask[frame.content_start : frame.end - 1].view(frame.rows, frame.cols + 1)[:, :-1] = True
        return mask

    return by_layout(layouts, row)


def frame_indices(layouts: list[SequenceLayout], length: int) -> Tensor:
    """Return int64 [B, L], the place in the sequence of the frame whose span holds the token, -1 outside of frames."""
    return by_layout(layouts, lambda layout: _by_frame(layout, range(len(layout.frames)), length))


def frame_times(layouts: list[SequenceLayout], length: int) -> Tensor:
    """Return int64 [B, L], the time of the frame whose span holds the token, -1 outside of frames.

    It is the number of the latent frame. It differs from `frame_indices` only with a picture of the last frame.
    """
    return by_layout(layouts, lambda layout: _by_frame(layout, layout.times, length))


def _by_frame(layout: SequenceLayout, values: Sequence[int], length: int) -> Tensor:
    """Return int64 [length], the value of the frame whose span holds the token, -1 outside of frames."""
    found = torch.full((length,), -1)
    for frame, value in zip(layout.frames, values, strict=True):
        found[frame.start : frame.end] = value
    return found
