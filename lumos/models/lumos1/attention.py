"""Frame-causal attention: bidirectional inside a latent frame, causal between frames, causal over text.

allowed(query, key) = key <= query, or both in the same frame's span (frame_start and frame_end included).

Three forms of the same rule. `segmented` is the default: a frame is one unmasked attention over everything up to its
end, a stretch of text one causal attention, so no mask tensor exists and memory is linear in the length. `flex`
compiles the rule into one kernel on CUDA. `dense` spells the rule out as [B, L, L]: the oracle of the tests,
and the fastest where clips are short.
Samples of a batch may differ in length and frames; nobody sees another sample's frames, nor padding.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from lumos.models.lumos1.sequence import Layout, frame_indices

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [B, H, L, D], k, v [B, Hkv, L, D]) -> [B, H, L, D]"""

KERNELS = frozenset((
    "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention", "flash_attn::_flash_attn_forward",
))  # fmt: skip
"""What computes the segments, by device and format."""
CAUSAL_ROWS = 256  # queries of text after the first frame are masked in blocks of this many rows


def attention_for(implementation: str, layouts: Sequence[Layout], length: int, device: torch.device) -> Attend:
    """The attention of one forward pass over whole sequences [B, length] with these layouts."""
    if implementation == "dense":
        mask = dense_mask(layouts, length, device)[:, None]
        return lambda layer, q, k, v: dense_attention(q, k, v, mask)
    if implementation == "flex":
        block_mask = flex_block_mask(layouts, length, device)
        return lambda layer, q, k, v: flex_attention(q, k, v, block_mask)
    return lambda layer, q, k, v: segmented_attention(q, k, v, layouts)


def allowed_pairs(layout: Layout) -> int:
    """(query, key) pairs that the frame-causal rule allows: the work that must be done."""
    pairs = 0
    for start, end, bidirectional in layout.segments:
        n = end - start
        pairs += n * end if bidirectional else n * start + n * (n + 1) // 2
    return pairs


def dense_mask(layouts: Sequence[Layout], length: int, device: torch.device | None = None) -> Tensor:
    """bool [B, L, L] (query, key). Padding queries see only themselves, so that no row is empty."""
    at = torch.arange(length, device=device)
    frame = frame_indices(list(layouts), length).to(at.device)
    same_frame = (frame[:, :, None] == frame[:, None, :]) & (frame >= 0)[:, :, None]
    allowed = (at[None, :] <= at[:, None]) | same_frame
    real = at < torch.tensor([layout.length for layout in layouts], device=at.device)[:, None]
    return allowed & real[:, :, None] & real[:, None, :] | torch.eye(length, dtype=torch.bool, device=at.device)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [B, H, L, D], k, v [B, Hkv, L, D], mask bool [B, 1, L, L] -> [B, H, L, D]."""
    groups = q.shape[1] // k.shape[1]
    k, v = expand_heads(k, groups), expand_heads(v, groups)
    if q.is_cpu and q.dtype == torch.bfloat16:  # torch's kernel is slower there, with scores in float32
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf"))
        return ((q * q.shape[-1] ** -0.5) @ k.mT + bias).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def segmented_attention(q: Tensor, k: Tensor, v: Tensor, layouts: Sequence[Layout]) -> Tensor:
    """q [B, H, L, D], k, v [B, Hkv, L, D] -> [B, H, L, D]; rows of equal layout run together. Padding gives zeros."""
    runs = list(equal_runs(layouts))
    sizes = [stop - start for start, stop in runs]
    rows = zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)  # split: its gradient is one cat
    out = [_run(qr, kr, vr, layouts[start]) for (start, _), qr, kr, vr in rows]
    return torch.cat(out) if len(out) > 1 else out[0]


def _run(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Rows that share a layout, in the memory's order [B, L, H, D], which the next matrix product wants.

    From the last segment to the first, each with a prefix of the prefix of the one behind it: the backward pass then begins with
    the shortest and never fills more than the next prefix with zeros, nor holds more than one beside the sum.
    """
    padding = q.shape[2] - layout.length
    segments = list(_blocks(layout))
    *queries, rest = q.split([*(end - start for start, end, _ in segments), padding], dim=2)
    parts = [torch.zeros_like(rest)]
    for query, (_, end, bidirectional) in zip(reversed(queries), reversed(segments), strict=True):
        k, v = k[:, :, :end], v[:, :, :end]
        parts.append(prefix_attention(query, k, v, causal=not bidirectional))
    return torch.cat([part.transpose(1, 2) for part in reversed(parts)], dim=1).transpose(1, 2)


