"""Frame-causal attention: bidirectional inside a latent frame, causal between frames, causal over text.

A query may attend to a key if key <= query, or if both are in the span of the same frame. The span
includes frame_start and frame_end.

The rule has three implementations:

- `segmented`, the default, splits a sequence into segments. A frame is one unmasked attention over
  all tokens up to its end, and a run of text is one causal attention. No mask tensor exists, so
  memory is linear in the sequence length.
- `flex` compiles the rule into one kernel on CUDA.
- `dense` builds the mask [B, L, L]. It is the reference in the tests, and the fastest for short clips.

The samples of a batch may differ in length and in their frames. No token attends to padding or to
another sample.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from lumos.models.lumos1.sequence import SequenceLayout, frame_indices

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""A function (layer, q [B, H, L, D], k, v [B, Hkv, L, D]) -> [B, H, L, D]; `layer` is the layer's index."""

KERNELS = frozenset((
    "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention", "flash_attn::_flash_attn_forward",
))  # fmt: skip
"""Names of the operators that compute the attention of a segment; the device and the dtype decide which one runs."""
CAUSAL_ROWS = 256  # text after the first frame is masked in blocks of this many queries


def attention_for(implementation: str, layouts: Sequence[SequenceLayout], length: int, device: torch.device) -> Attend:
    """Return the attention function of one forward pass over whole sequences [B, length] with these layouts.

    implementation: "segmented", "dense" or "flex".
    """
    if implementation == "dense":
        mask = dense_mask(layouts, length, device)[:, None]
        return lambda layer, q, k, v: dense_attention(q, k, v, mask)
    if implementation == "flex":
        block_mask = flex_block_mask(layouts, length, device)
        return lambda layer, q, k, v: flex_attention(q, k, v, block_mask)
    return lambda layer, q, k, v: segmented_attention(q, k, v, layouts)


def allowed_pairs(layout: SequenceLayout) -> int:
    """Return the number of (query, key) pairs that the frame-causal rule allows.

    The pairs measure the work of attention: no implementation can compute fewer.
    """
    pairs = 0
    for start, end, bidirectional in layout.segments:
        n = end - start
        pairs += n * end if bidirectional else n * start + n * (n + 1) // 2
    return pairs


def dense_mask(layouts: Sequence[SequenceLayout], length: int, device: torch.device | None = None) -> Tensor:
    """Return the attention mask, bool [B, L, L] (query, key), True where a query may attend to a key.

    Padding attends to itself only: a softmax over an empty row would give NaN.
    """
    at = torch.arange(length, device=device)
    frame = frame_indices(list(layouts), length).to(at.device)
    same_frame = (frame[:, :, None] == frame[:, None, :]) & (frame >= 0)[:, :, None]
    allowed = (at[None, :] <= at[:, None]) | same_frame
    real = at < torch.tensor([layout.length for layout in layouts], device=at.device)[:, None]
    return allowed & real[:, :, None] & real[:, None, :] | torch.eye(length, dtype=torch.bool, device=at.device)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention with a mask: q [B, H, L, D], k, v [B, Hkv, L, D], mask bool [B, 1, L, L] -> [B, H, L, D]."""
    groups = q.shape[1] // k.shape[1]
    k, v = expand_heads(k, groups), expand_heads(v, groups)
    if q.is_cpu and q.dtype == torch.bfloat16:  # torch's kernel computes scores in float32 and is slower
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf"))
        return ((q * q.shape[-1] ** -0.5) @ k.mT + bias).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def segmented_attention(q: Tensor, k: Tensor, v: Tensor, layouts: Sequence[SequenceLayout]) -> Tensor:
    """Attention by segments: q [B, H, L, D], k, v [B, Hkv, L, D] -> [B, H, L, D]; the output at padding is zero.

    Neighbouring rows with equal layouts are computed together.
    """
    runs = list(equal_runs(layouts))
    sizes = [stop - start for start, stop in runs]
    rows = zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)  # the gradient of split is one cat
    out = [_run(qr, kr, vr, layouts[start]) for (start, _), qr, kr, vr in rows]
    return torch.cat(out) if len(out) > 1 else out[0]


def _run(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Tensor:
    """Attention of rows that share one layout.

    The output lies in memory in the order [B, L, H, D], so the output projection needs no copy.

    Segments run from last to first, and each slices its keys and values from those of the segment
    before. Autograd then starts at the first segment, which has the shortest prefix, and pads each
    gradient with zeros only to the length of the next prefix. If every segment sliced the full keys,
    each gradient would be padded to the full length.
    """
    padding = q.shape[2] - layout.length
    segments = list(_blocks(layout))
    *queries, rest = q.split([*(end - start for start, end, _ in segments), padding], dim=2)
    parts = [torch.zeros_like(rest)]
    for query, (_, end, bidirectional) in zip(reversed(queries), reversed(segments), strict=True):
        k, v = k[:, :, :end], v[:, :, :end]
        parts.append(prefix_attention(query, k, v, causal=not bidirectional))
    return torch.cat([part.transpose(1, 2) for part in reversed(parts)], dim=1).transpose(1, 2)


def _blocks(layout: SequenceLayout) -> Iterator[tuple[int, int, bool]]:
    """Yield the segments, with text after a frame cut into blocks of CAUSAL_ROWS, so that causal masks stay small."""
    for start, end, bidirectional in layout.segments:
        size = end - start if bidirectional or start == 0 else CAUSAL_ROWS
        for s in range(start, end, size):
            yield s, min(s + size, end), bidirectional


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention of the last n of m tokens: q [B, H, n, D], k, v [B, H or Hkv, m, D], n <= m -> [B, H, n, D].

    If `causal`, query i attends to the keys up to m - n + i, else to every key. flash-attn computes it
    on CUDA in half precision if it is installed, else scaled_dot_product_attention.
    """
    if uses_flash(q):
        out = _flash_attn()(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal)
        return out.transpose(1, 2)
    groups, n, m = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    if causal and n == m:  # q is copied: autograd would keep the whole tensor that q is a slice of
        return F.scaled_dot_product_attention(q.contiguous(), expand_heads(k, groups), expand_heads(v, groups), is_causal=True)
    mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n).repeat(groups, 1) if causal else None
    folded = q.unflatten(1, (-1, groups)).flatten(2, 3)  # heads of a group become more queries of one head
    return F.scaled_dot_product_attention(folded, k, v, attn_mask=mask).reshape(q.shape)


