"""Which clips a training step sees, and what its batches are.

Everything here is a pure function of (seed, step, position in the step): a resumed run, another number of threads,
processes or micro-batches sees the same clips with the same random numbers, and no loader state has to be stored
beside the step.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lumos.data import sprites
from lumos.data.worlds import Worlds
from lumos.errors import UserError
from lumos.sequence import Layout

IGNORED = -100
POSITIONS_PER_STEP = 1 << 16
SET_ELSEWHERE = {
    "seed": "training.seed",
    "height": "data.height",
    "width": "data.width",
    "num_frames": "data.num_frames",
    "fps": "data.fps",
    "split": "training itself, which always draws train",
}
"""Options of the worlds that data.options may not hold, and where they are set."""
VALIDATION_STEP = 1 << 36
"""Step number under which the validation set is drawn; no training run gets that far."""
VALIDATION_SEED = 0
"""Of validation clips and their masks, whatever the run's own seed: runs can be compared."""


@dataclass(frozen=True)
class Clip:
    """frames uint8 [T, H, W, 3], or in their place `codes` uint16 [t, h, w] made earlier; `name` finds the clip again."""

    frames: np.ndarray | None
    caption: str
    fps: int
    name: str
    codes: np.ndarray | None = None
    num_frames: int | None = None  # what text and header tell, if that is not what is there


def cut(clip: Clip, first_frames: int, temporal_compression: int) -> Clip:
    """The first frames of a clip, which still tells of the whole; one that is no longer stays as it is."""
    codes = clip.codes
    if codes is None:
        return replace(clip, frames=clip.frames[:first_frames], num_frames=len(clip.frames))
    latent = (first_frames - 1) // temporal_compression + 1
    return replace(clip, codes=codes[:latent], num_frames=(len(codes) - 1) * temporal_compression + 1)


class Source(Protocol):
    """Where clips come from.

    `usual_shape` holds num_frames, height, width and fps of most of its clips, `most_codes` the codes of the largest clip of
    each kind, `identity` what must be the same, beside the settings, for a resumed run to see the same clips.
    """

    usual_shape: dict[str, int]
    most_codes: dict[str, int]
    identity: dict[str, Any]

    def clips_in(self, shape: StepShape) -> int:
        """How many clips a step has, over all processes."""
        ...

    def clips(self, step: int, shape: StepShape, positions: range) -> list[Clip]:
        """The clips at `positions` of a step, the same at every call; all with frames or all with codes."""
        ...


class WorldSource:
    """The endless small worlds as a source; `scenes` limits training to the first so many, and leaves validation its own.

    `most_codes` says how many codes the tokenizer makes of a picture and of a clip.
    """

    def __init__(
        self, *, height: int, width: int, num_frames: int, fps: int, scenes: int | None, seed: int, options: dict,
        most_codes: dict[str, int],
    ):  # fmt: skip
        for key in options:
            if key in SET_ELSEWHERE:
                raise UserError(f"data.options may not hold {key}; it is set by {SET_ELSEWHERE[key]}")
        try:
            self.videos = Worlds(seed=seed, height=height, width=width, num_frames=num_frames, fps=fps, **options)
        except TypeError as error:
            known = [key for key in Worlds.__dataclass_fields__ if key not in SET_ELSEWHERE]
            wrong = next((f"unknown key {key}" for key in options if key not in known), str(error))
            raise UserError(f"data.options: {wrong}; allowed: {', '.join(known)}") from error
        if "sprites" in self.videos.kinds:
            sprites.load(next(iter(sprites.SPRITES)))  # without the pictures nothing starts
        self.scenes = scenes
        self.usual_shape = {"num_frames": num_frames, "height": height, "width": width, "fps": fps}
        self.most_codes, self.identity = most_codes, {}

    def clips_in(self, shape: StepShape) -> int:
        return shape.tokens // self.most_codes[shape.kind] if shape.batch_size is None else shape.batch_size

    def clips(self, step: int, shape: StepShape, positions: range) -> list[Clip]:
        num_frames = 1 if shape.kind == "image" else self.usual_shape["num_frames"]
        return [self.clip(sample_index(step, position), num_frames) for position in positions]

    def clip(self, index: int, num_frames: int) -> Clip:
        """Clip `index` of an endless numbering."""
        worlds = replace(self.videos, num_frames=num_frames)
        if index >= sample_index(VALIDATION_STEP, 0):
            worlds = replace(worlds, seed=VALIDATION_SEED)
        elif self.scenes:
            index %= self.scenes
        frames, caption = worlds[index]
        return Clip(frames, caption, worlds.fps, f"worlds/{worlds.seed}/{index}")


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


@dataclass(frozen=True)
class Batch:
    """One process's part of a step. Every tensor is [B, ...], right-padded to the longest of `lengths`; `targets` [B, L] is IGNORED
    where nothing is asked, which is not so in `supervised` places. `flops` of its forward and backward. `layouts` [B] is what the
    model would read off the ids."""

    step: int
    kind: str
    tensors: dict[str, Tensor]
    names: list[str]
    lengths: list[int]
    flops: float
    supervised: int
    layouts: list[Layout]
    pad_to: int = 1  # the rows' length is a multiple of it

    @property
    def tokens(self) -> int:
        """Without padding."""
        return sum(self.lengths)

    def micro_batches(self, size: int | None, share: int | None = None) -> list[dict[str, Any]]:
        """Parts of up to `size` clips, each as long as its longest.

        Their number is that of a process with `share` clips, because ZeRO needs it to be equal on all: a process with a clip
        less may have to add one that asks for nothing.
        """
        count = len(self.names)
        size = min(size or POSITIONS_PER_STEP, max(share or 0, count))
        parts = [self._part(i, min(i + size, count)) for i in range(0, count, size)]
        for _ in range(len(parts), math.ceil((share or count) / size)):
            idle = self._part(count - 1, count)  # the shortest
            parts.append(idle | {"targets": torch.full_like(idle["targets"], IGNORED)})
        return parts

    def _part(self, start: int, stop: int) -> dict[str, Any]:
        longest = math.ceil(max(self.lengths[start:stop]) / self.pad_to) * self.pad_to
        parts = {name: tensor[start:stop, :longest] for name, tensor in self.tensors.items()}
        return parts | {"layouts": self.layouts[start:stop]}


@dataclass(frozen=True)
class Draft:
    """A Batch whose clips are not encoded yet: all that can be done in any process, without a model.

    `ids` [B, L] has code 0 wherever a code is to be seen, `codes_at` bool [B, L] says where codes belong, `asked` which of them
    are supervised; `clips` are uint8 [B, T, H, W, 3], or codes already, int64 of all rows in a row.
    """

    clips: Tensor
    ids: Tensor
    codes_at: Tensor
    asked: Tensor
    batch: Batch  # its tensors still lack input_ids and targets


def sample_index(step: int, position: int) -> int:
    """Number of the clip at `position` of `step`: no two of a run are equal."""
    if not 0 <= position < POSITIONS_PER_STEP:
        raise ValueError(f"position {position} in a step; allowed: 0 to {POSITIONS_PER_STEP - 1}")
    return step * POSITIONS_PER_STEP + position


def sample_generator(seed: int, step: int, position: int, purpose: str) -> torch.Generator:
    """A CPU generator of its own for each (seed, step, position, purpose)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{position}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
