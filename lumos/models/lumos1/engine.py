"""Frame-by-frame generation: prefill the prefix, then for each frame denoise it in parallel steps.

A row is one sequence in the batch: the conditional branch of a sample, or its unconditional one. Rows share every matrix
product; each has its own prefix and length in a preallocated cache, without padding. No mask is needed: a frame sees the whole
cache and itself. A finished frame enters the cache in the same forward as the first step of the next. The head multiplies
positions that are still masked by visual rows, a piece at a time, so that logits are never there as a whole; and once for both
branches, as guidance is linear. S samples, R rows, n tokens of a frame's span, m positions asked for, C channels, K codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lumos.errors import NotFinite
from lumos.models.lumos1.cache import Cache, KeptPrefix
from lumos.models.lumos1.masking import history_mask, unmasking_counts
from lumos.models.lumos1.modeling import Head, LumosForVideoGeneration, Rotary
from lumos.models.lumos1.rope import frame_positions, position_ids
from lumos.models.lumos1.sampling import filter_logits, guide, least_confident, sample_codes, unsure
from lumos.models.lumos1.sequence import (
    FRAME_HEADER,
    Frame,
    Layout,
    build_frames,
    content_mask,
    parse_layout,
    read_frame,
)
from lumos.models.lumos1.settings import GenerationSettings
from lumos.pipeline.placement import is_spread

LOGITS_BYTES = 2**24  # of the piece of the logits that exists at a time; a GPU, which wants larger products, takes eight such
STATES_BYTES = 2**24  # of a layer's input in one forward, if that takes more than one row: more make no product of a CPU faster


class Engine:
    """The decoder with a cache: `prefill`, then for each frame any number of `hidden` or `denoise`, and a `commit`.

    A commit may be part of the next frame's first step. A text that changes on the way is a `prefill` with the frames so far. The
    calls take ids, so a recorded run can be replayed through them.
    """

    def __init__(self, model: LumosForVideoGeneration):
        self.model = model
        self.cache: Cache | None = None
        self.frames_done = 0
        self._lengths: list[int] = []  # of the sequences so far, what has left the cache included
        self._origins: list[int] = []
        self._frame: Frame | None = None
        self._rotary: dict[int, Rotary] = {}

    @torch.inference_mode()
    def prefill(
        self, prefixes: Sequence[Tensor], capacity: int, kept: KeptPrefix | None = None, history: int | None = None,
        thinning: bool = False,
    ) -> None:  # fmt: skip
        """prefixes: ids [L_r] of each row, ending before a frame; capacity: cached tokens a row may reach.

        Equal prefixes are computed once, and the last row's not at all if `kept` has it from an earlier call.
        history, thinning: as history_frames and history_thinning of GenerationSettings; given frames behind the first are then
        committed one by one.
        """
        config, layouts = self.model.config, [parse_layout(p[None], self.model.config)[0] for p in prefixes]
        layouts = [Layout(len(p), layout.frames) for p, layout in zip(prefixes, layouts, strict=True)]
        frames = {len(layout.frames) for layout in layouts}
        if len(frames) > 1:
            raise ValueError(f"rows with different numbers of given frames: {sorted(frames)}")
        self.frames_done = frames.pop()
        if history is not None and self.frames_done > 1:
            spans = [[p[f.start : f.end] for f in layout.frames] for p, layout in zip(prefixes, layouts, strict=True)]
            begin = [p[: layout.frames[0].end] for p, layout in zip(prefixes, layouts, strict=True)]
            self.prefill(begin, capacity, kept, history, thinning)
            for frame in list(zip(*spans, strict=True))[1:]:
                self.commit(torch.stack(frame))
            return
        self.cache = None  # one that is there goes before the next comes
        self.cache = Cache(self.model, len(prefixes), capacity, history, thinning)
        self._lengths = [layout.length for layout in layouts]
        self._origins = [layout.origin or layout.length + FRAME_HEADER for layout in layouts]
        self.cache.firsts = [origin - FRAME_HEADER for origin in self._origins]
        self.cache.frames = list(range(self.frames_done))
        self._frame, self._rotary = None, {}

        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, prefix in enumerate(prefixes):
            rows_of.setdefault(tuple(prefix.tolist()), []).append(row)
        stored = kept.load(self.model, prefixes[-1]) if kept else None
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
        if kept and stored is None:
            kept.save(self.model, prefixes[-1], self.cache.read(len(prefixes) - 1))

    @torch.inference_mode()
    def hidden(self, frame_ids: Tensor, at: Tensor, committing: Tensor | None = None) -> Tensor:
        """One step on the frame after the cache: frame_ids [R, n] -> hidden states [R, m, C] of the offsets `at` [R, m].

        Without `committing`, frame_ids and `at` may be those of the first rows only.
        committing: ids [R, n] of the finished frame before it, as later frames shall see it; the same forward appends it to the
        cache. The frame of frame_ids itself leaves nothing there.
        """
        n = frame_ids.shape[1]
        if committing is None:
            return self._forward(frame_ids, n, at)
        hidden = self._forward(torch.cat([committing, frame_ids], dim=1), n, at + n, stay=1)
        self._advance(n)
        return hidden

    @torch.inference_mode()
    def denoise(self, frame_ids: Tensor, at: Tensor | None = None, committing: Tensor | None = None) -> Tensor:
        """As `hidden`, but logits fp32 [R, m, K] of each row. at: default every code, row by row."""
        if at is None:
            at = code_offsets(self._read_frame(frame_ids)).to(self.model.device).expand(len(frame_ids), -1)
        return self.model.lm_head(self.hidden(frame_ids, at, committing), visual_only=True).float()

    @torch.inference_mode()
    def commit(self, frame_ids: Tensor) -> None:
        """Append a frame, as later frames shall see it: frame_ids [R, n]."""
        rows, n = frame_ids.shape
        self._forward(frame_ids, n, torch.empty(rows, 0, dtype=torch.int64, device=self.model.device), stay=1)
        self._advance(n)

    def _forward(self, ids: Tensor, n: int, at: Tensor, stay: int = 0) -> Tensor:
        """ids [R, n of one frame, or 2 n of two in a row], the first `stay` to be kept -> hidden states of the offsets `at`."""
        tables = [self._frame_rotary(ids[:, :n], ahead) for ahead in range(ids.shape[1] // n)]
        rotary = tables[0] if len(tables) == 1 else tuple(torch.cat(t, dim=2) for t in zip(*tables, strict=True))
        row_bytes = ids.shape[1] * self.model.config.hidden_size * self.model.dtype.itemsize
        size = len(ids) if is_spread(self.model) else max(1, STATES_BYTES // row_bytes)  # layers that wait elsewhere come once
        ids, hidden = ids.to(self.model.device), []
        for rows in (range(start, min(start + size, len(ids))) for start in range(0, len(ids), size)):
            some = slice(rows.start, rows.stop)
            attend = self.cache.extend(n, rows, stay)
            hidden.append(self.model.model(ids[some], tuple(table[some] for table in rotary), attend, at[some]))
        return torch.cat(hidden) if len(hidden) > 1 else hidden[0]

    def _advance(self, n: int) -> None:
        self._rotary.pop(self.frames_done, None)
        self.cache.advance(n)
        self._lengths = [length + n for length in self._lengths]
        self.frames_done += 1

    def _read_frame(self, frame_ids: Tensor) -> Frame:
        """Rows and columns, read off the ids once: it makes the host wait for the device."""
        if self._frame is None:
            self._frame = read_frame(frame_ids[0].tolist(), 0, self.model.config)
        return self._frame

    def frame_position_ids(self, frame_ids: Tensor, ahead: int = 0) -> Tensor:
        """int64 [R, 3, n]: where the frame after the cache, or `ahead` frames later, stands in the sequence of each row."""
        frame, config = self._read_frame(frame_ids), self.model.config
        places = [Frame(length + ahead * frame.end, frame.rows, frame.cols) for length in self._lengths]
        index = self.frames_done + ahead
        return torch.stack([frame_positions(p, index, o, config) for p, o in zip(places, self._origins, strict=True)])

    def _frame_rotary(self, frame_ids: Tensor, ahead: int) -> Rotary:
        """Rotary tables of a frame in all rows; its steps share them."""
        index = self.frames_done + ahead
        if index not in self._rotary:
            is_content = torch.zeros(len(self._lengths), frame_ids.shape[1], dtype=torch.bool)
            is_content[:, FRAME_HEADER:-1] = True
            self._rotary[index] = self.model.rotary(self.frame_position_ids(frame_ids, ahead), is_content)
        return self._rotary[index]


def code_offsets(frame: Frame) -> Tensor:
    """int64 [h * w]: offsets of the codes in a frame's span, row by row."""
    grid = torch.arange(frame.content_length).view(frame.rows, frame.cols + 1)[:, :-1]
    return grid.flatten() + FRAME_HEADER


