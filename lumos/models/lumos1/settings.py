"""How a clip is sampled and shaped, and where a model folder keeps its own defaults."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lumos.errors import UserError, shown
from lumos.files import read_json, write_json
from lumos.pipeline.defaults import DEFAULTS_FILE, ClipDefaults, is_number, is_whole

_OPTIONAL = ("top_k", "top_p", "confidence_threshold", "later_steps", "history_frames")
MAX_DEFAULTS_BYTES = 2**20
MAX_TOP_K = 2**24
MAX_FRAMES = 1_000_000
MAX_SIDE = 2**14
CLIP_LIMITS = {"num_frames": MAX_FRAMES, "height": MAX_SIDE, "width": MAX_SIDE, "fps": 1000, "target_size": MAX_SIDE}
"""The most that a clip may be asked for, whatever the model; what a model can make is its config's matter."""


@dataclass(frozen=True)
class GenerationSettings:
    """Sampling settings; the defaults are the published ones, a model folder's pipeline.json may bring its own.

    num_inference_steps   parallel decoding steps of each latent frame
    guidance_scale        classifier-free guidance: uncond + scale * (cond - uncond); 1 runs one branch only
    temperature           T0 of the Gumbel noise on the confidence, annealed as T0 * (1 - step / steps) within each frame
    top_k, top_p          sample among the k likeliest codes, or the likeliest with total probability p; off by default
    history_mask_ratio    share of a finished frame's content hidden from later frames, 0 <= ratio < 1
    mask_given_frames     hide that share of given frames too; by default they are seen whole

    The others save time or memory and change what is made; off by default:
    guidance_interval     (start, stop): guidance only at steps k of n with start <= k / n < stop, k from 0 (arXiv 2404.07724);
                          the other steps run one branch
    confidence_threshold  a step decides as many codes as the schedule says, the most confident first, and every other code whose
                          probability, guided and filtered, is at least this; a frame ends when all are decided (arXiv 2505.22618)
    later_steps           num_inference_steps of every latent frame after the first that is made
    history_frames        a frame sees the text, the clip's first latent frame, and so many latent frames right before it, each at
                          the positions that it always had; the cache stays that small
    history_thinning      those many latent frames are the one right before it and older ones, the farther apart the older they are,
                          over the whole clip
    """

    num_inference_steps: int = 50
    guidance_scale: float = 15.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    history_mask_ratio: float = 0.7
    mask_given_frames: bool = False
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    confidence_threshold: float | None = None
    later_steps: int | None = None
    history_frames: int | None = None
    history_thinning: bool = False

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                raise UserError(f"{name} {shown(getattr(self, name))} is not allowed; give {allowed}")

        for name in ("num_inference_steps", "top_k", "later_steps", "history_frames"):
            value = getattr(self, name)
            check(is_whole(value) or (value is None and name in _OPTIONAL), name, "a whole number")
        for name in ("guidance_scale", "temperature", "top_p", "history_mask_ratio", "confidence_threshold"):
            value = getattr(self, name)
            check(is_number(value) or (value is None and name in _OPTIONAL), name, "a number")
        check(1 <= self.num_inference_steps <= 1000, "num_inference_steps", "1 to 1000")
        check(1 <= self.guidance_scale <= 100, "guidance_scale", "1 (no guidance) to 100")
        check(0 <= self.temperature <= 100, "temperature", "0 to 100")
        check(self.top_k is None or 1 <= self.top_k <= MAX_TOP_K, "top_k", f"1 to {MAX_TOP_K:,}")
        check(self.top_p is None or 0 < self.top_p <= 1, "top_p", "more than 0, at most 1")
        check(0 <= self.history_mask_ratio < 1, "history_mask_ratio", "0 (history seen whole) to below 1")
        threshold = self.confidence_threshold
        check(threshold is None or 0 < threshold <= 1, "confidence_threshold", "more than 0, at most 1")
        check(self.later_steps is None or 1 <= self.later_steps <= 1000, "later_steps", "1 to 1000")
        frames = self.history_frames
        check(frames is None or 1 <= frames <= MAX_FRAMES, "history_frames", f"at least 1, at most {MAX_FRAMES:,}")
        check(isinstance(self.mask_given_frames, bool), "mask_given_frames", "true or false")
        check(isinstance(self.history_thinning, bool), "history_thinning", "true or false")
        interval = self.guidance_interval
        pair = isinstance(interval, list | tuple) and len(interval) == 2 and all(map(is_number, interval))
        check(pair and 0 <= interval[0] < interval[1] <= 1, "guidance_interval", "two numbers, 0 <= start < stop <= 1")
        object.__setattr__(self, "guidance_interval", tuple(map(float, interval)))  # JSON and YAML give lists
        self._check_combinations()

    def _check_combinations(self) -> None:
        for steps in {self.steps_of(0), self.steps_of(1)}:
            if not any(self.guides(step, steps) for step in range(steps)):
                raise UserError(
                    f"guidance_interval {self.guidance_interval} holds none of {steps} steps (they stand at k / {steps}); "
                    "widen it, or turn guidance off with guidance_scale 1"
                )
        if self.guidance_scale == 1 and self.guidance_interval != (0.0, 1.0):
            raise UserError(
                f"guidance_interval {self.guidance_interval} has no effect with guidance_scale 1; raise guidance_scale or give 0 1"
            )
        if self.history_thinning and self.history_frames is None:
            raise UserError("history_thinning has no effect without history_frames; give it too, or leave history_thinning out")
        if self.top_k == 1 and self.confidence_threshold is not None:
            raise UserError(
                f"confidence_threshold {self.confidence_threshold} cannot work with top_k 1: every code is certain then, and each "
                "frame would end after one step; leave one of them out"
            )

    def changed(self, **given: Any) -> GenerationSettings:
        """A copy with what is not None replaced.

        A model's own later_steps and guidance_interval were chosen for its other defaults: they end where other
        num_inference_steps, or a guidance_scale of 1, are given without them.
        """
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("num_inference_steps", self.num_inference_steps) != self.num_inference_steps:
            given.setdefault("later_steps", None)
        if given.get("guidance_scale") == 1:
            given.setdefault("guidance_interval", GenerationSettings.guidance_interval)
        return replace(self, **given)

    def steps_of(self, frame: int) -> int:
        """Steps of the frame-th latent frame that is made, from 0; with a threshold it may end earlier."""
        return self.num_inference_steps if frame == 0 or self.later_steps is None else self.later_steps

    def steps_before(self, frame: int) -> int:
        """Steps of all the frames before it."""
        return sum(map(self.steps_of, range(frame)))

    def guides(self, step: int, steps: int) -> bool:
        """Whether this of a frame's steps uses both branches."""
        start, stop = self.guidance_interval
        return start <= step / steps < stop


def read_defaults(folder: Path) -> tuple[GenerationSettings, ClipDefaults]:
    """The model's own defaults from pipeline.json, if it has one."""
    file = folder / DEFAULTS_FILE
    if not file.is_file():
        return GenerationSettings(), ClipDefaults()
    stored = read_json(file, "a model's defaults", MAX_DEFAULTS_BYTES)
    if not isinstance(stored, dict):
        raise UserError(f"{file} must hold a JSON object of settings, not a {type(stored).__name__}")
    parts = [{f.name: stored.pop(f.name) for f in fields(c) if f.name in stored} for c in (GenerationSettings, ClipDefaults)]
    if stored:
        raise UserError(f"{file} has unknown settings: {shown(sorted(stored))}")
    try:
        return GenerationSettings(**parts[0]), ClipDefaults(**parts[1])
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def write_defaults(folder: Path, settings: GenerationSettings, clip: ClipDefaults) -> None:
    """Keep them in the folder's pipeline.json."""
    write_json(folder / DEFAULTS_FILE, {**vars(settings), **vars(clip)})
