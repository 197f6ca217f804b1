"""The masked sequences of training clips, as they are before the clips are encoded: their visible codes are 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lumos.data.seeding import VALIDATION_SEED, VALIDATION_STEP, sample_generator
from lumos.data.source import TrainingClip
from lumos.models.lumos1.configuration import LumosConfig
from lumos.models.lumos1.masking import mask_sequence
from lumos.models.lumos1.patterns import Given, drawn_given
from lumos.models.lumos1.sequence import build_sequence, clip_header, num_latent_frames, parse_layout
from lumos.models.lumos1.training_settings import LumosTrainingSettings
from lumos.training.task import IGNORED, Batch


class ClipSize(NamedTuple):
    """The size of a clip: latent frames, rows and columns of what is trained, and the frames of the whole clip."""

    latents: int
    rows: int
    cols: int
    num_frames: int

    @classmethod
    def of(cls, clip: TrainingClip, config: LumosConfig) -> ClipSize:
        if clip.codes is None:
            frames, height, width = clip.frames.shape[:3]
            unit = config.spatial_compression
            grid = (num_latent_frames(frames, config.temporal_compression), height // unit, width // unit)
        else:
            grid = clip.codes.shape
        return cls(*grid, clip.num_frames or (grid[0] - 1) * config.temporal_compression + 1)


class SequenceRow(NamedTuple):
    """The masked sequence of a clip.

    ids         int64 [L], with code 0 at each visible code
    supervised  bool [L], True at the codes that have a loss, which are masked
    ratios      [t], the mask ratio of each latent frame
    given       the given frames
    """

    ids: Tensor
    supervised: Tensor
    ratios: Tensor
    given: Given


def drawn_row(
    settings: LumosTrainingSettings, config: LumosConfig, step: int, position: int, clip: ClipSize, fps: int,
    text_ids: list[int] | None, dropout: bool,
) -> SequenceRow:  # fmt: skip
    """Return the row of the clip at a position of a step, a pure function of the arguments.

    text_ids: None for a clip without text. dropout: False keeps the given frames. The row of a shortened clip is
    the beginning of the row of the whole clip, with the same masks. It has no given frames if they would be all of it.
    """
    seed = VALIDATION_SEED if step == VALIDATION_STEP else settings.training.seed
    given = drawn_given(
        lambda purpose: sample_generator(seed, step, position, purpose), settings.patterns,
        settings.dropout.image if dropout else 0.0, clip.latents,
    )  # fmt: skip
    whole = torch.zeros(num_latent_frames(clip.num_frames, config.temporal_compression), clip.rows, clip.cols, dtype=torch.int64)
    duration, fps = clip_header(clip.num_frames, fps)
    ids = build_sequence(
        text_ids, whole, fps=fps, duration=duration, config=config, last=whole[-1] if given.has_last else None
    )
    masking = settings.masking
    masked = mask_sequence(
        ids, config, kind=masking.kind, min_ratio=masking.min_ratio, generator=sample_generator(seed, step, position, "mask"),
        given=given.frames, hide_given=given.is_dropped,
    )  # fmt: skip
    end = len(ids)
    if clip.latents < len(whole):
        end = parse_layout(ids[None], config)[0].frames[clip.latents - 1 + given.has_last].end
    return SequenceRow(masked.input_ids[:end], masked.targets[:end] != IGNORED, torch.tensor(masked.ratios[: clip.latents]), given)


@dataclass(frozen=True)
class UnencodedSequences:
    """A batch whose clips are not encoded yet. Any process can make it without the tokenizer.

    clips            uint8 frames [B, T, H, W, 3]; or int64 codes of all clips in one dimension, if
                     the source holds codes
    ids              [B, L]; each visible code has the placeholder code 0
    codes_at         bool [B, L], True where the sequence holds a code, visible or masked
    supervised_at    bool [B, L], True at the masked codes, which have a loss
    batch            the batch, whose tensors still lack input_ids and targets
    last             uint8 [n, 1, H, W, 3], the last frames of the clips `with_last`, if the source holds frames
    with_last        the numbers of the clips whose sequence has a picture of the last frame
    """

    clips: Tensor
    ids: Tensor
    codes_at: Tensor
    supervised_at: Tensor
    batch: Batch
    last: Tensor | None = None
    with_last: tuple[int, ...] = ()


def stored_codes(clip: TrainingClip, has_last: bool) -> Tensor:
    """Return the codes of a clip that was encoded earlier, in the order of its sequence, int64 in one dimension."""
    parts = [clip.codes[:1], clip.last[None], clip.codes[1:]] if has_last else [clip.codes]
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)).flatten()


def in_sequence(codes: Tensor, last: Tensor, with_last: Sequence[int]) -> Tensor:
    """Return the codes of clips in the order of their sequences, in one dimension.

    codes: [B, t, h, w]. last: [n, h, w], the pictures of the last frames of the clips `with_last`.
    """
    pictures = dict(zip(with_last, last, strict=True))
    parts = []
    for number, clip in enumerate(codes):
        parts += [clip[0], pictures[number], clip[1:]] if number in pictures else [clip]
    return torch.cat([part.flatten() for part in parts])
