"""Measurement of a video tokenizer: quality of its reconstructions, use of its codes, bits per pixel and speed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumos.evaluation.quality import MAX_PSNR, code_use, ssim
from lumos.training.tokenizer.lpips import Lpips
from lumos.video.frames import from_uint8, psnr, to_uint8
from tokenizer import VideoTokenizer


@dataclass
class Reconstruction:
    """Reconstructed clips and their measurements."""

    frames: list[np.ndarray]  # of each clip, uint8 [T, H, W, 3]
    psnr: list[float]  # of each clip, in dB
    counts: np.ndarray  # occurrences of each code, [num_codes]
    figures: dict[str, Any]  # all measures by name, over all clips


@torch.inference_mode()
def reconstruct(
    tokenizer: VideoTokenizer,
    clips: Sequence[np.ndarray],
    batch_size: int,
    lpips: Lpips | None = None,
    on_clips: Callable[[int], None] = lambda done: None,
) -> Reconstruction:
    """Encode and decode clips, uint8 [T, H, W, 3], in batches of equal lengths, and compare the results with the clips.

    PSNR, SSIM and LPIPS are means over clips. The PSNR of a clip is that of all its values; its
    SSIM and LPIPS are means over its frames. Bits per pixel assume that every code has the same
    number of bits. One batch runs before the speed is measured. lpips: None leaves LPIPS out.
    on_clips: called after each batch with its number of clips.
    """
    parameter = next(tokenizer.parameters())
    device, batches = parameter.device, list(_batches(clips, batch_size))
    back: list[np.ndarray] = [np.empty(0)] * len(clips)
    counts, seconds = np.zeros(tokenizer.num_codes, dtype=np.int64), {"encode": 0.0, "decode": 0.0}

    def timed(name: str, work: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        _wait(device)
        started = time.perf_counter()
        result = work(given)
        _wait(device)
        seconds[name] += time.perf_counter() - started
        return result

    for number, batch in enumerate(batches):
        video = from_uint8(np.stack([clips[i] for i in batch])).to(device, parameter.dtype)  # B, 3, T, H, W
        if number == 0:
            tokenizer.decode(tokenizer.encode(video))
        codes = timed("encode", tokenizer.encode, video)
        frames = to_uint8(timed("decode", tokenizer.decode, codes))
        counts += np.bincount(codes.flatten().cpu().numpy(), minlength=len(counts))
        for place, i in enumerate(batch):
            back[i] = frames[place]
        on_clips(len(batch))
    pairs = list(zip(clips, back, strict=True))
    quality = [min(psnr(a, b), MAX_PSNR) for a, b in pairs]
    pixels = sum(clip[..., 0].size for clip in clips)
    figures = {
        "clips": len(clips), "frames": sum(map(len, clips)),
        "psnr": round(float(np.mean(quality)), 3), "ssim": round(float(np.mean([ssim(a, b) for a, b in pairs])), 5),
        "lpips": lpips and round(float(np.mean([lpips(a, b) for a, b in pairs])), 5),
        **code_figures(counts),
        "bits_per_pixel": round(int(counts.sum()) * math.log2(len(counts)) / pixels, 5),
        **{f"{name}_clips_per_second": round(len(clips) / spent, 2) for name, spent in seconds.items()},
        **{f"{name}_pixels_per_second": round(pixels / spent) for name, spent in seconds.items()},
    }  # fmt: skip
    return Reconstruction(back, quality, counts, figures)


def code_figures(counts: np.ndarray) -> dict[str, Any]:
    """Return the number of codes, the share of the codebook that occurs among them, and their perplexity."""
    used, perplexity = code_use(counts)
    return {"codes": int(counts.sum()), "codes_used": round(used, 5), "code_perplexity": round(perplexity, 2)}


def _batches(clips: Sequence[np.ndarray], batch_size: int) -> Iterator[list[int]]:
    """Yield batches of indices of clips of equal length, in order, at most batch_size in a batch."""
    for length in sorted({len(clip) for clip in clips}, reverse=True):
        alike = [i for i, clip in enumerate(clips) if len(clip) == length]
        yield from (alike[start : start + batch_size] for start in range(0, len(alike), batch_size))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
