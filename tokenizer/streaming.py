"""Encode and decode a clip chunk by chunk, with the same result as for the whole clip and little memory.

Where codes [B, t, h, w] stand here, a continuous tokenizer has latents [B, C, t, h, w].

Every layer that needs earlier frames caches them: a causal convolution one or two frames, temporal
attention the keys and values of earlier frames. The published attention sees all earlier frames, so
its cache grows with the clip, by 2 * channels * 4 bytes (float32) for each position of a latent
frame. If the tokenizer has an `attention_window`, set in its config.json or when it was trained, the
cache stops growing after that many frames.

Latent frames are computed one at a time, so the result does not depend on the sizes of the chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from tokenizer.configuration import VideoTokenizerConfig
from tokenizer.layers import Past


class Streamable(Protocol):
    """The members of `VideoTokenizer` that a stream uses; they are documented there."""

    config: VideoTokenizerConfig
    spatial_compression: int
    temporal_compression: int
    value_channels: int

    def check_size(self, video: Tensor) -> None: ...

    def check_num_frames(self, num_frames: int) -> None: ...

    def check_codes(self, codes: Tensor) -> None: ...

    def encode_latent(self, video: Tensor, past: Past | None = None) -> Tensor: ...

    def decode_latent(self, values: Tensor, past: Past | None = None) -> Tensor: ...

    def quantize(self, latent: Tensor) -> tuple[Tensor, Tensor]: ...

    def values(self, codes: Tensor) -> Tensor: ...


class _Stream:
    """The state of a stream between two chunks: the caches of the layers and the common shape of the chunks."""

    def __init__(self, tokenizer: Streamable) -> None:
        self.tokenizer = tokenizer
        self.past: Past = {}
        self.shape: tuple[int, ...] | None = None

    @property
    def cache_bytes(self) -> int:
        """The size of the caches in bytes."""
        return sum(tensor.nbytes for tensor in self.past.values())

    def _check_shape(self, what: str, shape: tuple[int, ...]) -> None:
        self.shape = self.shape or shape
        if shape != self.shape:
            raise ValueError(
                f"all {what} of a clip must have the same batch, height and width; they were {self.shape} and now are {shape}"
            )


class StreamEncoder(_Stream):
    """Encode a clip whose frames arrive in chunks."""

    def __init__(self, tokenizer: Streamable) -> None:
        super().__init__(tokenizer)
        self.waiting: Tensor | None = None  # frames that do not yet fill a latent frame
        self.num_frames = 0

    @property
    def cache_bytes(self) -> int:
        return super().cache_bytes + (0 if self.waiting is None else self.waiting.nbytes)

    @torch.no_grad()
    def push(self, video: Tensor) -> Tensor:
        """Take the next frames [B, 3, T, H, W] in [-1, 1]; return codes [B, t, h, w] of the latent frames now complete.

        t may be 0. Raises ValueError for a height or width that is not a multiple of the compression,
        or if batch, height or width differ from those of earlier chunks.
        """
        model = self.tokenizer
        model.check_size(video)
        self._check_shape("frames", (len(video), *video.shape[3:]))
        self.num_frames += video.shape[2]
        if self.waiting is not None:
            video = torch.cat([self.waiting, video], dim=2)
        grid = (side // model.spatial_compression for side in video.shape[3:])
        codes = [model.quantize(video.new_empty(len(video), model.value_channels, 0, *grid))[1]]
        while video.shape[2] >= (wanted := model.temporal_compression if self.past else 1):
            codes.append(model.quantize(model.encode_latent(video[:, :, :wanted], self.past))[1])
            video = video[:, :, wanted:]
        self.waiting = video.clone()  # a view would keep the chunk
        return torch.cat(codes, dim=-3)

    def finish(self) -> None:
        """Declare the clip complete. Raises ValueError if its last frames do not fill a latent frame."""
        self.tokenizer.check_num_frames(self.num_frames)


class StreamDecoder(_Stream):
    """Decode a clip whose codes arrive in chunks."""

    def push(self, codes: Tensor) -> Tensor:
        """Take the next codes [B, t, h, w]; return the next frames [B, 3, T, H, W], about [-1, 1] and not clamped.

        The first latent frame of a clip decodes to one frame, every later one to `temporal_compression`
        frames. Raises ValueError for codes out of range, or if batch, rows or columns differ from those
        of earlier chunks.
        """
        model = self.tokenizer
        model.check_codes(codes)
        self._check_shape("codes", (len(codes), *codes.shape[-2:]))
        values = model.values(codes)  # B, C, t, h, w
        height, width = (side * model.spatial_compression for side in codes.shape[-2:])
        frames = [values.new_empty(len(codes), model.config.out_channels, 0, height, width)]
        frames += [model.decode_latent(values[:, :, i : i + 1], self.past) for i in range(values.shape[2])]
        return torch.cat(frames, dim=2)


def encode(tokenizer: Streamable, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the codes of a clip's frames. See `VideoTokenizer.encode_stream`."""
    stream = StreamEncoder(tokenizer)
    for chunk in chunks:
        for frames in chunk.split(tokenizer.temporal_compression, dim=2):
            codes = stream.push(frames)
            if codes.shape[-3]:
                yield codes
    stream.finish()


def decode(tokenizer: Streamable, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the frames of a clip's codes. See `VideoTokenizer.decode_stream`."""
    stream = StreamDecoder(tokenizer)
    for chunk in chunks:
        tokenizer.check_codes(chunk)
        for latent_frame in chunk.split(1, dim=-3):
            yield stream.push(latent_frame)
