"""The decoder with a cache: it takes the prefix of each sequence, then the steps of one latent frame after the other.

A row is one sequence of the batch: the conditional or the unconditional branch of a sample. Rows share
every matrix product. Each has its own prefix and its own length in a preallocated cache, without
padding. Attention needs no mask, because a frame attends to the whole cache and to itself. A finished
frame enters the cache in the same forward pass as the first step of the next frame. What a step does
with the hidden states is decided in `sampling.py`.

Shapes: R rows, n tokens of a frame's span, m positions, C channels, K codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lumos.models.lumos1.attention import Attend
from lumos.models.lumos1.cache import Cache, PrefixCache
from lumos.models.lumos1.modeling import LumosForVideoGeneration, Rotary, take
from lumos.models.lumos1.rope import frame_positions, position_ids
from lumos.models.lumos1.sequence import FRAME_HEADER, Frame, SequenceLayout, content_mask, parse_layout, read_frame
from lumos.pipeline.placement import is_spread

STATES_BYTES = 2**24  # size of a layer's input in one forward pass of several rows; larger products are not faster on a CPU


class DecodingEngine:
    """The decoder with a cache.

    Call `prefill` once. Then, for each latent frame, call `hidden` or `denoise` for each step and
    `commit` at the end. The argument `committing` of `hidden` joins the commit of a frame with the
    first step of the next. If the prompt changes within a clip, call `prefill` again with the frames
    so far. All methods take ids, so a recorded run can be replayed through them.
    """

    def __init__(self, model: LumosForVideoGeneration):
        self.model = model
        self.cache: Cache | None = None
        self.frames_done = 0
        self._lengths: list[int] = []  # tokens of each row so far, with those of evicted frames
        self._origins: list[int] = []
        self._frame: Frame | None = None
        self._rotary: dict[int, Rotary] = {}

    @torch.inference_mode()
    def prefill(
        self, prefixes: Sequence[Tensor], capacity: int, prefix_cache: PrefixCache | None = None, history: int | None = None,
        thinning: bool = False,
    ) -> None:  # fmt: skip
        """Allocate the cache and fill it with the prefix of each row.

        Equal prefixes are computed once.

        Args:
            prefixes: ids [L_r] of each row, ending before a frame. All rows must have the same number of
                given frames, the frames that the clip continues, at the same times. The first may be followed
                by a picture of the last frame, whose time is stated.
            capacity: the most tokens that a row of the cache will hold.
            prefix_cache: the prefix cache; the last row is loaded from it if possible, else saved in it.
            history, thinning: history_frames and history_thinning of GenerationSettings. If `history` is
                set, given frames after the first are committed one by one, so that evictions happen as
                they do in generation.

        Raises ValueError for rows with different numbers of given frames, and for a frame with a stated time
        and a bounded history.
        """
        config, layouts = self.model.config, [parse_layout(p[None], self.model.config)[0] for p in prefixes]
        layouts = [SequenceLayout(len(p), layout.frames) for p, layout in zip(prefixes, layouts, strict=True)]
        times = {layout.times for layout in layouts}
        if len(times) > 1:
            raise ValueError(f"rows with different numbers of given frames, or at different times: {sorted(times)}")
        self.frames_done = layouts[0].num_latent_frames
        if history is not None and len(layouts[0].frames) > self.frames_done:
            raise ValueError("a bounded history does not work with a frame whose time is stated")
        if history is not None and self.frames_done > 1:
            spans = [[p[f.start : f.end] for f in layout.frames] for p, layout in zip(prefixes, layouts, strict=True)]
            begin = [p[: layout.frames[0].end] for p, layout in zip(prefixes, layouts, strict=True)]
            self.prefill(begin, capacity, prefix_cache, history, thinning)
            for frame in list(zip(*spans, strict=True))[1:]:
                self.commit(torch.stack(frame))
            return
        self.cache = None  # frees the old cache before the new one is allocated
        self.cache = Cache(self.model, len(prefixes), capacity, history, thinning)
        self._lengths = [layout.length for layout in layouts]
        self._origins = [layout.origin or layout.length + FRAME_HEADER for layout in layouts]
        self.cache.firsts = [origin - FRAME_HEADER for origin in self._origins]
        self.cache.frames = list(range(self.frames_done))
        self._frame, self._rotary = None, {}

        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, prefix in enumerate(prefixes):
            rows_of.setdefault(tuple(prefix.tolist()), []).append(row)
        stored = prefix_cache.load(self.model, prefixes[-1]) if prefix_cache else None
        if stored is not None:
            for row in rows_of.pop(tuple(prefixes[-1].tolist())):
                self.cache.write(row, *stored)
        firsts = [rows[0] for rows in rows_of.values()]
        for layout in dict.fromkeys(layouts[row] for row in firsts):
            rows = [row for row in firsts if layouts[row] == layout]
            same = [layout] * len(rows)
            rotary = self.model.rotary(position_ids(same, layout.length, config), content_mask(same, layout.length))
            ids = torch.stack([prefixes[row] for row in rows]).to(self.model.device)
            self.model.model(ids, rotary, self.cache.store(rows, same))
        for first, *others in rows_of.values():
            for row in others:
                self.cache.write(row, *self.cache.read(first))
        if prefix_cache and stored is None:
            prefix_cache.save(self.model, prefixes[-1], self.cache.read(len(prefixes) - 1))

    @torch.inference_mode()
    def hidden(self, frame_ids: Tensor, at: Tensor, committing: Tensor | None = None, only: Tensor | None = None) -> Tensor:
        """Run one step on the frame after the cache and return hidden states [R, m, C].

        The cache does not change, except by `committing`.

        Args:
            frame_ids: ids [R, n] of the frame's span. Without `committing`, it may hold only the first rows of the batch.
            at: int64 [R, m], the offsets in the span whose hidden states are returned.
            committing: ids [R, n] of the finished frame before this one, with the history mask on it.
                The same forward pass appends it to the cache.
            only: int64 [R, p], the offsets of the tokens that run, padded with 0 at the end; None stands for all.
                `at` is among them. The keys and values of the frame's other tokens are those of the last step that
                ran them, so the first step of a frame, and the first step of a row, must run all.
        """
        n = frame_ids.shape[1]
        if only is not None:
            return self._run_some(frame_ids, at, only)
        if committing is None:
            return self._forward(frame_ids, n, at)
        hidden = self._forward(torch.cat([committing, frame_ids], dim=1), n, at + n, stay=1)
        self._advance(n)
        return hidden

    @torch.inference_mode()
    def denoise(
        self, frame_ids: Tensor, at: Tensor | None = None, committing: Tensor | None = None, only: Tensor | None = None
    ) -> Tensor:
        """Return logits fp32 [R, m, K] in place of hidden states; the arguments are those of `hidden`.

        at: None stands for all codes of the frame, in row-major order.
        """
        if at is None:
            at = code_offsets(self._read_frame(frame_ids)).to(self.model.device).expand(len(frame_ids), -1)
        return self.model.lm_head(self.hidden(frame_ids, at, committing, only), visual_only=True).float()

    @torch.inference_mode()
    def commit(self, frame_ids: Tensor) -> None:
        """Append a finished frame to the cache: frame_ids [R, n], with the history mask on them."""
        rows, n = frame_ids.shape
        self._forward(frame_ids, n, torch.empty(rows, 0, dtype=torch.int64, device=self.model.device), stay=1)
        self._advance(n)

    def _forward(self, ids: Tensor, n: int, at: Tensor, stay: int = 0) -> Tensor:
        """Run the decoder on one frame [R, n] or two consecutive frames [R, 2 n] after the cache.

        The first `stay` of these frames enter the cache. Returns hidden states [R, m, C] of the offsets `at`.
        """
        tables = [self._frame_rotary(ids[:, :n], ahead) for ahead in range(ids.shape[1] // n)]
        rotary = tables[0] if len(tables) == 1 else tuple(torch.cat(t, dim=2) for t in zip(*tables, strict=True))
        return self._run(ids, rotary, at, lambda rows: self.cache.extend(n, rows, stay))

    def _run_some(self, frame_ids: Tensor, at: Tensor, only: Tensor) -> Tensor:
        """Run the tokens `only`, int64 [R, p], of the frame [R, n] after the cache; `hidden` explains the arguments."""
        rows, n = frame_ids.shape
        only = torch.where(only > 0, only, only[:, :1])  # padding repeats a token, which writes the same keys and values twice
        index = torch.arange(only.shape[1], device=only.device).expand_as(only)
        places = torch.zeros_like(frame_ids).scatter_(1, only, index).gather(1, at)  # of `at` among `only`
        rotary = tuple(take(table[:rows, 0], only)[:, None] for table in self._frame_rotary(frame_ids, 0))
        ids = frame_ids.gather(1, only)
        return self._run(ids, rotary, places, lambda rows: self.cache.refresh(n, rows, only[rows.start : rows.stop]))

    def _run(self, ids: Tensor, rotary: Rotary, at: Tensor, attention: Callable[[range], Attend]) -> Tensor:
        """Run the decoder on ids [R, L], some rows at a time, and return the hidden states [R, m, C] of the places `at`.

        attention: returns the attention of a range of rows.
        """
        row_bytes = ids.shape[1] * self.model.config.hidden_size * self.model.dtype.itemsize
        # With a device_map, layers move to the device in every forward pass, so all rows go through in one.
        size = len(ids) if is_spread(self.model) else max(1, STATES_BYTES // row_bytes)
        ids, hidden = ids.to(self.model.device), []
        for rows in (range(start, min(start + size, len(ids))) for start in range(0, len(ids), size)):
            some = slice(rows.start, rows.stop)
            hidden.append(self.model.model(ids[some], tuple(table[some] for table in rotary), attention(rows), at[some]))
        return torch.cat(hidden) if len(hidden) > 1 else hidden[0]

    def _advance(self, n: int) -> None:
        self._rotary.pop(self.frames_done, None)
        self.cache.advance(n)
        self._lengths = [length + n for length in self._lengths]
        self.frames_done += 1

    def _read_frame(self, frame_ids: Tensor) -> Frame:
        """Return the shape of a frame. It is read from the ids only once, because reading makes the host wait for the device."""
        if self._frame is None:
            self._frame = read_frame(frame_ids[0].tolist(), 0, self.model.config)
        return self._frame

    def frame_position_ids(self, frame_ids: Tensor, ahead: int = 0) -> Tensor:
        """Return the rotary positions, int64 [R, 3, n], of the frame after the cache, or of the frame `ahead` frames later."""
        frame, config = self._read_frame(frame_ids), self.model.config
        places = [Frame(length + ahead * frame.end, frame.rows, frame.cols) for length in self._lengths]
        index = self.frames_done + ahead
        return torch.stack([frame_positions(p, index, o, config) for p, o in zip(places, self._origins, strict=True)])

    def _frame_rotary(self, frame_ids: Tensor, ahead: int) -> Rotary:
        """Return the rotary tables of a frame in all rows. They are cached, as all steps of a frame use the same."""
        index = self.frames_done + ahead
        if index not in self._rotary:
            is_content = torch.zeros(len(self._lengths), frame_ids.shape[1], dtype=torch.bool)
            is_content[:, FRAME_HEADER:-1] = True
            self._rotary[index] = self.model.rotary(self.frame_position_ids(frame_ids, ahead), is_content)
        return self._rotary[index]


def code_offsets(frame: Frame) -> Tensor:
    """Return the offsets of the codes in a frame's span, int64 [h * w] in row-major order."""
    grid = torch.arange(frame.content_length).view(frame.rows, frame.cols + 1)[:, :-1]
    return grid.flatten() + FRAME_HEADER


def cache_tokens(text: int, span: int, frames: int, history: int | None = None) -> int:
    """Return the most tokens that a row of the cache holds.

    text: tokens before the frames. span: tokens of a frame. frames: latent frames of the clip.
    history: the most frames that stay besides the first, None for all.

    The frame that is being decoded needs its place too, so a bounded cache holds the first frame,
    `history` others and one more. The last frame of a clip is counted although it is never committed.
    """
    return text + span * (frames if history is None else min(frames, 1 + history + 1))
