"""Frame-by-frame generation: prefill the prefix, denoise a frame in parallel steps, commit it to the cache.

A row is one sequence in the batch: the conditional branch of a sample, or its unconditional one. Rows share every matrix
product; each has its own prefix and length in a preallocated cache, without padding. No mask is needed: a frame sees the whole
cache and itself. S samples, R rows, n tokens of a frame's span, m positions asked for, K codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lumos.attention import Attend, equal_runs, prefix_attention, segmented_attention
from lumos.generation.sampling import filter_logits, guide, least_confident, sample_codes
from lumos.generation.settings import GenerationSettings
from lumos.masking import history_mask, unmasking_counts
from lumos.modeling import LumosForVideoGeneration, Rotary
from lumos.rope import frame_positions, position_ids
from lumos.sequence import (
    FRAME_HEADER,
    Frame,
    Layout,
    build_frames,
    content_mask,
    pad_sequences,
    parse_layout,
    read_frame,
)


class Cache:
    """Keys and values of R rows, each filled up to its own length: [layers, R, Hkv, capacity, D]."""

    def __init__(self, model: LumosForVideoGeneration, rows: int, capacity: int):
        c = model.config
        shape = (c.num_hidden_layers, rows, c.num_key_value_heads, capacity, c.head_dim)
        self.keys = torch.empty(shape, dtype=model.dtype, device=model.device)
        self.values = torch.empty_like(self.keys)
        self.lengths = [0] * rows

    def store(self, layouts: Sequence[Layout]) -> Attend:
        """Attention over whole prefixes [R, L] that also fills the cache with them."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer, :, :, : k.shape[2]] = k
            self.values[layer, :, :, : v.shape[2]] = v
            return segmented_attention(q, k, v, layouts)

        return attend

    def extend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one frame to the cache and itself; its keys and values are written behind each row's length."""
        n, parts = q.shape[2], []
        for start, stop in equal_runs(self.lengths):
            length = self.lengths[start]
            rows, span = slice(start, stop), slice(length, length + n)
            self.keys[layer, rows, :, span] = k[rows]
            self.values[layer, rows, :, span] = v[rows]
            keys, values = (c[layer, rows, :, : length + n] for c in (self.keys, self.values))
            parts.append(prefix_attention(q[rows], keys, values, causal=False))
        return torch.cat(parts)


class Engine:
    """The decoder with a cache: `prefill` once, then per frame any number of `denoise` and one `commit`.

    The three calls take ids, so a recorded run can be replayed through them.
    """

    def __init__(self, model: LumosForVideoGeneration):
        self.model = model
        self.cache: Cache | None = None
        self.frames_done = 0
        self._origins: list[int] = []
        self._rotary: tuple[int, Rotary] | None = None

    @torch.inference_mode()
    def prefill(self, prefixes: Sequence[Tensor], capacity: int) -> None:
        """prefixes: ids [L_r] of each row, ending before a frame; capacity: cached tokens a row may reach."""
        config, device = self.model.config, self.model.device
        ids = pad_sequences(list(prefixes), config.pad_token_id)
        layouts = [Layout(len(p), parse_layout(p[None], config)[0].frames) for p in prefixes]
        frames = {len(layout.frames) for layout in layouts}
        if len(frames) > 1:
            raise ValueError(f"rows with different numbers of given frames: {sorted(frames)}")
        self.cache = Cache(self.model, len(prefixes), capacity)
        rotary = self.model.rotary(position_ids(layouts, ids.shape[1], config), content_mask(layouts, ids.shape[1]))
        self.model.model(ids.to(device), rotary, self.cache.store(layouts))
        self.cache.lengths = [layout.length for layout in layouts]
        self.frames_done = frames.pop()
        self._origins = [layout.origin or layout.length + FRAME_HEADER for layout in layouts]
        self._rotary = None

    @torch.inference_mode()
    def denoise(self, frame_ids: Tensor, at: Tensor | None = None) -> Tensor:
        """One step on the frame after the cache: frame_ids [R, n] -> logits fp32 [R, m, K]; the cache keeps its length.

        at: int64 [R, m], offsets in the span where logits are wanted; default: every code, row by row.
        """
        hidden = self._forward(frame_ids)
        if at is None:
            at = code_offsets(read_frame(frame_ids[0].tolist(), 0, self.model.config)).to(hidden.device).expand(len(hidden), -1)
        wanted = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))
        return self.model.lm_head(wanted, visual_only=True).float()

    @torch.inference_mode()
    def commit(self, frame_ids: Tensor) -> None:
        """Append a frame, as later frames shall see it: frame_ids [R, n]."""
        self._forward(frame_ids)
        self.cache.lengths = [length + frame_ids.shape[1] for length in self.cache.lengths]
        self.frames_done += 1

    def _forward(self, frame_ids: Tensor) -> Tensor:
        rotary = self._frame_rotary(frame_ids)
        return self.model.model(frame_ids.to(self.model.device), rotary, self.cache.extend)

    def frame_position_ids(self, frame_ids: Tensor) -> Tensor:
        """int64 [R, 3, n]: where the frame after the cache stands in each row."""
        config = self.model.config
        frame = read_frame(frame_ids[0].tolist(), 0, config)
        places = [Frame(length, frame.rows, frame.cols) for length in self.cache.lengths]
        return torch.stack(
            [frame_positions(p, self.frames_done, o, config) for p, o in zip(places, self._origins, strict=True)]
        )

    def _frame_rotary(self, frame_ids: Tensor) -> Rotary:
        """Rotary tables of the next frame; the steps of one frame share them."""
        if self._rotary is None or self._rotary[0] != self.frames_done:
            is_content = torch.zeros(frame_ids.shape, dtype=torch.bool)
            is_content[:, FRAME_HEADER:-1] = True
            self._rotary = self.frames_done, self.model.rotary(self.frame_position_ids(frame_ids), is_content)
        return self._rotary[1]


