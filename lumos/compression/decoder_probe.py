"""Scores of the units of a video tokenizer's decoder: what the probe of a training task is for a generator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lumos.training.task import Forward, Output
from lumos.video.frames import from_uint8
from tokenizer import VideoTokenizer


class DecoderProbe:
    """Decodes the codes of clips. The loss of a frame is the mean squared error of its pixels in [-1, 1], the output its pixels."""

    score_groups: ClassVar[Mapping[str, tuple[str, ...]]] = {"frames": ("first frame", "later frames"), "level": ("all",)}

    def __init__(self, tokenizer: VideoTokenizer):
        self.tokenizer = tokenizer

    def batches(self, clips: Iterable[np.ndarray], size: int) -> Iterator[dict[str, Any]]:
        """Yield micro-batches of up to `size` clips, uint8 [T, H, W, 3] each, with their latents."""
        parameter, clips = next(self.tokenizer.parameters()), list(clips)
        for start in range(0, len(clips), size):
            frames = torch.from_numpy(np.stack(clips[start : start + size]))
            video = from_uint8(frames).to(parameter.device, parameter.dtype)
            encode = self.tokenizer.encode_frames if self.tokenizer.config.is_image else self.tokenizer.encode
            yield {"video": video, "values": self.tokenizer.values(encode(video))}

    def forward(self, model: VideoTokenizer, micro: dict[str, Any]) -> Forward:
        video = micro["video"].float()
        made = model.decode_latent(micro["values"]).float()  # [B, 3, T, H, W]
        losses = (made - video).square().mean(dim=(1, 3, 4))  # [B, T]
        number = torch.arange(losses.shape[1], device=losses.device)
        frames = number.clamp(max=1).expand_as(losses).flatten()
        pixels = made.detach().transpose(1, 2).flatten(2)  # [B, T, 3 H W]
        outputs = [Output(clip, number, torch.zeros_like(number)) for clip in pixels]
        return Forward(losses.flatten(), {"frames": frames, "level": torch.zeros_like(frames)}, lambda: iter(outputs))

    def stream_frames(self, micro: dict[str, Any], stream: Tensor) -> Tensor:
        """Return the frame of each place of a stream [B, T, h, w, C] of the decoder."""
        return torch.arange(stream.shape[1], device=stream.device)[:, None, None].expand(stream.shape[:-1])
