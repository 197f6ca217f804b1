"""Evaluates how well the decoder predicts masked codes: cross-entropy and accuracy by latent frame and by mask ratio.

The range of mask ratios is divided into bins. Each clip is masked once for each bin, with a ratio that is
uniform in the bin, and once as in training. All random numbers follow from (seed, bin, clip), so two
models with the same tokenizer predict the same codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumos.data.seeding import sample_generator
from lumos.data.shards import format as shards
from lumos.data.shards.description import check_tokenizer, read_description
from lumos.data.shards.source import ShardIndex
from lumos.data.synthetic.sampling import SyntheticScenes
from lumos.errors import UserError
from lumos.models.lumos1.loss import chunks
from lumos.models.lumos1.masking import mask_sequence
from lumos.models.lumos1.modeling import LumosForVideoGeneration
from lumos.models.lumos1.pipeline import LumosPipeline
from lumos.models.lumos1.request import prompt_ids
from lumos.models.lumos1.sequence import build_sequence, clip_header, frame_indices, num_latent_frames, pad_sequences
from lumos.pipeline.defaults import ClipDefaults
from lumos.training.task import IGNORED
from lumos.video.frames import from_uint8
from tokenizer import VideoTokenizer

AS_TRAINED = "as in training"
CHUNK = 1024
"""Positions whose logits exist at the same time."""


def scene_codes(scenes: SyntheticScenes, count: int, tokenizer: VideoTokenizer) -> Iterator[tuple[Tensor, str, int]]:
    """Yield (codes [t, h, w], caption, fps) of the first `count` synthetic scenes."""
    parameter = next(tokenizer.parameters())
    for index in range(count):
        frames, caption = scenes[index]
        video = from_uint8(frames)[None].to(parameter.device, parameter.dtype)
        with torch.inference_mode():
            yield tokenizer.encode(video)[0].cpu(), caption, scenes.fps


def shard_codes(folder: str | Path, count: int, num_frames: int, tokenizer: VideoTokenizer) -> Iterator[tuple[Tensor, str, int]]:
    """Yield (codes [t, h, w], caption, fps) of `count` clips of ingested shards, cut to `num_frames` frames.

    The clips are the first by hash of those that are long enough, which training keeps for validation. If
    num_frames is 1 and the shards hold pictures, only pictures are used.
    Raises UserError if there are too few clips, or if another tokenizer made them.
    """
    description = read_description(Path(folder))
    check_tokenizer(description, tokenizer, "the one of --model")
    index = ShardIndex(Path(folder))
    usable = index.usable(num_frames)
    if len(usable) < count:
        raise UserError(f"{folder} has {len(usable)} clips of at least {num_frames} frames, {count} are asked for; lower --count")
    t = num_latent_frames(num_frames, tokenizer.temporal_compression)
    for row in index.first_by_hash(usable, count):
        shard, group, place = index.place_of(int(row))
        found = shards.read_group(index.paths[shard], group, made_by=description["tokenizer"])[place]
        yield torch.from_numpy(found["codes"][:t].astype(np.int64)), found["caption"], found["fps"]


def sequence_of(pipe: LumosPipeline, codes: Tensor, caption: str, fps: int) -> Tensor:
    """Return the ids [L] of a whole clip with its prompt, in the sequence layout of training."""
    config = pipe.model.config
    t, h, w = codes.shape
    shape = ClipDefaults(
        num_frames=(t - 1) * config.temporal_compression + 1,
        height=h * config.spatial_compression,
        width=w * config.spatial_compression,
        fps=fps,
    )
    duration, fps = clip_header(shape.num_frames, fps)
    ids = prompt_ids(caption, shape, pipe.model.config, pipe.text_tokenizer)
    return build_sequence(ids, codes, fps=fps, duration=duration, config=config)


def ratio_bins(count: int) -> dict[str, tuple[float, float] | None]:
    """Return {name: (low, high)} of `count` equal bins of mask ratios from 0 to 1.

    A last entry AS_TRAINED with the value None stands for the ratios of training (reference, section 5.1).
    """
    edges = [k / count for k in range(count + 1)]
    parts = {f"{low:.2f}-{high:.2f}": (low, high) for low, high in pairwise(edges)}
    return {**parts, AS_TRAINED: None}


def masked_code_loss(
    model: LumosForVideoGeneration,
    sequences: Sequence[Tensor],
    *,
    kind: str,
    num_bins: int,
    seed: int,
    batch_size: int,
    on_batch: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Return {bin: {codes, loss, accuracy, by_frame: {codes, loss, accuracy}}} for clips of ids [L].

    codes is the number of masked codes; loss and accuracy are their means, None if no code was masked.
    by_frame holds a list with one value per latent frame.

    Args:
        sequences: ids [L] of each clip, from `sequence_of`.
        kind: the kind of training mask, one of MASK_KINDS.
        num_bins: the number of bins of mask ratios.
        seed: the seed of the masks.
        batch_size: clips per forward pass.
        on_batch: called after each batch.
    """
    results = {}
    for name, bounds in ratio_bins(num_bins).items():
        sums: dict[int, Tensor] = {}
        for span in chunks(len(sequences), batch_size):
            masked = []
            for clip in range(span.start, span.stop):
                generator = sample_generator(seed, 0, clip, f"loss/{name}")
                ratio = None if bounds is None else float(torch.empty(()).uniform_(*bounds, generator=generator))
                masked.append(mask_sequence(sequences[clip], model.config, kind=kind, fixed_ratio=ratio, generator=generator))
            ids = pad_sequences([m.input_ids for m in masked], model.config.pad_token_id)
            targets = pad_sequences([m.targets for m in masked], IGNORED)
            loss, right, frame = code_scores(model, ids.to(model.device), targets.to(model.device))
            for k in frame.unique().tolist():
                here = frame == k
                found = torch.stack([here.sum(), loss[here].double().sum(), right[here].sum()]).cpu()
                sums[k] = sums.get(k, 0) + found
            on_batch()
        frames = [sums.get(k, torch.zeros(3)) for k in range(max(sums, default=-1) + 1)]
        rows = [shares(*row.tolist()) for row in frames]
        whole = shares(*sum(frames, torch.zeros(3)).tolist())
        results[name] = {**whole, "by_frame": {key: [row[key] for row in rows] for key in whole}}
    return results


