"""Masks of the decoder's input: training masks (AR-DF), mask-ratio schedules, and the history mask of generation.

A training mask is a bool [t, n], for t latent frames of n content tokens (codes and newlines), True where
the mask token replaces the content. AR-DF (autoregressive discrete diffusion forcing) repeats one
spatial pattern in all frames, a temporal tube. Otherwise the model could copy a masked code from the
neighbouring frame. Source: reference, sections 5.1 and 6.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lumos.errors import shown
from lumos.models.lumos1.configuration import LumosConfig
from lumos.models.lumos1.sequence import SequenceLayout, code_mask, parse_layout
from lumos.models.lumos1.settings import MASK_KINDS

MIN_RATIO = 0.7


@dataclass(frozen=True)
class MaskedSequence:
    """A sequence with a training mask.

    input_ids: [L], with mask tokens. targets: [L], the visual code at supervised positions, else -100.
    ratios: the mask ratio of each of the t latent frames.
    """

    input_ids: Tensor
    targets: Tensor
    ratios: tuple[float, ...]


def mask_ratio(t: float, min_ratio: float = MIN_RATIO) -> float:
    """Return max(min_ratio, cos(pi t / 2)), the mask ratio for t in [0, 1)."""
    return max(min_ratio, math.cos(math.pi * t / 2))


def mask_count(n: int, ratio: float) -> int:
    """Return how many of n content tokens are masked at a ratio: at least one."""
    return max(1, round(n * ratio))


def pattern(n: int, count: int, generator: torch.Generator) -> Tensor:
    """Return a random bool [n] with exactly `count` True, all such patterns equally likely."""
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.randperm(n, generator=generator)[:count]] = True
    return mask


def training_mask(
    kind: str, t: int, n: int, *, min_ratio: float, fixed_ratio: float | None = None, generator: torch.Generator
) -> tuple[Tensor, tuple[float, ...]]:
    """Return a mask, bool [t, n], and the mask ratio of each frame.

    The number of masked tokens is the ratio times n, rounded; it is not random.

    kind:
        tube: one pattern for all frames.
        random: one ratio; the positions are drawn over the whole clip.
        diffusion_forcing: a new ratio and a new pattern for each frame.
        tube_decay: nested patterns whose count grows linearly until the last frame is masked completely.

    fixed_ratio: the ratio to use in place of a random one.
    Raises ValueError for an unknown kind.
    """
    if kind not in MASK_KINDS:
        raise ValueError(f"unknown mask kind {shown(kind)}; allowed: {', '.join(MASK_KINDS)}")

    def draw_ratio() -> float:
        return mask_ratio(float(torch.rand((), generator=generator)), min_ratio) if fixed_ratio is None else fixed_ratio

    if kind == "diffusion_forcing":
        ratios = tuple(draw_ratio() for _ in range(t))
        return torch.stack([pattern(n, mask_count(n, r), generator) for r in ratios]), ratios
    ratio = draw_ratio()
    if kind == "random":
        return pattern(t * n, mask_count(t * n, ratio), generator).view(t, n), (ratio,) * t
    if kind == "tube":
        return pattern(n, mask_count(n, ratio), generator).expand(t, n), (ratio,) * t
    rank = torch.randperm(n, generator=generator)
    first = mask_count(n, ratio)
    counts = torch.linspace(first, n, t).round() if t > 1 else torch.tensor([float(first)])
    return rank[None] < counts[:, None], (ratio, *(counts[1:] / n).tolist())


def mask_sequence(
    input_ids: Tensor,
    config: LumosConfig,
    *,
    kind: str = "tube",
    min_ratio: float = MIN_RATIO,
    fixed_ratio: float | None = None,
    generator: torch.Generator,
    given: int = 0,
    hide_given: bool = False,
) -> MaskedSequence:
    """Return a clip, ids [L], with a training mask, and the targets of the decoder.

    Newlines are masked like codes, but they are never supervised.

    given: the number of frames at the beginning of the sequence that are given, with the picture of the last
    frame. They are never supervised. Their content is visible, or with `hide_given` their codes are masked and
    their newlines are not, as in the branch of guidance without given frames. The mask of the others is the
    one that they have without given frames.
    Raises ValueError for a sequence without frames and for an unknown kind.
    """
    (layout,) = parse_layout(input_ids[None], config)
    if not layout.frames:
        raise ValueError("the sequence has no frames to mask")
    t, n = layout.num_latent_frames, layout.frames[0].content_length
    mask, ratios = training_mask(kind, t, n, min_ratio=min_ratio, fixed_ratio=fixed_ratio, generator=generator)
    hidden = masked_tokens(layout, mask[list(layout.times)], len(input_ids))
    is_code = code_mask([layout], len(input_ids))[0]
    supervised = hidden & is_code
    if given:
        end = layout.frames[given - 1].end
        hidden[:end], supervised[:end] = is_code[:end] & hide_given, False
    return MaskedSequence(
        input_ids=input_ids.masked_fill(hidden, config.mask_token_id),
        targets=torch.where(supervised, input_ids - config.visual_token_start, -100),
        ratios=ratios,
    )


def masked_tokens(layout: SequenceLayout, mask: Tensor, length: int) -> Tensor:
    """Return bool [length], True for the tokens of a sequence that a mask [t, n] of the frames' contents hides."""
    hidden = torch.zeros(length, dtype=torch.bool)
    for frame, row in zip(layout.frames, mask, strict=True):
        hidden[frame.content_start : frame.end - 1] = row
    return hidden


def history_mask(n: int, ratio: float) -> Tensor:
    """Return the history mask, bool [n]: True for the content tokens of a frame that later frames do not see.

    The pattern is periodic: it masks positions round(j n / count) for j < count. For example, ratio 0.7
    of 4080 tokens masks 2856, among them all 48 newlines. Ratio 0 masks nothing.
    Raises ValueError unless 0 <= ratio < 1.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"history_mask_ratio {ratio} is outside 0 <= ratio < 1")
    mask = torch.zeros(n, dtype=torch.bool)
    if ratio > 0:
        count = mask_count(n, ratio)
        mask[[round(j * n / count) for j in range(count)]] = True
    return mask


def unmasking_counts(n: int, steps: int) -> list[int]:
    """Return the number of codes that are still masked after each step of a frame of n codes; the last is 0.

    After step k it is max(1, min(before - 1, floor(n cos(pi/2 (k + 1) / steps)))), where `before` is the
    number before the step: MaskGIT's cosine schedule (reference, section 6.1).
    Raises ValueError for less than one step.
    """
    if steps < 1:
        raise ValueError(f"num_inference_steps {steps} is less than 1")
    counts, unknown = [], n
    for k in range(steps - 1):
        unknown = max(1, min(unknown - 1, math.floor(n * math.cos(math.pi / 2 * (k + 1) / steps))))
        counts.append(unknown)
    return [*counts, 0]
