"""The sampling options of Lumos-1."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lumos.errors import UserError
from lumos.pipeline.defaults import MAX_FRAMES
from lumos.pipeline.options import SamplingOptions
from lumos.settings import setting

MAX_TOP_K = 2**24
MASK_KINDS = ("tube", "random", "diffusion_forcing", "tube_decay")
"""The kinds of training mask, see `lumos.models.lumos1.masking.training_mask`."""


@dataclass(frozen=True)
class GenerationSettings(SamplingOptions):
    """Sampling options of Lumos-1. The defaults are the published ones; a model folder's pipeline.json may set others."""

    num_inference_steps: int = setting(
        50, "parallel decoding steps of each latent frame", low=1, high=1000, step=1, cost=True,
        label="Steps: more take longer and look better, up to a point",
    )  # fmt: skip
    guidance_scale: float = setting(
        15.0, "classifier-free guidance: uncond + scale * (cond - uncond); 1 turns guidance off and runs one branch only",
        low=1, high=100, step=0.1, slider_high=20, allowed="1 (no guidance) to 100", cost=True,
        label="How closely to follow the prompt; 1 is least",
    )  # fmt: skip
    image_guidance_scale: float | None = setting(
        None,
        "guidance by the given frames on their own, with a third branch in which they are masked; if it equals guidance_scale, "
        "two branches are enough; default: given frames are in both branches",
        low=0, high=100, step=0.1, slider_high=20, given=True, label="How closely to follow the given picture",
    )  # fmt: skip
    temperature: float = setting(
        1.0, "scale of the Gumbel noise on the confidence, annealed to 0 within each frame", low=0, high=100, step=0.05,
        slider_high=5, label="Chance in the choice of what is drawn first",
    )
    top_k: int | None = setting(
        None, "sample only among this number of the most likely codes", low=1, high=MAX_TOP_K, allowed=f"1 to {MAX_TOP_K:,}"
    )
    top_p: float | None = setting(None, "sample only among the most likely codes with this total probability", above=0, high=1)
    history_mask_ratio: float = setting(
        0.7, "history mask: the share of each finished frame that is hidden from later frames",
        low=0, below=1, step=0.05, pictures=False,
        allowed="0 (nothing is hidden) to below 1", label="Share of each earlier frame that later frames do not see",
    )  # fmt: skip
    mask_given_frames: bool = setting(
        False, "apply the history mask to given frames too; by default nothing of them is hidden", given=True,
        label="Do not see that share of the given picture or clip either",
    )
    guidance_interval: tuple[float, float] = setting(
        (0.0, 1.0), "use guidance only at steps k of n with START <= k / n < STOP; 0 0.5 is the first half (arXiv 2404.07724)",
        low=0, high=1, allowed="two numbers, 0 <= start < stop <= 1", trade=True,
    )  # fmt: skip
    confidence_threshold: float | None = setting(
        None, "a step also decides every code with at least this probability; a frame ends when all are decided (arXiv 2505.22618)",
        above=0, high=1, trade=True,
    )  # fmt: skip
    later_steps: int | None = setting(
        None, "num_inference_steps of each latent frame after the first", low=1, high=1000, pictures=False, trade=True
    )
    step_reuse: int = setting(
        1, "only every n-th step of a latent frame runs all of its codes; the others run the codes that the step before ran "
        "masked, and reuse keys and values of the rest",
        low=1, high=1000, trade=True,
    )  # fmt: skip
    history_frames: int | None = setting(
        None, "a frame sees the first latent frame and this number of frames before it, so that memory stays bounded",
        low=1, high=MAX_FRAMES, allowed=f"at least 1, at most {MAX_FRAMES:,}", pictures=False, trade=True,
    )  # fmt: skip
    history_thinning: bool = setting(
        False, "spread the history_frames over the whole clip: the older they are, the farther apart",
        pictures=False, trade=True, label="Long clips: see frames spread over the whole clip, not only the last ones",
    )  # fmt: skip

    def check_combinations(self) -> None:
        """Raise UserError for options that have no effect together, or cannot work together."""
        for steps in {self.steps_of(0), self.steps_of(1)}:
            if not any(self.guides(step, steps) for step in range(steps)):
                raise UserError(
                    f"guidance_interval {self.guidance_interval} holds none of {steps} steps (step k is at k / {steps}); "
                    "widen it, or turn guidance off with guidance_scale 1"
                )
        if not self.is_guided and self.guidance_interval != (0.0, 1.0):
            raise UserError(
                f"guidance_interval {self.guidance_interval} has no effect with guidance_scale 1; raise guidance_scale or give 0 1"
            )
        if self.history_thinning and self.history_frames is None:
            raise UserError("history_thinning has no effect without history_frames; give it too, or leave history_thinning out")
        if self.top_k == 1 and self.confidence_threshold is not None:
            raise UserError(
                f"confidence_threshold {self.confidence_threshold} cannot work with top_k 1: every code then has probability 1, "
                "and each frame would end after one step; leave one of them out"
            )

    @property
    def is_guided(self) -> bool:
        """Whether the decoder runs on more than one branch."""
        return self.guidance_scale != 1 or self.image_guidance_scale not in (None, 1)

    @property
    def has_three_branches(self) -> bool:
        """Whether given frames are guided apart from the text, in a branch of their own."""
        return self.image_guidance_scale not in (None, 1, self.guidance_scale)

    def changed(self, **given: Any) -> GenerationSettings:
        """Return a copy with the options that are not None replaced.

        A model's default later_steps was chosen for its num_inference_steps, so it is reset to None if
        num_inference_steps changes without a new later_steps. A guidance_interval has no effect without
        guidance, so it is reset if guidance_scale becomes 1 without a new guidance_interval.
        """
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("num_inference_steps", self.num_inference_steps) != self.num_inference_steps:
            given.setdefault("later_steps", None)
        by_image = given.get("image_guidance_scale", self.image_guidance_scale)
        if given.get("guidance_scale") == 1 and by_image in (None, 1):
            given.setdefault("guidance_interval", GenerationSettings.guidance_interval)
        return replace(self, **given)

    def for_text_alone(self) -> GenerationSettings:
        """Return the options of a clip without given frames: a default image_guidance_scale has no effect on it."""
        interval = GenerationSettings.guidance_interval if self.guidance_scale == 1 else self.guidance_interval
        return replace(self, image_guidance_scale=None, guidance_interval=interval)

    def steps_of(self, frame: int) -> int:
        """Return the steps of a new latent frame, counted from 0. With a confidence threshold it may end earlier."""
        return self.num_inference_steps if frame == 0 or self.later_steps is None else self.later_steps

    def guides(self, step: int, steps: int) -> bool:
        """Return whether step number `step` of the `steps` of a frame uses guidance, and so both branches."""
        start, stop = self.guidance_interval
        return start <= step / steps < stop

    def runs_all(self, step: int, steps: int) -> bool:
        """Return whether step number `step` of the `steps` of a frame runs all tokens of the frame.

        These are the steps that step_reuse divides, and the step that begins guidance: its other branches have not
        run in this frame yet. Every other step runs the codes that were masked in the step before it.
        """
        begins_guidance = step > 0 and self.guides(step, steps) and not self.guides(step - 1, steps)
        return step % self.step_reuse == 0 or begins_guidance