def _blocks(layout: Layout) -> Iterator[tuple[int, int, bool]]:
    """The segments, those of text behind a frame in blocks: their causal masks stay small."""
    for start, end, bidirectional in layout.segments:
        size = end - start if bidirectional or start == 0 else CAUSAL_ROWS
        for s in range(start, end, size):
            yield s, min(s + size, end), bidirectional


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Queries are the last of the keys: q [B, H, n, D], k, v [B, H or Hkv, m, D], n <= m -> [B, H, n, D].

    causal: query i sees keys up to m - n + i; else every key. By flash-attn on CUDA in half precision if installed.
    """
    if uses_flash(q):
        out = _flash_attn()(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal)
        return out.transpose(1, 2)
    groups, n, m = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    if causal and n == m:  # of its own copy of q, as autograd would keep all that a slice is of
        return F.scaled_dot_product_attention(q.contiguous(), expand_heads(k, groups), expand_heads(v, groups), is_causal=True)
    mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n).repeat(groups, 1) if causal else None
    folded = q.unflatten(1, (-1, groups)).flatten(2, 3)  # the query heads of a group are more queries to the same keys
    return F.scaled_dot_product_attention(folded, k, v, attn_mask=mask).reshape(q.shape)


def attention_kept() -> tuple:
    """Contexts for `torch.utils.checkpoint`: what the kernels give is kept, all else of a layer is computed again.

    A kernel's output has the size of a layer's input, and its work grows with the square of the length.
    """

    def policy(context, op, *args, **kwargs) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op.name() in KERNELS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def expand_heads(x: Tensor, groups: int) -> Tensor:
    """[B, Hkv, L, D] -> [B, Hkv * groups, L, D], each key-value head repeated for its group of query heads."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def equal_runs(items: Sequence) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive equal items."""
    start = 0
    for i in range(1, len(items) + 1):
        if i == len(items) or items[i] != items[start]:
            yield start, i
            start = i


def uses_flash(q: Tensor) -> bool:
    """True where flash-attn computes the segments: CUDA, half precision, the extra `[flash]` installed."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and _flash_attn() is not None


@functools.cache
def _flash_attn() -> Callable | None:
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        warnings.warn("flash-attn is not installed: attention runs by torch's scaled_dot_product_attention")
        return None
    return flash_attn_func


def flex_block_mask(layouts: Sequence[Layout], length: int, device: torch.device):
    """The rule as a FlexAttention block mask [B, 1, L, L]."""
    from torch.nn.attention.flex_attention import create_block_mask

    frame = frame_indices(list(layouts), length).to(device)
    used = torch.tensor([layout.length for layout in layouts], device=device)

    def rule(b, h, query, key):
        same_frame = (frame[b, query] == frame[b, key]) & (frame[b, query] >= 0)
        real = (query < used[b]) & (key < used[b])
        return real & ((key <= query) | same_frame) | (query == key)

    return create_block_mask(rule, len(layouts), None, length, length, device=device)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, block_mask) -> Tensor:
    """FlexAttention, compiled on CUDA. It has no backward on a CPU: train with the segmented form there."""
    if q.device.type == "cpu" and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("attention 'flex' has no backward on a CPU; set attention to 'segmented' to train here")
    if q.device.type == "cpu":
        q, k, v = q.detach(), k.detach(), v.detach()
    return _compiled_flex(q.device.type)(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def _compiled_flex(device_type: str) -> Callable:
    from torch.nn.attention.flex_attention import flex_attention as flex

    return torch.compile(flex, dynamic=False) if device_type == "cuda" else flex