def code_offsets(frame: Frame) -> Tensor:
    """int64 [h * w]: offsets of the codes in a frame's span, row by row."""
    grid = torch.arange(frame.content_length).view(frame.rows, frame.cols + 1)[:, :-1]
    return grid.flatten() + FRAME_HEADER


def cache_tokens(prefix: int, span: int, new_frames: int) -> int:
    """Tokens that a row reaches: prefix and all frames; the last is never committed but needs its place while denoised."""
    return prefix + span * new_frames


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
) -> Iterator[Tensor]:
    """Sample `new_frames` latent frames after the prefixes; yields the codes [S, h, w] of each as soon as it is done.

    prefixes, unconditional: ids of each sample's two branches (no unconditional ones: guidance is off). generators: one
    CPU generator a sample, so a clip does not depend on the batch. on_step(frame, step, ids) is called after
    each step with the frame's span [S, n], which it may change where codes are decided.
    """
    config, device = model.config, model.device
    samples, (h, w) = len(prefixes), grid
    rows = [*prefixes, *(unconditional or ())]
    branches = len(rows) // samples
    blank = build_frames(torch.full((1, h, w), -1), config)  # [1, n]
    offsets = code_offsets(Frame(0, h, w)).to(device)
    hidden_later = torch.zeros(blank.shape[1], dtype=torch.bool)
    hidden_later[FRAME_HEADER:-1] = history_mask(h * (w + 1), settings.history_mask_ratio)
    hidden_later = hidden_later.to(device)
    if settings.mask_given_frames:
        rows = [mask_given(row, hidden_later.cpu(), config) for row in rows]
    still_masked = unmasking_counts(h * w, settings.num_inference_steps)

    engine = Engine(model)
    engine.prefill(rows, cache_tokens(max(map(len, rows)), blank.shape[1], new_frames))
    for frame in range(new_frames):
        ids = blank.to(device).repeat(samples, 1)  # [S, n]
        masked = offsets.repeat(samples, 1)  # [S, m], offsets of the codes still to decide
        for step, count in enumerate(still_masked):
            logits = engine.denoise(ids.repeat(branches, 1), masked.repeat(branches, 1))
            if branches == 2:
                logits = guide(logits, settings.guidance_scale)
            logits = filter_logits(logits, settings.top_k, settings.top_p)
            uniform = draw_uniform(generators, h * w, masked.shape[1]).to(device)
            codes, log_prob = sample_codes(logits, uniform[0])
            temperature = settings.temperature * (1 - (step + 1) / len(still_masked))
            remask = least_confident(log_prob, uniform[1], temperature, count)
            ids.scatter_(1, masked, codes + config.visual_token_start)
            masked = masked.gather(1, remask)
            ids.scatter_(1, masked, config.mask_token_id)
            on_step(frame, step, ids)
        if frame + 1 < new_frames:
            engine.commit(ids.masked_fill(hidden_later, config.mask_token_id).repeat(branches, 1))
        yield (ids[:, offsets] - config.visual_token_start).view(samples, h, w)


def draw_uniform(generators: Sequence[torch.Generator], total: int, used: int) -> Tensor:
    """Uniform numbers [2, S, used]: `total` are drawn for each sample, so every step moves a generator equally far."""
    return torch.stack([torch.rand(2, total, generator=g) for g in generators], dim=1)[:, :, :used]


def mask_given(prefix: Tensor, hidden: Tensor, config) -> Tensor:
    """Put the history mask on every frame of a prefix: ids [L], hidden bool [n] over a frame's span."""
    prefix = prefix.clone()
    for frame in parse_layout(prefix[None], config)[0].frames:
        prefix[frame.start : frame.end].masked_fill_(hidden, config.mask_token_id)
    return prefix
