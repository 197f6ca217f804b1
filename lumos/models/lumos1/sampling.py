"""Sampling of latent frames: the loop over frames, the decoding steps of a frame, and the rules of a step.

`generate_frames` samples one frame after the other, `decide_frame` the codes of a frame in parallel
steps, `decide` the codes of a step. The rules (guidance, filtering, drawing, the choice of codes by
confidence) are pure functions at the end. The network is asked through the `DecodingEngine`.

Two things make a step cheap:

- The head computes logits only for masked positions and visual codes, a piece at a time, so the full
  logits never exist in memory.
- Guidance is applied to hidden states, so the head runs once for both branches. This gives the same
  logits, because the head is linear.

Shapes: S samples, R rows, n tokens of a frame's span, m masked positions, C channels, K codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lumos.errors import NotFinite
from lumos.models.lumos1.cache import PrefixCache
from lumos.models.lumos1.engine import DecodingEngine, cache_tokens, code_offsets
from lumos.models.lumos1.masking import history_mask, unmasking_counts
from lumos.models.lumos1.modeling import LumosForVideoGeneration, OutputHead
from lumos.models.lumos1.sequence import FRAME_HEADER, Frame, build_frames, parse_layout
from lumos.models.lumos1.settings import GenerationSettings

LOGITS_BYTES = 2**24  # size of the logits that exist at a time; a GPU takes eight times as many, as it needs larger products


def generate_frames(
    model: LumosForVideoGeneration,
    prefixes: Sequence[Tensor],
    unconditional: Sequence[Tensor] | None,
    *,
    without_given: Sequence[Tensor] | None = None,
    grid: tuple[int, int],
    new_frames: int,
    settings: GenerationSettings,
    generators: Sequence[torch.Generator],
    on_step: Callable[[int, int, Tensor], None] = lambda frame, step, ids: None,
    prefix_cache: PrefixCache | None = None,
    later: Mapping[int, Sequence[Tensor]] | None = None,
) -> Iterator[Tensor]:
    """Sample latent frames after the prefixes; yields the codes int64 [S, h, w] of each frame when it is finished.

    Args:
        model: the decoder.
        prefixes: ids of the conditional branch of each sample.
        unconditional: ids of the unconditional branch of each sample; None turns guidance off.
        without_given: ids of a third branch of each sample, the unconditional ones with masked given frames. With it,
            settings.image_guidance_scale guides by the given frames. Frames made so far are in every branch.
        grid: rows and columns of codes in a latent frame.
        new_frames: the number of latent frames to sample.
        settings: the sampling options.
        generators: one CPU generator per sample, so that a clip does not depend on its batch.
        on_step: called after each step with (frame, step, ids [S, n] of the frame's span). It may change
            the ids in place where codes are decided.
        prefix_cache: the prefix cache, which saves the last unconditional prefix for the next call.
        later: {new frame: prefixes} for prompts that change within the clip. From that frame on, the
            conditional branch has the new prefix. The frames made so far are processed again after it,
            so that they have the positions of a clip that began with this prefix.

    Raises NotFinite if logits are NaN or infinite.
    """
    config, device = model.config, model.device
    samples, (h, w) = len(prefixes), grid
    starts = {0: prefixes, **(later or {})}
    others = [*(unconditional or ()), *(without_given or ())]
    branches = 1 + len(others) // samples
    blank = build_frames(torch.full((1, h, w), -1), config)  # [1, n]
    offsets = code_offsets(Frame(0, h, w)).to(device)
    hidden_later = torch.zeros(blank.shape[1], dtype=torch.bool)
    hidden_later[FRAME_HEADER:-1] = history_mask(h * (w + 1), settings.history_mask_ratio)
    hidden_later = hidden_later.to(device)
    rows_from = {start: [*conditional, *others] for start, conditional in starts.items()}
    if settings.mask_given_frames:
        rows_from = {start: [mask_given(row, hidden_later.cpu(), config) for row in rows] for start, rows in rows_from.items()}
    span, given = blank.shape[1], len(parse_layout(rows_from[0][0][None], config)[0].frames)
    longest = max(len(row) for rows in rows_from.values() for row in rows)
    capacity = cache_tokens(longest - given * span, span, given + new_frames, settings.history_frames)

    engine, finished, history = DecodingEngine(model), None, [[] for _ in range(branches * samples)]
    for frame in range(new_frames):
        if frame in rows_from:
            rows = [torch.cat([row, *made]) for row, made in zip(rows_from[frame], history, strict=True)]
            shared = prefix_cache if others and frame == 0 else None
            engine.prefill(rows, capacity, shared, settings.history_frames, settings.history_thinning)
            finished = None
        uniform = draw_uniform(generators, settings.steps_of(frame), h * w).to(device)
        ids, masked = blank.to(device).repeat(samples, 1), offsets.repeat(samples, 1)
        for step in decide_frame(engine, ids, masked, settings, uniform, branches, finished):
            on_step(frame, step, ids)
        finished = ids.masked_fill(hidden_later, config.mask_token_id).repeat(branches, 1)
        if frame + 1 <= max(rows_from):  # a later prefill needs this frame
            for made, row in zip(history, finished.cpu(), strict=True):
                made.append(row)
        yield (ids[:, offsets] - config.visual_token_start).view(samples, h, w)


def decide_frame(
    engine: DecodingEngine, ids: Tensor, masked: Tensor, settings: GenerationSettings, uniform: Tensor, branches: int,
    finished: Tensor | None,
) -> Iterator[int]:  # fmt: skip
    """Decide the masked codes of a frame in place; yields the number of each step after it.

    Args:
        ids: [S, n] of the frame's span.
        masked: int64 [S, m], the offsets of the codes that are masked.
        uniform: uniform numbers from `draw_uniform`; their first dimension is the number of steps.
        branches: 2 with guidance, 3 with a branch without given frames, else 1.
        finished: ids [R, n] of the frame before, if it is not in the cache yet. The first step commits
            it in the same forward pass. If that step runs only the conditional branch, a forward pass
            of its own commits it, because the cache of every row needs it.

    Raises NotFinite if the logits of a sample are NaN or infinite.
    """
    model, steps, total = engine.model, len(uniform), masked.shape[1]
    broken = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    only = None  # the offsets that the next step runs, if it does not run all
    for step, (before, after) in enumerate(pairwise([total, *unmasking_counts(total, steps)])):
        active = branches if settings.guides(step, steps) else 1
        if finished is not None and active < branches:
            engine.commit(finished)
            finished = None
        if settings.runs_all(step, steps):
            only = None
        hidden = engine.hidden(
            ids.repeat(active, 1), masked.repeat(active, 1), finished, None if only is None else only.repeat(active, 1)
        )
        finished, only = None, masked
        if active > 1:
            hidden = guide(hidden, settings.guidance_scale, settings.image_guidance_scale if active == 3 else None)
        for_codes, for_confidence = uniform[step, :, :, : masked.shape[1]]
        codes, log_prob = decide(model.lm_head, hidden, for_codes, settings)
        broken |= log_prob.isnan().any(dim=1)
        temperature = settings.temperature * (1 - (step + 1) / steps)
        put(ids, masked, codes + model.config.visual_token_start)
        if settings.confidence_threshold is None:
            masked = masked.gather(1, least_confident(log_prob, for_confidence, temperature, after))
        else:  # samples may have different numbers of masked codes; offset 0 pads the shorter ones
            masked = unsure(masked, log_prob, for_confidence, temperature, before - after, settings.confidence_threshold)
        put(ids, masked, torch.full_like(masked, model.config.mask_token_id))
        if masked.shape[1] == 0:  # the check waits for the device, so it runs once per frame
            check_finite(broken)
        before_callback = ids.clone() if settings.step_reuse > 1 else ids
        yield step
        if masked.shape[1] == 0:
            return
        if before_callback is not ids and not torch.equal(before_callback, ids):
            only = None  # the caller changed decided codes, whose keys and values are no longer right


def check_finite(broken: Tensor) -> None:
    """Raise NotFinite, with the indices of the samples, if `broken`, bool [S], is True for any."""
    if broken.any():
        raise NotFinite(
            "the model's numbers are not finite (NaN or infinity) where codes are drawn; check the weights and the adapter, or, "
            "with dtype float16, whose largest number is 65504, take bfloat16 or float32",
            broken.nonzero().flatten().tolist(),
        )


def put(ids: Tensor, at: Tensor, values: Tensor) -> None:
    """Write values [S, m] to ids [S, n] at the offsets `at` [S, m], in place.

    Offset 0 is padding: it is the place of frame_start, which keeps its id.
    """
    ids.scatter_(1, at, torch.where(at > 0, values, ids[:, :1]))


@torch.inference_mode()
def decide(head: OutputHead, hidden: Tensor, uniform: Tensor, settings: GenerationSettings) -> tuple[Tensor, Tensor]:
    """Sample a code at each position: hidden [S, m, C], uniform [S, m] -> codes [S, m], log-probabilities [S, m].

    Logits are computed in pieces of about LOGITS_BYTES, so that the memory for them is bounded.
    """
    piece = max(1, LOGITS_BYTES * (1 if hidden.is_cpu else 8) // (4 * head.rows))
    codes, log_probs = [], []
    for states, numbers in zip(hidden.flatten(0, 1).split(piece), uniform.flatten().split(piece), strict=True):
        logits = filter_logits(head(states, visual_only=True).float(), settings.top_k, settings.top_p)
        drawn = sample_codes(logits, numbers)
        codes.append(drawn[0])
        log_probs.append(drawn[1])
    return torch.cat(codes).view(uniform.shape), torch.cat(log_probs).view(uniform.shape)


def draw_uniform(generators: Sequence[torch.Generator], steps: int, total: int) -> Tensor:
    """Draw uniform numbers [steps, 2, S, total] for a frame: one for the code, one for the confidence.

    Each step gets `total` numbers however many it uses, so that the numbers of a seed do not depend on
    how many codes earlier steps decided.
    """
    return torch.stack([torch.rand(steps, 2, total, generator=g) for g in generators], dim=2)


def mask_given(prefix: Tensor, hidden: Tensor, config) -> Tensor:
    """Return a prefix, ids [L], with the history mask on each of its frames: hidden bool [n] over a frame's span."""
    prefix = prefix.clone()
    for frame in parse_layout(prefix[None], config)[0].frames:
        prefix[frame.start : frame.end].masked_fill_(hidden, config.mask_token_id)
    return prefix


def guide(states: Tensor, scale: float, image_scale: float | None = None) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): states [2 S, m, C], conditional rows first -> [S, m, C].

    With `image_scale` there are three branches [3 S, m, C]: text and given frames, given frames alone, and neither. Text and
    frames then have a scale each (arXiv 2412.07730, separate guidance).
    states: logits, or the hidden states before the head. Both give the same logits, as the head is linear.
    """
    if image_scale is None:
        conditional, unconditional = states.chunk(2)
        return torch.lerp(unconditional, conditional, scale)
    full, frames, nothing = states.chunk(3)
    return torch.lerp(nothing, frames, image_scale) + scale * (full - frames)


def filter_logits(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Set logits to -inf outside the `top_k` most likely codes, and outside the smallest set of probability `top_p`.

    The most likely code is never removed.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, kept.indices, kept.values)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    return logits


def sample_codes(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Sample a code at each position: logits fp32 [..., K], uniform [...] in [0, 1) -> codes and log-probabilities [...].

    The code is the inverse of the cumulative distribution at the uniform number. One number per position
    gives the same code on every device. The cumulative sum runs over blocks of codes first, and then
    inside the block that holds the number, so that no cumulative sum over all K codes is written.
    Where logits are NaN or +inf, the log-probability is NaN and the code is arbitrary.
    """
    blocks = block_count(logits.shape[-1])
    weights = (logits - logits.amax(-1, keepdim=True)).exp_().unflatten(-1, (blocks, -1))
    upto = weights.sum(-1).cumsum(-1)
    total = upto[..., -1:]
    threshold = uniform[..., None] * total
    block = search(upto, threshold)
    inside = weights.gather(-2, block[..., None].expand(*block.shape, weights.shape[-1])).squeeze(-2)
    before = upto.gather(-1, (block - 1).clamp(min=0)).masked_fill(block == 0, 0)
    code = search(inside.cumsum(-1), threshold - before)
    log_prob = (inside.gather(-1, code) / total).log()
    return (block * inside.shape[-1] + code).squeeze(-1), log_prob.squeeze(-1)


