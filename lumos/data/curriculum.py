"""The curriculum: what each training step consists of.

A step has either pictures or clips. The curriculum says how many, and whether the step uses whole
clips or only their first frames.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lumos.errors import UserError


@dataclass(frozen=True)
class StepShape:
    """The content of a training step, summed over all processes.

    kind          "image" or "video"
    batch_size    number of clips; None: as many clips as have about `tokens` codes
    stage         index of the stage of the curriculum
    number        number of earlier steps of the same kind in the same stage; a source that goes through
                  its clips in an order finds its place by this number
    tokens        codes of the step, if `batch_size` is None
    first_frames  number of frames used of each clip; None: all
    """

    kind: str
    batch_size: int | None
    stage: int = 0
    number: int = 0
    tokens: int | None = None
    first_frames: int | None = None


class Curriculum:
    """A function from the number of a step to its shape: `curriculum(step)` returns a `StepShape`.

    Each element of `stages` has the fields of StageSettings. The last stage has no end. A stage
    without a batch size of its own uses `batch_size`, or `tokens_per_batch` if `batch_size` is None.
    """

    def __init__(self, stages: list, batch_size: int | None, tokens_per_batch: int | None = None):
        def shape(kind: str, count: int | None, first_frames: int | None = None) -> StepShape:
            return StepShape(kind, count, tokens=None if count else tokens_per_batch, first_frames=first_frames)

        self.stages: list[Stage] = []
        start = 0
        for stage in stages:
            videos = stage.batch_size or batch_size
            short = shape("video", videos, stage.first_frames)
            short_share = 0.0 if stage.first_frames is None else stage.short_share
            image = shape("image", stage.image_batch_size or videos)
            self.stages.append(Stage(start, stage.image_share, short_share, image, short, shape("video", videos)))
            start += stage.steps or 0
        if not stages:
            video = shape("video", batch_size)
            self.stages.append(Stage(0, 0.0, 0.0, shape("image", batch_size), video, video))

    def __call__(self, step: int) -> StepShape:
        number = max(i for i, stage in enumerate(self.stages) if stage.start <= step)
        return replace(self.stages[number].shape_of(step), stage=number)

    def counts(self, steps: int) -> dict[StepShape, int]:
        """Return how many of the first `steps` steps have each shape.

        The fields `stage` and `number` of the shapes are not set.
        """
        counts: dict[StepShape, int] = {}
        ends = [*(stage.start for stage in self.stages[1:]), steps]
        for stage, end in zip(self.stages, ends, strict=True):
            for shape, n in stage.counts(max(0, min(end, steps) - stage.start)).items():
                counts[shape] = counts.get(shape, 0) + n
        return counts

    @property
    def kinds(self) -> list[str]:
        """The kinds of clips that the steps use: "image", "video" or both."""
        return sorted({shape.kind for shape in self.shapes})

    @property
    def shapes(self) -> set[StepShape]:
        """The different shapes of all steps; their fields `stage` and `number` are not set."""
        return {shape for stage in self.stages for shape in stage.shapes}


@dataclass(frozen=True)
class Stage:
    """The steps from `start` to the start of the next stage.

    A share `image_share` of the steps has pictures. Of the other steps, a share `short_share` has only
    the first frames of clips. The steps of a share are spread evenly over the stage.
    """

    start: int
    image_share: float
    short_share: float
    image: StepShape
    short: StepShape
    whole: StepShape

    def shape_of(self, step: int) -> StepShape:
        """Return the shape of `step`, with `number` set; `stage` is not set."""
        n = step - self.start
        images = part(n, self.image_share)
        if part(n + 1, self.image_share) > images:
            return replace(self.image, number=images)
        videos = n - images
        is_short = part(videos + 1, self.short_share) > part(videos, self.short_share)
        return replace(self.short if is_short else self.whole, number=videos)

    def counts(self, steps: int) -> dict[StepShape, int]:
        """Return how many of the first `steps` steps of this stage have each shape."""
        images = part(steps, self.image_share)
        short = part(steps - images, self.short_share)
        counts = ((self.image, images), (self.whole, steps - images - short), (self.short, short))
        return {shape: n for shape, n in counts if n}

    @property
    def shapes(self) -> set[StepShape]:
        """The different shapes of the steps of this stage."""
        videos = {self.short} if self.short_share == 1 else {self.short, self.whole} if self.short_share else {self.whole}
        return (videos if self.image_share < 1 else set()) | ({self.image} if self.image_share else set())


def part(n: int, share: float) -> int:
    """Return how many of the first n steps belong to a share that is spread evenly over all steps."""
    # The small addition makes up for rounding, for example 0.29 * 100 = 28.999999999999996.
    return int(n * share + 1e-9)


def check_shares(curriculum: Curriculum, most_codes: dict[str, int], processes: int) -> None:
    """Check that the steps of a curriculum can be divided among the processes.

    A step that counts codes must have at least one clip for each process; `most_codes` holds the
    number of codes of the largest clip of each kind. A step that counts clips must have equally many
    for each process. Raise UserError otherwise.
    """
    for shape in sorted(curriculum.shapes, key=str):
        if shape.batch_size is None:
            least = processes * most_codes[shape.kind]
            if shape.tokens < least:
                raise UserError(
                    f"training.tokens_per_batch {shape.tokens} is too few: the largest {shape.kind} has {most_codes[shape.kind]} "
                    f"codes, and each of the {processes} processes needs one; give at least {least}"
                )
        elif shape.batch_size % processes:
            key = "training.batch_size or a stage's batch_size" if shape.kind == "video" else "a stage's image_batch_size"
            raise UserError(f"{key} is {shape.batch_size}; it must be a multiple of the {processes} processes that share it")