def cache_tokens(text: int, span: int, frames: int, history: int | None = None) -> int:
    """Tokens that a row reaches: what stands before the frames, and all frames, or the first, `history` others, and one more.

    The last frame is never committed but needs its place while denoised.
    """
    return text + span * (frames if history is None else min(frames, 1 + history + 1))


def generate_frames(
    model: LumosForVideoGeneration,
    prefixes: Sequence[Tensor],
    unconditional: Sequence[Tensor] | None,
    *,
    grid: tuple[int, int],
    new_frames: int,
    settings: GenerationSettings,
    generators: Sequence[torch.Generator],
    on_step: Callable[[int, int, Tensor], None] = lambda frame, step, ids: None,
    kept: KeptPrefix | None = None,
    later: Mapping[int, Sequence[Tensor]] | None = None,
) -> Iterator[Tensor]:
    """Sample `new_frames` latent frames after the prefixes; yields the codes [S, h, w] of each as soon as it is done.

    prefixes, unconditional: ids of each sample's two branches (no unconditional ones: guidance is off). generators: one
    CPU generator a sample, so a clip does not depend on the batch. on_step(frame, step, ids) is called after
    each step with the frame's span [S, n], which it may change where codes are decided.
    kept: where the last unconditional prefix stays for the next call.
    later: other `prefixes` from some of the new frames on. The frames before are read again behind them, so that all stand where
    they would stand had the clip begun with that prefix.
    """
    config, device = model.config, model.device
    samples, (h, w) = len(prefixes), grid
    starts = {0: prefixes, **(later or {})}
    branches = 2 if unconditional else 1
    blank = build_frames(torch.full((1, h, w), -1), config)  # [1, n]
    offsets = code_offsets(Frame(0, h, w)).to(device)
    hidden_later = torch.zeros(blank.shape[1], dtype=torch.bool)
    hidden_later[FRAME_HEADER:-1] = history_mask(h * (w + 1), settings.history_mask_ratio)
    hidden_later = hidden_later.to(device)
    rows_from = {start: [*conditional, *(unconditional or ())] for start, conditional in starts.items()}
    if settings.mask_given_frames:
        rows_from = {start: [mask_given(row, hidden_later.cpu(), config) for row in rows] for start, rows in rows_from.items()}
    span, given = blank.shape[1], len(parse_layout(rows_from[0][0][None], config)[0].frames)
    longest = max(len(row) for rows in rows_from.values() for row in rows)
    capacity = cache_tokens(longest - given * span, span, given + new_frames, settings.history_frames)

    engine, finished, history = Engine(model), None, [[] for _ in range(branches * samples)]
    for frame in range(new_frames):
        if frame in rows_from:
            rows = [torch.cat([row, *made]) for row, made in zip(rows_from[frame], history, strict=True)]
            stored = kept if branches == 2 and frame == 0 else None
            engine.prefill(rows, capacity, stored, settings.history_frames, settings.history_thinning)
            finished = None
        uniform = draw_uniform(generators, settings.steps_of(frame), h * w).to(device)
        ids, masked = blank.to(device).repeat(samples, 1), offsets.repeat(samples, 1)
        for step in decide_frame(engine, ids, masked, settings, uniform, branches, finished):
            on_step(frame, step, ids)
        finished = ids.masked_fill(hidden_later, config.mask_token_id).repeat(branches, 1)
        if frame + 1 <= max(rows_from):  # another prompt will be put in front of it
            for made, row in zip(history, finished.cpu(), strict=True):
                made.append(row)
        yield (ids[:, offsets] - config.visual_token_start).view(samples, h, w)


