"""The losses and outputs of the decoder that compression compares, sorted by frames and mask ratios."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumos.models.lumos1.configuration import LumosConfig
from lumos.models.lumos1.sequence import SequenceLayout, code_mask, frame_indices, frame_times, pad_sequences, parse_layout
from lumos.training.task import IGNORED, Forward, Output

RATIO_BINS = 10
"""Number of equal ranges of mask ratios by which losses are sorted."""
ROWS = 2**13
"""Rows of the head that are float64 at the same time."""
GROUPS = {
    "frames": ("first frame", "later frames, copied codes", "later frames, changed codes"),
    "level": tuple(f"ratio {k / RATIO_BINS:.1f} to {(k + 1) / RATIO_BINS:.1f}" for k in range(RATIO_BINS)),
}


def ratio_bins(ratios: Tensor) -> Tensor:
    """Return the bin 0 to 9 of each ratio in [0, 1].

    Bin i holds i / 10 <= ratio < (i + 1) / 10; the last bin also holds 1.
    """
    return ((ratios * RATIO_BINS + 1e-4).long()).clamp(max=RATIO_BINS - 1)  # 0.7 in float32 is slightly below 0.7


def forward(config: LumosConfig, model: nn.Module, micro: dict[str, Any]) -> Forward:
    """Return the losses and outputs of a micro-batch.

    The output F is the logits over the visual codes less their mean, at the places that are masked in all frames. Its values
    are in the coordinates of `output_root`, in which all sums of squares and products are those of F. A code is copied if it
    is the one at the same place of the frame before.
    """
    ids, targets, bins = micro["input_ids"], micro["targets"], ratio_bins(micro["mask_ratios"])
    hidden, layouts = model.hidden_states(ids, layouts=micro.get("layouts"))
    rows, columns = (targets != IGNORED).nonzero(as_tuple=True)
    frames, places = (find(layouts, ids.shape[1]).to(ids.device)[rows, columns] for find in (frame_times, frame_indices))
    codes = torch.where(targets != IGNORED, targets, ids - config.visual_token_start)
    back = pad_sequences([torch.tensor(steps_back(layout)) for layout in layouts], 0).to(ids.device)[rows, places]
    is_copied = codes[rows, columns] == codes[rows, columns - back]
    of_frame = torch.where(frames == 0, 0, torch.where(is_copied, 1, 2))

    def outputs() -> Iterator[Output]:
        root = output_root(model.lm_head)
        for row, layout in enumerate(layouts):
            frame, starts = torch.tensor([layout.times, [frame.start for frame in layout.frames]], device=ids.device)
            span = layout.frames[0].end - layout.frames[0].start
            at = starts[:, None] + torch.arange(span, device=ids.device)
            has_loss = (targets[row, at] != IGNORED).any(1)  # not in given frames
            frame, at = frame[has_loss], at[has_loss]  # [T], [T, span]
            at = at[:, (targets[row, at] != IGNORED).all(0)]
            if at.numel():
                yield Output(F.linear(hidden[row, at].float(), root).flatten(1), frame, bins[row, frame])

    losses = model.lm_head(hidden[rows, columns], targets=targets[rows, columns])
    return Forward(losses, {"frames": of_frame, "level": bins[rows, frames]}, outputs)


def with_and_without_history(config: LumosConfig, micro: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a micro-batch with losses in the last frame of each sequence only, and the same with all codes before it masked."""
    ids, targets = micro["input_ids"], micro["targets"]
    layouts = micro.get("layouts") or parse_layout(ids, config)
    frames, is_code = (find(layouts, ids.shape[1]).to(ids.device) for find in (frame_indices, code_mask))
    last = frames == frames.amax(1, keepdim=True)
    whole = {**micro, "targets": targets.masked_fill(~last, IGNORED)}
    return whole, {**whole, "input_ids": ids.masked_fill(is_code & ~last, config.mask_token_id)}


@torch.no_grad()
def output_root(head: nn.Module) -> Tensor:
    """Return R, float32 [C, C], with R^T R = W^T W for the head's rows W of the visual codes less their mean.

    |R h| is thus the norm of the logits of a hidden state h less their mean, and so are all scalar products. The logits
    themselves are as many numbers as there are codes; R h are as many as h has channels. R is computed once for a weight.
    """
    weight = head.weight
    state = (weight.data_ptr(), None if weight.is_inference() else weight._version)
    known = getattr(head, "_output_root", None)
    if known is None or known[0] != state:
        rows = weight[head.first_row : head.first_row + head.rows]
        mean = rows.mean(0, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(sum((part := some.double() - mean).T @ part for some in rows.split(ROWS)))
        head._output_root = known = (state, (values.clamp(min=0).sqrt()[:, None] * vectors.T).float())
    return known[1]


def steps_back(layout: SequenceLayout) -> list[int]:
    """Return for each frame how many tokens before it the latent frame before it in time begins.

    The result is 0 for the first frame, and for a picture of the last one.
    """
    steps, before = [], layout.frames[0].start
    for frame in layout.frames:
        steps.append(frame.start - before if frame.stated_time is None else 0)
        before = frame.start if frame.stated_time is None else before
    return steps


def stream_frames(config: LumosConfig, micro: dict[str, Any], stream: Tensor) -> Tensor:
    """Return the latent frame of each token of a stream [B, L, C]: int64 [B, L], -1 for text, -2 for padding."""
    layouts = micro.get("layouts") or parse_layout(micro["input_ids"], config)
    lengths = torch.tensor([layout.length for layout in layouts])[:, None]
    found = frame_times(layouts, stream.shape[1])
    return found.masked_fill(torch.arange(stream.shape[1]) >= lengths, -2).to(stream.device)
