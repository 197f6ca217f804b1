"""The block of STIV's transformer.

A block has spatial attention within a frame, temporal attention at a place, cross-attention to the text and an MLP.
Spatial attention keeps frames apart, temporal attention keeps places apart, and the rest keeps tokens apart. So without
gradients, on a CPU, a block computes a few frames or places at a time: the tensors of such a piece stay in the cache of the
processor, where a whole clip would go through memory for every norm, rotation and GELU.

Shapes: B batch, f frames, s places of a frame, d channels; m text tokens.
Source: arXiv 2412.07730; the order of the units follows reference, section 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumos.models.stiv.attention import StivAttention
from lumos.models.stiv.configuration import StivConfig
from lumos.models.stiv.fused import norm, normed_sum
from lumos.models.stiv.rope import Rotary

PIECE_VALUES = 2**18
"""Values of a piece of the tokens for each thread: 1 MiB in float32. The MLP holds four times as many at once."""


class StivMLP(nn.Module):
    """d -> ratio x d -> d with GELU (tanh)."""

    def __init__(self, width: int, ratio: int):
        super().__init__()
        self.up_proj = nn.Linear(width, ratio * width)
        self.down_proj = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class Block(nn.Module):
    """One block: spatial, temporal and cross-attention, and an MLP; all but the first may be missing (`config.without`).

    skipped: the parts that the forward pass leaves out.
    """

    skipped: frozenset[str] = frozenset()

    def __init__(self, config: StivConfig, number: int):
        super().__init__()
        d, parts = config.hidden_size, config.parts_of(number)
        self.spatial = StivAttention(d, qk_norm=config.qk_norm)
        self.temporal = StivAttention(d, qk_norm=config.qk_norm) if "temporal" in parts else None
        self.temporal_gain = nn.Parameter(torch.ones(d)) if "temporal" in parts else None
        self.cross = StivAttention(d, zero_out=True, qk_norm=config.qk_norm) if "cross" in parts else None
        self.mlp = StivMLP(d, config.mlp_ratio) if "mlp" in parts else None
        self.table = nn.Parameter(torch.zeros(6, d)) if config.adaln_table else None
        self.causal = config.causal_in_time
        self.add = normed_sum if config.sandwich_norm else plain_sum

    def forward(
        self, x: Tensor, modulation: Tensor, text: Tensor, text_mask: Tensor | None, places: Rotary, times: Rotary
    ) -> Tensor:
        """x [B, f, s, d] -> [B, f, s, d].

        Args:
            modulation: [B, f or 1, 6, d], shift, scale and gate of spatial attention, then of the MLP.
            text: [B, m, d]. text_mask: bool [B, 1, 1, m].
            places, times: rotary tables of spatial and of temporal attention.
        """
        modulation = modulation if self.table is None else modulation + self.table.to(modulation.dtype)
        words = self.cross.keys_and_values(text) if self._runs("cross") else ()
        if (size := piece_size(x)) is None:
            x = self._over_frames(x, modulation, places)
            x = self._over_places(x, times) if self._runs("temporal") else x
            return self._over_tokens(x, modulation, words, text_mask)
        of_clips, out = modulation.expand(-1, x.shape[1], -1, -1), torch.empty_like(x)
        for b in range(len(x)):
            self._in_pieces(
                x[b : b + 1], of_clips[b : b + 1], tuple(part[b : b + 1] for part in words),
                None if text_mask is None else text_mask[b : b + 1],
                tuple(table[b : b + 1] if table.dim() == 5 else table for table in places), times, size, out[b : b + 1],
            )  # fmt: skip
        return out

    def _in_pieces(
        self, x: Tensor, modulation: Tensor, words: tuple[Tensor, ...], text_mask: Tensor | None, places: Rotary, times: Rotary,
        size: int, out: Tensor,
    ) -> None:  # fmt: skip
        """Write what `forward` returns for one clip to `out`, computed about `size` tokens at a time; modulation [1, f, 6, d].

        Each part of the block reads a piece of the tokens and writes the same piece.
        """
        frames, count = max(1, size // x.shape[2]), max(1, size // x.shape[1])
        pieces, modulations = out.split(frames, 1), modulation.split(frames, 1)
        for part, of_part, to in zip(x.split(frames, 1), modulations, pieces, strict=True):
            to.copy_(self._over_frames(part, of_part, places))
        for part in out.split(count, 2) if self._runs("temporal") else ():
            part.copy_(self._over_places(part, times))
        for part, of_part in zip(pieces, modulations, strict=True):
            part.copy_(self._over_tokens(part, of_part, words, text_mask))

    def _over_frames(self, x: Tensor, modulation: Tensor, places: Rotary) -> Tensor:
        """Return x after spatial attention, which keeps frames apart."""
        if not self._runs("spatial"):
            return x
        shift, scale, gate = modulation[..., None, :3, :].unbind(-2)  # [B, f or 1, 1, d]
        return self.add(x, self.spatial(normed_sum(shift, x, 1 + scale), rotary=places), gate)

    def _over_places(self, x: Tensor, times: Rotary) -> Tensor:
        """Return x after temporal attention, which keeps places apart."""
        by_place = norm(x.transpose(1, 2).contiguous())  # [B, s, f, d], one copy instead of one each for q, k and v
        attended = self.temporal(by_place, rotary=times, causal=self.causal)
        return self.add(x, attended.transpose(1, 2), self.temporal_gain.to(x.dtype)[None, None, None])

    def _over_tokens(self, x: Tensor, modulation: Tensor, words: tuple[Tensor, ...], text_mask: Tensor | None) -> Tensor:
        """Return x after cross-attention and MLP, which keep tokens apart; words: keys and values of the text."""
        if self._runs("cross"):
            x = x + self.cross(x.flatten(1, 2), words, mask=text_mask).view(x.shape)
        if not self._runs("mlp"):
            return x
        shift, scale, gate = modulation[..., None, 3:, :].unbind(-2)
        return self.add(x, self.mlp(normed_sum(shift, x, 1 + scale)), gate)

    def _runs(self, part: str) -> bool:
        return getattr(self, part) is not None and part not in self.skipped


def plain_sum(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Return base + x * factor, which stands for `normed_sum` where no norm is behind a unit."""
    return base + x * factor


def piece_size(x: Tensor) -> int | None:
    """Return how many tokens of x [B, f, s, d] to compute at a time; None: all of them."""
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return None
    size = max(1, torch.get_num_threads() * PIECE_VALUES // x.shape[-1])
    return size if x[..., 0].numel() > size else None