def search(cumulative: Tensor, threshold: Tensor) -> Tensor:
    """Return the first index [..., 1] where a cumulative sum [..., n] reaches the threshold [..., 1].

    An entry that adds nothing to the sum is never returned, so a code of probability 0 is never sampled.
    If the sum is NaN, the last index is returned.
    """
    tiny = torch.finfo(cumulative.dtype).tiny
    found = torch.searchsorted(cumulative, threshold.clamp(min=tiny).minimum(cumulative[..., -1:]))
    return found.clamp_(max=cumulative.shape[-1] - 1)


def block_count(codes: int) -> int:
    """Return the largest divisor of `codes` that is not above its square root."""
    return max(n for n in range(1, math.isqrt(codes) + 1) if codes % n == 0)


def gumbel(uniform: Tensor) -> Tensor:
    """Turn uniform numbers in [0, 1) into standard Gumbel noise."""
    tiny = torch.finfo(torch.float32).tiny
    exponential = -torch.log(uniform.clamp(min=tiny))
    return -torch.log(exponential.clamp(min=tiny))


def least_confident(log_prob: Tensor, uniform: Tensor, temperature: float, count: int) -> Tensor:
    """Return the `count` positions that stay masked, int64 [S, count], ascending.

    They have the lowest confidence, log p + temperature * Gumbel noise. log_prob, uniform: [S, m].
    Source: MaskGIT (arXiv 2202.04200), with Gumbel noise as in Muse and the published release.
    """
    confidence = log_prob + temperature * gumbel(uniform)
    return confidence.topk(count, dim=-1, largest=False).indices.sort(-1).values


def unsure(masked: Tensor, log_prob: Tensor, uniform: Tensor, temperature: float, decided: int, threshold: float) -> Tensor:
    """Return the offsets that stay masked after a step with a confidence threshold.

    The step decides the `decided` most confident codes, and every code of probability >= threshold.

    masked: int64 [S, m], the offsets that were masked, above 0 and ascending. A sample with fewer offsets
    is padded with 0 at the end. The result has the same form, and is as wide as the most offsets of a
    sample. Reading this width makes the host wait for the device.
    """
    waiting = masked > 0
    confidence = (log_prob + temperature * gumbel(uniform)).masked_fill(~waiting, math.inf)
    rank = confidence.argsort(-1).argsort(-1)
    stays = (rank < waiting.sum(-1, keepdim=True) - decided) & (log_prob < math.log(threshold))
    last = torch.iinfo(masked.dtype).max
    kept = masked.masked_fill(~stays, last).sort(-1).values[:, : int(stays.sum(-1).max())]
    return kept.masked_fill(kept == last, 0)
