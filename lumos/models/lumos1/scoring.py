"""The losses and outputs of the decoder that compression compares, sorted by frames and mask ratios."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumos.models.lumos1.configuration import LumosConfig
from lumos.models.lumos1.sequence import frame_indices, parse_layout
from lumos.training.task import IGNORED, Forward, Output

RATIO_BINS = 10
"""Number of equal ranges of mask ratios by which losses are sorted."""
GROUPS = {
    "frames": ("first frame", "later frames, copied codes", "later frames, changed codes"),
    "level": tuple(f"ratio {k / RATIO_BINS:.1f} to {(k + 1) / RATIO_BINS:.1f}" for k in range(RATIO_BINS)),
}
OUTPUT_VALUES = 2**24
"""Number of logits of an output that exist at the same time."""


def ratio_bins(ratios: Tensor) -> Tensor:
    """Return the bin 0 to 9 of each ratio in [0, 1].

    Bin i holds i / 10 <= ratio < (i + 1) / 10; the last bin also holds 1.
    """
    return ((ratios * RATIO_BINS + 1e-4).long()).clamp(max=RATIO_BINS - 1)  # 0.7 in float32 is slightly below 0.7


def forward(config: LumosConfig, model: nn.Module, micro: dict[str, Any]) -> Forward:
    """Return the losses and outputs of a micro-batch.

    An output is the logits over the visual codes less their mean, at the places that are masked in all frames. A code is
    copied if it is the one at the same place of the frame before.
    """
    ids, targets, bins = micro["input_ids"], micro["targets"], ratio_bins(micro["mask_ratios"])
    hidden, layouts = model.hidden_states(ids, layouts=micro.get("layouts"))
    rows, columns = (targets != IGNORED).nonzero(as_tuple=True)
    number = torch.full_like(ids, -1)  # of the loss of each place
    number[rows, columns] = torch.arange(len(rows), device=ids.device)
    known: dict[str, Tensor] = {}  # losses and, at places whose logits were needed for outputs, True
    frames = frame_indices(layouts, ids.shape[1]).to(ids.device)[rows, columns]
    codes = torch.where(targets != IGNORED, targets, ids - config.visual_token_start)
    spans = torch.tensor([layout.frames[0].end - layout.frames[0].start for layout in layouts], device=ids.device)[rows]
    is_copied = codes[rows, columns] == codes[rows, (columns - spans).clamp(min=0)]
    of_frame = torch.where(frames == 0, 0, torch.where(is_copied, 1, 2))

    def outputs() -> Iterator[Output]:
        if not torch.is_grad_enabled():
            known.update(losses=hidden.new_zeros(len(rows), dtype=torch.float32), has=torch.zeros_like(rows, dtype=torch.bool))
        for row, layout in enumerate(layouts):
            frame = torch.arange(len(layout.frames), device=ids.device)
            span = layout.frames[0].end - layout.frames[0].start
            at = layout.frames[0].start + frame[:, None] * span + torch.arange(span, device=ids.device)  # [T, span]
            at = at[:, (targets[row, at] != IGNORED).all(0)]
            for part in at.split(max(1, OUTPUT_VALUES // (len(at) * config.visual_token_count)), dim=1):
                if part.numel():
                    logits = model.lm_head(hidden[row, part], visual_only=True).float()  # [T, places, codes]
                    if known:
                        at_loss = number[row, part].flatten()
                        found = F.cross_entropy(logits.flatten(0, 1), targets[row, part].flatten(), reduction="none")
                        known["losses"][at_loss] = found
                        known["has"][at_loss] = True
                    yield Output((logits - logits.mean(-1, keepdim=True)).flatten(1), frame, bins[row, : len(frame)])

    def losses() -> Tensor:
        """The head is by far the largest matrix of a small model: places with known losses need no second product with it."""
        if not known:
            return model.lm_head(hidden[rows, columns], targets=targets[rows, columns])
        (left,) = (~known["has"]).nonzero(as_tuple=True)
        if len(left):
            known["losses"][left] = model.lm_head(hidden[rows[left], columns[left]], targets=targets[rows[left], columns[left]])
        return known["losses"]

    return Forward(losses, {"frames": of_frame, "level": bins[rows, frames]}, outputs)


def stream_frames(config: LumosConfig, micro: dict[str, Any], stream: Tensor) -> Tensor:
    """Return the latent frame of each token of a stream [B, L, C]: int64 [B, L], -1 for text, -2 for padding."""
    layouts = micro.get("layouts") or parse_layout(micro["input_ids"], config)
    lengths = torch.tensor([layout.length for layout in layouts])[:, None]
    found = frame_indices(layouts, stream.shape[1])
    return found.masked_fill(torch.arange(stream.shape[1]) >= lengths, -2).to(stream.device)