def shares(codes: float, loss: float, right: float) -> dict[str, float | None]:
    """Return means from sums: the summed loss and the number of right predictions over `codes` codes."""
    return {
        "codes": int(codes),
        "loss": round(loss / codes, 5) if codes else None,
        "accuracy": round(right / codes, 5) if codes else None,
    }


@torch.inference_mode()
def code_scores(model: LumosForVideoGeneration, input_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss [N], whether the most likely code is right, bool [N], and the latent frame [N] of each target.

    input_ids, targets [B, L]: N is the number of targets that are not IGNORED.
    """
    hidden, layouts = model.hidden_states(input_ids)
    asked = targets != IGNORED
    hidden, wanted = hidden[asked], targets[asked]
    loss = torch.empty(len(wanted), device=wanted.device)
    right = torch.empty(len(wanted), device=wanted.device, dtype=torch.bool)
    for s in chunks(len(wanted), CHUNK):
        logits = model.lm_head(hidden[s], visual_only=True).float()
        loss[s] = torch.nn.functional.cross_entropy(logits, wanted[s], reduction="none")
        right[s] = logits.argmax(dim=1) == wanted[s]
    return loss, right, frame_indices(layouts, input_ids.shape[1]).to(wanted.device)[asked]


def loss_table(results: dict[str, dict[str, Any]]) -> str:
    """Return a table as text, one line per bin.

    Columns: number of masked codes, loss, accuracy in percent, then loss and accuracy of each latent frame.
    """
    frames = max(len(row["by_frame"]["loss"]) for row in results.values())
    lines = [f"{'hidden':16}{'codes':>9}{'loss':>8}{'right':>8}" + "".join(f"{f'frame {k}':>14}" for k in range(frames))]
    for name, row in results.items():
        cells = zip(row["by_frame"]["loss"], row["by_frame"]["accuracy"], strict=True)
        lines.append(
            f"{name:16}{row['codes']:9}{number(row['loss']):>8}{number(row['accuracy'], 100):>7}%"
            + "".join(f"{number(loss)} /{number(accuracy, 100):>4}%".rjust(14) for loss, accuracy in cells)
        )
    return "\n".join(lines)


def number(value: float | None, scale: int = 1) -> str:
    """Return a value as text: a loss with three decimals, a scaled value with one, None as "-"."""
    return "-" if value is None else f"{value:.3f}" if scale == 1 else f"{scale * value:.1f}"