def decide_frame(
    engine: Engine, ids: Tensor, masked: Tensor, settings: GenerationSettings, uniform: Tensor, branches: int,
    finished: Tensor | None,
) -> Iterator[int]:  # fmt: skip
    """Fill in a frame's span ids [S, n], in place, where `masked` [S, m] says that codes are open; yields the number of each step.

    uniform: of `draw_uniform`. finished: ids [R, n] of the frame before, which is not in the cache yet. The first step takes it
    along, unless that runs fewer branches than have to see it. NotFinite if a clip's logits are NaN or infinite.
    """
    model, steps, total = engine.model, len(uniform), masked.shape[1]
    broken = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for step, (before, after) in enumerate(pairwise([total, *unmasking_counts(total, steps)])):
        active = branches if settings.guides(step, steps) else 1
        if finished is not None and active < branches:
            engine.commit(finished)
            finished = None
        hidden = engine.hidden(ids.repeat(active, 1), masked.repeat(active, 1), finished)
        finished = None
        if active == 2:
            hidden = guide(hidden, settings.guidance_scale)
        for_codes, for_confidence = uniform[step, :, :, : masked.shape[1]]
        codes, log_prob = decide(model.lm_head, hidden, for_codes, settings)
        broken |= log_prob.isnan().any(dim=1)
        temperature = settings.temperature * (1 - (step + 1) / steps)
        put(ids, masked, codes + model.config.visual_token_start)
        if settings.confidence_threshold is None:
            masked = masked.gather(1, least_confident(log_prob, for_confidence, temperature, after))
        else:  # offset 0 fills up where a sample has fewer open codes than another
            masked = unsure(masked, log_prob, for_confidence, temperature, before - after, settings.confidence_threshold)
        put(ids, masked, torch.full_like(masked, model.config.mask_token_id))
        if masked.shape[1] == 0:  # read once a frame, as a device is waited for then
            check_finite(broken)
        yield step
        if masked.shape[1] == 0:
            return


