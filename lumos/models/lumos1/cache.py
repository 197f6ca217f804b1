"""The key-value cache of generation, and the cache of a prefix that several calls share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lumos.models.lumos1.attention import Attend, equal_runs, prefix_attention, segmented_attention
from lumos.models.lumos1.history_thinning import leaving
from lumos.models.lumos1.modeling import LumosForVideoGeneration
from lumos.models.lumos1.sequence import SequenceLayout

VALUES = 64


class Cache:
    """Keys and values of R rows, allocated once: [layers, R, Hkv, capacity, D].

    Each row is filled up to its own length, because prefixes differ in length. All rows hold the same
    frames. A row consists of text and header, then frame 0, then the other frames in order.

    Attributes:
        lengths: tokens in each row.
        frames: the numbers of the frames in every row, counted from 0 at the start of the clip.
        firsts: the position in each row where frame 0 begins.
        history: the most frames that stay in the cache besides frame 0, or None if all frames stay.
        thinning: which frame is evicted when there are more than `history`: the oldest after frame 0,
            or with thinning the one that `leaving` returns.

    An eviction moves the tokens behind the evicted frame to the left. Their keys stay as they are: the
    rotary position of a key is that of its place in the clip, not of its place in the cache.
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

    def store(self, rows: Sequence[int], layouts: Sequence[SequenceLayout]) -> Attend:
        """Return an attention over whole prefixes [len(rows), L] that also writes keys and values into these rows.

        layouts: the layout of each prefix.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for i, row in enumerate(rows):
                self.keys[layer, row, :, : k.shape[2]] = k[i]
                self.values[layer, row, :, : v.shape[2]] = v[i]
            return segmented_attention(q, k, v, layouts)

        for row, layout in zip(rows, layouts, strict=True):
            self.lengths[row] = layout.length
        return attend

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Return copies of the keys and values of a row, [layers, Hkv, L, D] each."""
        used = (slice(None), row, slice(None), slice(self.lengths[row]))
        return self.keys[used].clone(), self.values[used].clone()

    def write(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Set a row to keys and values that `read` returned, [layers, Hkv, L, D] each."""
        self.lengths[row] = keys.shape[2]
        self.keys[:, row, :, : keys.shape[2]] = keys
        self.values[:, row, :, : keys.shape[2]] = values

    def extend(self, n: int, rows: range, stay: int) -> Attend:
        """Return the attention of one new frame of n tokens, or of two consecutive new frames, for these rows.

        Each new frame attends to the cache and to itself; the second also attends to the first. The
        attention writes the first `stay` of the new frames into the cache for good, but does not
        change `lengths` and `frames`: call `advance` after the forward pass for each of them. The
        other new frames are overwritten by the next call.

        The attention may get fewer queries than keys, as in the last layer, where only some positions
        are needed. The queries then all belong to the last new frame.
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
                    if i < stay and place is not None:  # evict: the frames behind move over the evicted one
                        left = self.firsts[rows[start]] + place * n
                        for cached in (keys, values):
                            cached[:, :, left:length] = cached[:, :, left + n : end].clone()
                    else:
                        length = end
                parts.append(torch.cat(seen, dim=2) if len(seen) > 1 else seen[0])
            return torch.cat(parts) if len(parts) > 1 else parts[0]

        return attend

    def refresh(self, n: int, rows: range, at: Tensor) -> Attend:
        """Return the attention of some tokens of the frame of n tokens after the cache, for these rows.

        The tokens attend to the cache and to their whole frame. The attention writes their keys and values; those of
        the frame's other tokens are what earlier calls of this frame wrote (`extend` first, which writes all of them).

        at: int64 [len(rows), p], the offsets of the tokens in the frame.
        """
        here = slice(rows.start, rows.stop)
        lengths = self.lengths[here]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            parts = []
            for start, stop in equal_runs(lengths):
                begin, some = lengths[start], slice(start, stop)
                places = (begin + at[some])[:, None, :, None].expand_as(k[some])
                keys, values = (x[layer, here][some][:, :, : begin + n] for x in (self.keys, self.values))
                keys.scatter_(2, places, k[some])
                values.scatter_(2, places, v[some])
                parts.append(prefix_attention(q[some], keys, values, causal=False))
            return torch.cat(parts) if len(parts) > 1 else parts[0]

        return attend

    def advance(self, n: int) -> None:
        """Record that a frame of n tokens was added to every row, and which frame was evicted for it."""
        place, new = self._leaving(), self.frames[-1] + 1 if self.frames else 0
        if place is None:
            self.lengths = [length + n for length in self.lengths]
        else:
            del self.frames[place]
        self.frames.append(new)

    def _leaving(self) -> int | None:
        """Return the index in `frames` of the frame that the next frame evicts, or None if there is still room."""
        if self.history is None or len(self.frames) <= self.history:
            return None
        return self.frames.index(leaving(self.frames[1:], self.frames[-1] + 1)) if self.thinning else 1


class PrefixCache:
    """Keys and values of one prefix, saved for later calls with the same ids and the same weights.

    Most calls share the unconditional prefix, so it need not be computed again. A change of the weights
    is detected by each parameter's address and dtype, by torch's counter of in-place writes, and, as that does not
    count writes to `parameter.data`, by some of the values.
    """

    def __init__(self) -> None:
        self._saved: tuple[tuple | None, tuple[Tensor, Tensor] | None] = None, None  # one value: several threads may use a pipeline

    def load(self, model: LumosForVideoGeneration, prefix: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the keys and values [layers, Hkv, L, D] of a prefix [L], or None if they are not saved."""
        key, stored = self._saved
        return stored if key == self._key_of(model, prefix) else None

    def save(self, model: LumosForVideoGeneration, prefix: Tensor, stored: tuple[Tensor, Tensor]) -> None:
        """Save the keys and values of a prefix [L] in place of those of the last one."""
        self._saved = self._key_of(model, prefix), stored

    @staticmethod
    def _key_of(model: LumosForVideoGeneration, prefix: Tensor) -> tuple:
        def version(p: Tensor) -> object:
            # Writes to an inference tensor are not counted. A new object equals nothing, so nothing is loaded.
            return object() if p.is_inference() else p._version

        skipped = tuple(layer.skipped for layer in model.model.layers)
        weights = tuple((p.data_ptr(), version(p), p.dtype) for p in model.parameters())
        return tuple(prefix.tolist()), skipped, weights, some_values(model)


@torch.no_grad()
def some_values(model: nn.Module) -> tuple[float, ...]:
    """Return a sum of VALUES values of each parameter that holds plain numbers in memory."""
    sums: dict[torch.device, list[Tensor]] = {}
    for p in model.parameters():
        if type(p.data) is Tensor and p.numel() and not p.is_meta:
            sums.setdefault(p.device, []).append(p.detach().flatten()[:: -(-p.numel() // VALUES)].float().sum())
    return tuple(value for on_device in sums.values() for value in torch.stack(on_device).tolist())
