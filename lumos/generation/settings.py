"""How a clip is sampled."""

from __future__ import annotations

from dataclasses import dataclass

from lumos.errors import UserError


@dataclass(frozen=True)
class GenerationSettings:
    """Sampling settings; the defaults are the published ones, a model folder's pipeline.json may bring its own.

    num_inference_steps   parallel decoding steps of each latent frame
    guidance_scale        classifier-free guidance: uncond + scale * (cond - uncond); 1 runs one branch only
    temperature           T0 of the Gumbel noise on the confidence, annealed as T0 * (1 - step / steps) within each frame
    top_k, top_p          sample among the k likeliest codes, or the likeliest with total probability p; off by default
    history_mask_ratio    share of a finished frame's content hidden from later frames, 0 <= ratio < 1
    mask_given_frames     hide that share of given frames too; by default they are seen whole
    """

    num_inference_steps: int = 50
    guidance_scale: float = 15.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    history_mask_ratio: float = 0.7
    mask_given_frames: bool = False

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                raise UserError(f"{name} {getattr(self, name)!r} is not allowed; give {allowed}")

        check(1 <= self.num_inference_steps <= 1000, "num_inference_steps", "1 to 1000")
        check(1 <= self.guidance_scale <= 100, "guidance_scale", "1 (no guidance) to 100")
        check(0 <= self.temperature <= 100, "temperature", "0 to 100")
        check(self.top_k is None or self.top_k >= 1, "top_k", "at least 1")
        check(self.top_p is None or 0 < self.top_p <= 1, "top_p", "more than 0, at most 1")
        check(0 <= self.history_mask_ratio < 1, "history_mask_ratio", "0 (history seen whole) to below 1")