def check_finite(broken: Tensor) -> None:
    """NotFinite if any clip is broken: bool [S]."""
    if broken.any():
        raise NotFinite(
            "the model's numbers are not finite (NaN or infinity) where codes are drawn; check the weights and the adapter, or, "
            "with dtype float16, whose largest number is 65504, take bfloat16 or float32",
            broken.nonzero().flatten().tolist(),
        )


def put(ids: Tensor, at: Tensor, values: Tensor) -> None:
    """Write values [S, m] at offsets `at` [S, m] of ids [S, n]; at offset 0, which is no code, what is there stays."""
    ids.scatter_(1, at, torch.where(at > 0, values, ids[:, :1]))


@torch.inference_mode()
def decide(head: Head, hidden: Tensor, uniform: Tensor, settings: GenerationSettings) -> tuple[Tensor, Tensor]:
    """hidden [S, m, C], uniform [S, m] -> codes [S, m] and their log-probabilities [S, m]; logits exist piece by piece."""
    piece = max(1, LOGITS_BYTES * (1 if hidden.is_cpu else 8) // (4 * head.rows))
    codes, log_probs = [], []
    for states, numbers in zip(hidden.flatten(0, 1).split(piece), uniform.flatten().split(piece), strict=True):
        logits = filter_logits(head(states, visual_only=True).float(), settings.top_k, settings.top_p)
        drawn = sample_codes(logits, numbers)
        codes.append(drawn[0])
        log_probs.append(drawn[1])
    return torch.cat(codes).view(uniform.shape), torch.cat(log_probs).view(uniform.shape)


def draw_uniform(generators: Sequence[torch.Generator], steps: int, total: int) -> Tensor:
    """Uniform numbers [steps, 2, S, total] for a frame; as each step has `total` of them, seeds mean the same whatever it uses."""
    return torch.stack([torch.rand(steps, 2, total, generator=g) for g in generators], dim=2)


def mask_given(prefix: Tensor, hidden: Tensor, config) -> Tensor:
    """Put the history mask on every frame of a prefix: ids [L], hidden bool [n] over a frame's span."""
    prefix = prefix.clone()
    for frame in parse_layout(prefix[None], config)[0].frames:
        prefix[frame.start : frame.end].masked_fill_(hidden, config.mask_token_id)
    return prefix