def save_attention_outputs() -> tuple:
    """Return the contexts with which `torch.utils.checkpoint` saves the outputs of attention and recomputes the rest.

    The output of attention has the size of a layer's input, but its cost grows with the square of the
    sequence length: it is cheap to save and expensive to recompute.
    """

    def policy(context, op, *args, **kwargs) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op.name() in KERNELS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def expand_heads(x: Tensor, groups: int) -> Tensor:
    """Repeat each key-value head for its group of query heads: [B, Hkv, L, D] -> [B, Hkv * groups, L, D]."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def equal_runs(items: Sequence) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of each run of equal neighbours."""
    start = 0
    for i in range(1, len(items) + 1):
        if i == len(items) or items[i] != items[start]:
            yield start, i
            start = i


def uses_flash(q: Tensor) -> bool:
    """Return whether flash-attn computes this attention: on CUDA, in half precision, with the extra `[flash]` installed."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and _flash_attn() is not None


@functools.cache
def _flash_attn() -> Callable | None:
    """Return flash-attn's function, or None with one warning if flash-attn is not installed."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        warnings.warn("flash-attn is not installed: attention runs by torch's scaled_dot_product_attention")
        return None
    return flash_attn_func


def flex_block_mask(layouts: Sequence[SequenceLayout], length: int, device: torch.device):
    """Return the frame-causal rule as a FlexAttention block mask [B, 1, L, L]."""
    from torch.nn.attention.flex_attention import create_block_mask

    frame = frame_indices(list(layouts), length).to(device)
    used = torch.tensor([layout.length for layout in layouts], device=device)

    def rule(b, h, query, key):
        same_frame = (frame[b, query] == frame[b, key]) & (frame[b, query] >= 0)
        real = (query < used[b]) & (key < used[b])
        return real & ((key <= query) | same_frame) | (query == key)

    return create_block_mask(rule, len(layouts), None, length, length, device=device)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, block_mask) -> Tensor:
    """FlexAttention with a block mask: q [B, H, L, D], k, v [B, Hkv, L, D] -> [B, H, L, D]. It is compiled on CUDA.

    Raises ValueError for a CPU tensor that requires a gradient: FlexAttention has no backward on a CPU.
    """
    if q.device.type == "cpu" and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("attention 'flex' has no backward on a CPU; set attention to 'segmented' to train here")
    if q.device.type == "cpu":
        q, k, v = q.detach(), k.detach(), v.detach()
    return _compiled_flex(q.device.type)(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def _compiled_flex(device_type: str) -> Callable:
    from torch.nn.attention.flex_attention import flex_attention as flex

    return torch.compile(flex, dynamic=False) if device_type == "cuda" else flex
