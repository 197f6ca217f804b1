"""A source of training clips that draws synthetic scenes."""

from __future__ import annotations

from dataclasses import replace

from lumos.data.curriculum import StepShape
from lumos.data.seeding import VALIDATION_SEED, VALIDATION_STEP, sample_index
from lumos.data.source import TrainingClip
from lumos.data.synthetic import sprites
from lumos.data.synthetic.sampling import SyntheticScenes
from lumos.data.synthetic.vocabulary import caption_words, drawn_things
from lumos.data.trained_on import TrainedOn
from lumos.errors import UserError

SET_ELSEWHERE = {
    "seed": "training.seed",
    "height": "data.height",
    "width": "data.width",
    "num_frames": "data.num_frames",
    "fps": "data.fps",
    "split": "training itself, which always draws train",
}
"""Fields of SyntheticScenes that data.options may not have, and the settings that set them."""


class SyntheticSource:
    """A source of clips of synthetic scenes without end.

    `scenes` limits training to the first so many scenes; None: no limit. Validation clips are not
    limited: they have a seed of their own. `options` are further fields of `SyntheticScenes`.
    `most_codes` holds the number of codes of a picture ("image") and of a clip ("video"). Raise
    UserError for options that are unknown, not allowed or set elsewhere.
    """

    def __init__(
        self, *, height: int, width: int, num_frames: int, fps: int, scenes: int | None, seed: int, options: dict,
        most_codes: dict[str, int],
    ):  # fmt: skip
        for key in options:
            if key in SET_ELSEWHERE:
                raise UserError(f"data.options may not hold {key}; it is set by {SET_ELSEWHERE[key]}")
        try:
            self.videos = SyntheticScenes(seed=seed, height=height, width=width, num_frames=num_frames, fps=fps, **options)
        except TypeError as error:
            known = [key for key in SyntheticScenes.__dataclass_fields__ if key not in SET_ELSEWHERE]
            wrong = next((f"unknown key {key}" for key in options if key not in known), str(error))
            raise UserError(f"data.options: {wrong}; allowed: {', '.join(known)}") from error
        if "sprites" in self.videos.kinds:
            sprites.load(next(iter(sprites.SPRITES)))  # a missing picture stops the run before it starts
        self.scenes = scenes
        self.usual_shape = {"num_frames": num_frames, "height": height, "width": width, "fps": fps}
        self.most_codes, self.identity = most_codes, {}

    def clips_in(self, shape: StepShape) -> int:
        return shape.tokens // self.most_codes[shape.kind] if shape.batch_size is None else shape.batch_size

    def clips(self, step: int, shape: StepShape, positions: range) -> list[TrainingClip]:
        num_frames = 1 if shape.kind == "image" else self.usual_shape["num_frames"]
        return [self.clip(self._number(step, shape, position), num_frames) for position in positions]

    def trained_on(self) -> TrainedOn:
        return TrainedOn.of(sorted(caption_words(self.videos)), drawn_things(self.videos))

    def _number(self, step: int, shape: StepShape, position: int) -> int:
        """Return the number of a clip; with `scenes`, steps take these one after the other, so that all of them are seen."""
        index = sample_index(step, position)
        if self.scenes is None or step >= VALIDATION_STEP:
            return index
        return (step * self.clips_in(shape) + position) % self.scenes

    def clip(self, index: int, num_frames: int) -> TrainingClip:
        """Return the clip with number `index` (see `lumos.data.seeding.sample_index`) and `num_frames` frames."""
        scenes = replace(self.videos, num_frames=num_frames)
        if index >= sample_index(VALIDATION_STEP, 0):
            scenes = replace(scenes, seed=VALIDATION_SEED)
        frames, caption = scenes[index]
        return TrainingClip(frames, caption, scenes.fps, f"worlds/{scenes.seed}/{index}")
