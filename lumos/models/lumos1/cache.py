"""Keys and values of what is behind the frame that is being made, and of prefixes that come again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lumos.models.lumos1.attention import Attend, equal_runs, prefix_attention, segmented_attention
from lumos.models.lumos1.history_thinning import leaving
from lumos.models.lumos1.modeling import LumosForVideoGeneration
from lumos.models.lumos1.sequence import Layout


class Cache:
    """Keys and values of R rows, each filled up to its own length: [layers, R, Hkv, capacity, D].

    frames: numbers of the frames that are in every row, from 0; the first begins at `firsts`.
    history: frames that stay behind the first one; when one more comes, the oldest of them leaves, or with `thinning` the one that
    `leaving` names, and those after it move up, with the rotary positions that they have. None: all stay.
    """

    def __init__(
        self, model: LumosForVideoGeneration, rows: int, capacity: int, history: int | None = None, thinning: bool = False
    ):
        c = model.config
        shape = (c.num_hidden_layers, rows, c.num_key_value_heads, capacity, c.head_dim)
        self.keys = torch.empty(shape, dtype=model.dtype, device=model.device)
        self.values = torch.empty_like(self.keys)
        self.lengths, self.firsts, self.frames = [0] * rows, [0] * rows, []
        self.history, self.thinning = history, thinning

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

    def extend(self, n: int, rows: range, stay: int) -> Attend:
        """Attention of one frame of n tokens, or of two in a row, to the cache and itself, in these rows, which follow each other.

        The first `stay` of the frames stay in the cache, which `advance` has to be told. Where there are fewer queries than keys,
        all are of the last frame.
        """
        here, place = slice(rows.start, rows.stop), self._leaving()
        lengths = self.lengths[here]
        runs = list(equal_runs(lengths))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            frames = k.shape[2] // n
            sizes = [n] * frames if q.shape[2] == k.shape[2] else [0] * (frames - 1) + [q.shape[2]]
            parts = []
            for start, stop in runs:
                length, some, seen = lengths[start], slice(start, stop), []
                keys, values = self.keys[layer, here][some], self.values[layer, here][some]
                split = zip(q[some].split(sizes, dim=2), k[some].split(n, dim=2), v[some].split(n, dim=2), strict=True)
                for i, (queries, new_keys, new_values) in enumerate(split):
                    end = length + n
                    keys[:, :, length:end] = new_keys
                    values[:, :, length:end] = new_values
                    if queries.shape[2]:
                        queries = prefix_attention(queries, keys[:, :, :end], values[:, :, :end], causal=False)
                    seen.append(queries)
                    if i < stay and place is not None:
                        left = self.firsts[rows[start]] + place * n
                        for cached in (keys, values):
                            cached[:, :, left:length] = cached[:, :, left + n : end].clone()
                    else:
                        length = end
                parts.append(torch.cat(seen, dim=2) if len(seen) > 1 else seen[0])
            return torch.cat(parts) if len(parts) > 1 else parts[0]

        return attend

    def advance(self, n: int) -> None:
        """A frame of n tokens has come to stay in every row."""
        place, new = self._leaving(), self.frames[-1] + 1 if self.frames else 0
        if place is None:
            self.lengths = [length + n for length in self.lengths]
        else:
            del self.frames[place]
        self.frames.append(new)

    def _leaving(self) -> int | None:
        """Which of `frames`, by its place there, leaves when another comes."""
        if self.history is None or len(self.frames) <= self.history:
            return None
        return self.frames.index(leaving(self.frames[1:], self.frames[-1] + 1)) if self.thinning else 1


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
