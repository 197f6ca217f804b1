"""The sampling options of STIV."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lumos.errors import UserError
from lumos.pipeline.options import SamplingOptions
from lumos.settings import setting

SOLVERS = ("euler", "midpoint", "heun", "ab2")
"""The names of the solvers, see `lumos.models.stiv.solvers`."""
RENORMS = ("off", "sample", "frame", "token")
NULL_IMAGES = ("renoise", "own", "noise", "zeros")
"""The names of `guidance_renorm` and `null_image`, see `lumos.models.stiv.guidance.Guidance`."""
MAX_STRIDE = 10_000
WHOLE_INTERVAL = (0.0, 1.0)


@dataclass(frozen=True)
class StivOptions(SamplingOptions):
    """Sampling options of STIV. A model folder's pipeline.json may set other defaults."""

    num_inference_steps: int = setting(
        50, "steps of the solver; midpoint and heun run the network twice in each", low=1, high=1000, step=1, cost=True,
        label="Steps: more take longer and look better, up to a point",
    )
    guidance_scale: float = setting(
        7.5, "guidance by the text, and by the image with it: null + scale * (full - null); 1 turns guidance off",
        low=1, high=100, step=0.1, slider_high=20, allowed="1 (no guidance) to 100", cost=True,
        label="How closely to follow the prompt; 1 is least",
    )  # fmt: skip
    image_guidance_scale: float | None = setting(
        None, "guidance by the image on its own, with a third branch; default: the image is guided with the text",
        low=0, high=100, step=0.1, slider_high=20, given=True, label="How closely to follow the given picture",
    )  # fmt: skip
    guidance_renorm: str = setting(
        "sample", "scale the guided prediction to the norm of the one with text and image, for each sample, frame or token",
        choices=RENORMS,
        label="Keep strong guidance from too much contrast, measured for each",
    )
    solver: str = setting("euler", "solver of the sampling equation; ab2 has order 2 with one run of the network a step",
                          choices=SOLVERS, label="Way of computing the steps", cost=True)  # fmt: skip
    shift: float = setting(1.0, "above 1, more of the steps are near the noise; 1 is a uniform grid", low=0.01, high=100, cost=True)
    guidance_interval: tuple[float, float] = setting(
        WHOLE_INTERVAL, "use guidance only at times from START to STOP; 0 is noise, 1 is the clip (arXiv 2404.07724)",
        low=0, high=1, allowed="two numbers, 0 <= start < stop <= 1", trade=True,
    )  # fmt: skip
    null_image: str = setting(
        "renoise", "what stands in the given frames of the branch without image", choices=NULL_IMAGES, given=True,
        label="What the given picture is compared with, when it guides",
    )
    given_noise: float = setting(
        0.0, "noise in the given frames that the network sees, against clips that stand still", low=0, below=1, given=True
    )
    keep_given_pixels: bool = setting(
        False, "put the pixels of given frames into the clip, in place of what the latents make of them", given=True,
        label="Show the given pictures unchanged in the clip",
    )
    block_reuse: int = setting(
        1, "run the middle blocks of the network only at every n-th call, and reuse what they added; 1 reuses nothing",
        low=1, high=1000, trade=True,
    )  # fmt: skip
    keyframe_stride: int | None = setting(
        None, "frames from one keyframe to the next, in clips longer than the model makes at once; default: as many as it can fill",
        low=2, high=MAX_STRIDE, pictures=False, cost=True,
    )  # fmt: skip

    def check_combinations(self) -> None:
        """Raise UserError for options that have no effect together, or cannot work together."""
        narrowed = self.guidance_interval != WHOLE_INTERVAL
        if narrowed and not self.is_guided:
            raise UserError(
                f"guidance_interval {self.guidance_interval} has no effect with guidance_scale 1; raise guidance_scale or give 0 1"
            )
        if narrowed and self.null_image == "own":
            raise UserError("null_image own needs guidance at every step; leave guidance_interval out, or give null_image renoise")

    @property
    def is_guided(self) -> bool:
        """Whether the network runs on more than one branch."""
        return self.guidance_scale != 1 or self.image_guidance_scale not in (None, 1)

    def changed(self, **given: Any) -> StivOptions:
        """Return a copy with the options that are not None replaced.

        A guidance_interval has no effect without guidance, so it is reset if guidance_scale becomes 1 without a new
        guidance_interval.
        """
        given = {name: value for name, value in given.items() if value is not None}
        by_image = given.get("image_guidance_scale", self.image_guidance_scale)
        if given.get("guidance_scale") == 1 and by_image in (None, 1):
            given.setdefault("guidance_interval", WHOLE_INTERVAL)
        return replace(self, **given)

    def for_text_alone(self) -> StivOptions:
        """Return the options of a clip without given frames: a default image_guidance_scale has no effect on it."""
        interval = WHOLE_INTERVAL if self.guidance_scale == 1 else self.guidance_interval
        return replace(self, image_guidance_scale=None, guidance_interval=interval)
