"""The baseline of the generation benchmark: the published method, written plainly.

It is written for the benchmark after the release (reference, sections 6.1 and 12.2); it is not the release itself, whose
own code may be slower. The baseline makes one clip at a time. It has two branches, with
and without the prompt (classifier-free guidance). It does the following, which the engine avoids:

- Each branch has its own cache, which grows by concatenation and is cropped after each step.
- A step is two forward passes of batch one.
- A dense mask and all positions are built again for each frame.
- Logits and softmax are computed at every position over the whole vocabulary.
- Each finished frame takes one more forward pass in each branch to enter the cache, the last frame too.

Weights, sequence grammar and schedules are those of the engine. The logits are equal too if both get the
same ids. The sampled codes differ, because the release samples at every position, also at positions that
are already decided. Shapes: n tokens of a frame, V vocabulary, L sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lumos.models.lumos1.attention import dense_mask, expand_heads
from lumos.models.lumos1.engine import code_offsets
from lumos.models.lumos1.masking import history_mask, unmasking_counts
from lumos.models.lumos1.modeling import LumosForVideoGeneration
from lumos.models.lumos1.rope import position_ids
from lumos.models.lumos1.sampling import gumbel
from lumos.models.lumos1.sequence import FRAME_HEADER, Frame, build_frames, content_mask, parse_layout
from lumos.models.lumos1.settings import GenerationSettings

Watch = Callable[[Tensor, "Tensor | None"], None]
"""Called after each forward pass with the ids of the frame [branches, n] and its logits [branches, n, V].

The logits are None for the pass that writes the finished frame to the cache.
"""


class CachedBranch:
    """One branch of a clip: the ids [1, L] of the sequence so far, and the keys and values of its first `cached` tokens."""

    def __init__(self, model: LumosForVideoGeneration, prefix: Tensor):
        self.model = model
        self.prompt = prefix[None].to(model.device)
        self.cached = 0
        self.keys: list[Tensor | None] = [None] * model.config.num_hidden_layers
        self.values = list(self.keys)

    def begin_frame(self, blank: Tensor) -> None:
        """Build the mask, fp32 [1, 1, L, L], and the positions of the sequence with one more frame [1, n]."""
        model, whole = self.model, torch.cat([self.prompt, blank], dim=1)
        layouts, length = parse_layout(whole, model.config), whole.shape[1]
        allowed = dense_mask(layouts, length).to(model.device)[:, None]
        self.mask = torch.zeros(allowed.shape, device=model.device).masked_fill(~allowed, torch.finfo(torch.float32).min)
        self.positions, self.is_content = position_ids(layouts, length, model.config), content_mask(layouts, length)

    def forward(self, frame_ids: Tensor, keep: bool) -> Tensor:
        """Run the tokens that are not in the cache yet and the frame [1, n]; return the logits of the frame, fp32 [1, n, V].

        If `keep` is set, the frame becomes part of the sequence and stays in the cache.
        """
        start, end = self.cached, self.prompt.shape[1] + frame_ids.shape[1]
        ids = torch.cat([self.prompt[:, start:], frame_ids], dim=1)
        rotary = self.model.rotary(self.positions[..., start:end], self.is_content[:, start:end])
        logits = self.model.lm_head(self.model.model(ids, rotary, self._attend)).float()
        if keep:
            self.prompt = torch.cat([self.prompt, frame_ids], dim=1)
        self.cached = self.prompt.shape[1]
        for cache in (self.keys, self.values):
            cache[:] = [x[:, :, : self.cached] for x in cache]
        return logits[:, -frame_ids.shape[1] :]

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.cached:
            k, v = (torch.cat([c[layer], x], dim=2) for c, x in ((self.keys, k), (self.values, v)))
        self.keys[layer], self.values[layer] = k, v
        groups, end = q.shape[1] // k.shape[1], k.shape[2]
        mask = self.mask[:, :, end - q.shape[2] : end, :end].to(q.dtype)
        return F.scaled_dot_product_attention(q, expand_heads(k, groups), expand_heads(v, groups), attn_mask=mask)


@torch.inference_mode()
def plain_frames(
    model: LumosForVideoGeneration,
    conditional: Tensor,
    unconditional: Tensor,
    *,
    grid: tuple[int, int],
    new_frames: int,
    settings: GenerationSettings,
    seed: int,
    watch: Watch = lambda ids, logits: None,
) -> Iterator[Tensor]:
    """Sample `new_frames` latent frames of one clip and yield the codes [1, h, w] of each.

    Guidance is always on. top_k and top_p are not supported.
    """
    config, device, (h, w) = model.config, model.device, grid
    generator = torch.Generator(device).manual_seed(seed)
    blank = build_frames(torch.full((1, h, w), -1), config).to(device)
    offsets = code_offsets(Frame(0, h, w)).to(device)
    hidden_later = torch.zeros(blank.shape, dtype=torch.bool, device=device)
    hidden_later[:, FRAME_HEADER:-1] = history_mask(h * (w + 1), settings.history_mask_ratio).to(device)
    still_masked = unmasking_counts(h * w, settings.num_inference_steps)
    branches = [CachedBranch(model, prefix) for prefix in (conditional, unconditional)]

    def forward(ids: Tensor, keep: bool) -> Tensor:
        logits = torch.cat([branch.forward(ids, keep) for branch in branches])
        watch(ids.expand(len(branches), -1), None if keep else logits)
        return logits

    for _ in range(new_frames):
        ids = blank.clone()
        for branch in branches:
            branch.begin_frame(blank)
        for step, count in enumerate(still_masked):
            with_prompt, without = forward(ids, keep=False)[:, offsets]
            logits = without + settings.guidance_scale * (with_prompt - without)
            logits[:, : config.visual_token_start] = float("-inf")
            logits[:, config.visual_token_start + config.visual_token_count :] = float("-inf")
            probabilities = logits.softmax(-1)
            drawn = torch.multinomial(probabilities, 1, generator=generator)
            chance = probabilities.gather(-1, drawn)[:, 0]
            decided = ids[0, offsets] != config.mask_token_id
            drawn = torch.where(decided, ids[0, offsets], drawn[:, 0])
            temperature = settings.temperature * (1 - (step + 1) / len(still_masked))
            noise = gumbel(torch.rand(chance.shape, generator=generator, device=device))
            confidence = (chance.clamp(min=1e-20).log() + temperature * noise).masked_fill(decided, float("inf"))
            ids[0, offsets] = drawn
            ids[0, offsets[confidence.argsort()[:count]]] = config.mask_token_id
        forward(ids.masked_fill(hidden_later, config.mask_token_id), keep=True)
        yield (ids[:, offsets] - config.visual_token_start).view(1, h, w)
