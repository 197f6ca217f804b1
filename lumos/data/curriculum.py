"""What each training step is made of: pictures or clips, how many, whole or their first frames."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lumos.errors import UserError


@dataclass(frozen=True)
class StepShape:
    """What a step is made of, over all processes: `batch_size` clips of a `kind`, "image" or "video", or if that is None so many
    that they have about `tokens` codes. Of each clip, `first_frames` are used; None: all.

    `number` counts the earlier steps of the kind in the same `stage`: sources that pass over their clips go by it.
    """

    kind: str
    batch_size: int | None
    stage: int = 0
    number: int = 0
    tokens: int | None = None
    first_frames: int | None = None


class Curriculum:
    """Stages in order -> the shape of each step.

    `stages` hold the fields of StageSettings; the last has no end. A stage without batch_size has that of the run or, if it is
    None, `tokens_per_batch`.
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
        """How many of the first so many steps have each shape, without stage and number."""
        counts: dict[StepShape, int] = {}
        ends = [*(stage.start for stage in self.stages[1:]), steps]
        for stage, end in zip(self.stages, ends, strict=True):
            for shape, n in stage.counts(max(0, min(end, steps) - stage.start)).items():
                counts[shape] = counts.get(shape, 0) + n
        return counts

    @property
    def kinds(self) -> list[str]:
        return sorted({shape.kind for shape in self.shapes})

    @property
    def shapes(self) -> set[StepShape]:
        """The different shapes of all steps, without stage and number."""
        return {shape for stage in self.stages for shape in stage.shapes}


@dataclass(frozen=True)
class Stage:
    """Steps from `start` on, of which image_share hold pictures, and of the others short_share only the first frames of clips."""

    start: int
    image_share: float
    short_share: float
    image: StepShape
    short: StepShape
    whole: StepShape

    def shape_of(self, step: int) -> StepShape:
        """With its number, without its stage."""
        n = step - self.start
        images = part(n, self.image_share)
        if part(n + 1, self.image_share) > images:
            return replace(self.image, number=images)
        videos = n - images
        is_short = part(videos + 1, self.short_share) > part(videos, self.short_share)
        return replace(self.short if is_short else self.whole, number=videos)

    def counts(self, steps: int) -> dict[StepShape, int]:
        """How many of its first so many steps have each shape."""
        images = part(steps, self.image_share)
        short = part(steps - images, self.short_share)
        counts = ((self.image, images), (self.whole, steps - images - short), (self.short, short))
        return {shape: n for shape, n in counts if n}

    @property
    def shapes(self) -> set[StepShape]:
        videos = {self.short} if self.short_share == 1 else {self.short, self.whole} if self.short_share else {self.whole}
        return (videos if self.image_share < 1 else set()) | ({self.image} if self.image_share else set())


def part(n: int, share: float) -> int:
    """How many of n steps are in a share that is spread evenly. The small addition is for 0.3 * 10 = 2.99.."""
    return int(n * share + 1e-9)


def check_shares(curriculum: Curriculum, most_codes: dict[str, int], processes: int) -> None:
    """UserError unless in every step each process has a clip, and equally many where a step counts clips."""
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
