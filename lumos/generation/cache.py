"""Keys and values of what is behind the frame that is being made, and of prefixes that come again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lumos.attention import Attend, equal_runs, prefix_attention, segmented_attention
from lumos.modeling import LumosForVideoGeneration
from lumos.sequence import Layout


class Cache:
    """Keys and values of R rows, each filled up to its own length: [layers, R, Hkv, capacity, D]."""

    def __init__(self, model: LumosForVideoGeneration, rows: int, capacity: int):
        c = model.config
        shape = (c.num_hidden_layers, rows, c.num_key_value_heads, capacity, c.head_dim)
        self.keys = torch.empty(shape, dtype=model.dtype, device=model.device)
        self.values = torch.empty_like(self.keys)
        self.lengths = [0] * rows

    def store(self, rows: Sequence[int], layouts: Sequence[Layout]) -> Attend:
        """Attention over whole prefixes [len(rows), L], one layout each, that also fills these rows of the cache."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for i, row in enumerate(rows):
                self.keys[layer, row, :, : k.shape[2]] = k[i]
                self.values[layer, row, :, : v.shape[2]] = v[i]
            return segmented_attention(q, k, v, layouts)

        for row, layout in zip(rows, layouts, strict=True):
            self.lengths[row] = layout.length
        return attend

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Copies of a row's keys and values: [layers, Hkv, L, D]."""
        used = (slice(None), row, slice(None), slice(self.lengths[row]))
        return self.keys[used].clone(), self.values[used].clone()

    def write(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Begin a row with what `read` gave."""
        self.lengths[row] = keys.shape[2]
        self.keys[:, row, :, : keys.shape[2]] = keys
        self.values[:, row, :, : keys.shape[2]] = values

    def extend(self, n: int) -> Attend:
        """Attention of frames of n tokens each to the cache, to the frames before them, and to themselves.

        Where there are fewer queries than keys, all are of the last frame. Their keys and values are written behind each row's
        length, which stays: `lengths` says what is to be kept.
        """
        runs = list(equal_runs(self.lengths))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            total, parts = k.shape[2], []
            size = n if q.shape[2] == total else q.shape[2]
            for start, stop in runs:
                length, rows = self.lengths[start], slice(start, stop)
                keys, values = (c[layer, rows, :, : length + total] for c in (self.keys, self.values))
                keys[:, :, length:] = k[rows]
                values[:, :, length:] = v[rows]
                frames = []
                for i, queries in enumerate(reversed(q[rows].split(size, dim=2))):
                    end = length + total - i * n
                    frames.insert(0, prefix_attention(queries, keys[:, :, :end], values[:, :, :end], causal=False))
                parts.append(torch.cat(frames, dim=2) if len(frames) > 1 else frames[0])
            return torch.cat(parts) if len(parts) > 1 else parts[0]

        return attend


class KeptPrefix:
    """Keys and values of one prefix from an earlier call, as long as neither the ids nor the weights have changed.

    A change of the weights is seen by the version that torch counts for in-place writes, and by a parameter put in its place.
    """

    def __init__(self) -> None:
        self._key: tuple | None = None
        self._stored: tuple[Tensor, Tensor] | None = None

    def load(self, model: LumosForVideoGeneration, prefix: Tensor) -> tuple[Tensor, Tensor] | None:
        return self._stored if self._key == self._key_of(model, prefix) else None

    def save(self, model: LumosForVideoGeneration, prefix: Tensor, stored: tuple[Tensor, Tensor]) -> None:
        self._key, self._stored = self._key_of(model, prefix), stored

    @staticmethod
    def _key_of(model: LumosForVideoGeneration, prefix: Tensor) -> tuple:
        def version(p: Tensor) -> object:
            return object() if p.is_inference() else p._version  # writes to it are not counted: it equals nothing kept

        return tuple(prefix.tolist()), tuple((p.data_ptr(), version(p), p.dtype) for p in model.parameters())
