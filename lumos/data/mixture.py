"""A source of training clips that mixes several: each of them has a share of the steps.

A fine-tuned model keeps what it knew if a share of the steps has the clips of its own training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lumos.data.curriculum import StepShape, part
from lumos.data.seeding import VALIDATION_STEP
from lumos.data.source import Source, TrainingClip
from lumos.data.trained_on import TrainedOn


class MixtureSource:
    """A source whose steps have the clips of `main`, and a share of them those of each of `others`.

    others: (share of the steps, source); the shares are above 0 and have a sum below 1. The steps of a source are spread
    evenly over those of each stage and kind, so which source a step has is a function of its shape alone. To its source,
    the steps of a stage that it has are numbered without gaps. Validation has clips of `main`.
    """

    def __init__(self, main: Source, others: Sequence[tuple[float, Source]]):
        self.main, self.others = main, list(others)
        self.usual_shape = main.usual_shape
        sources = [main, *(source for _, source in self.others)]
        self.most_codes = {kind: max(source.most_codes[kind] for source in sources) for kind in main.most_codes}
        self.identity: dict[str, Any] = dict(main.identity)
        for number, (_, source) in enumerate(self.others):
            self.identity |= {f"data.replay[{number}], {name}": value for name, value in source.identity.items()}

    def clips_in(self, shape: StepShape) -> int:
        source, own = self.turn(shape)
        return source.clips_in(own)

    def clips(self, step: int, shape: StepShape, positions: range) -> list[TrainingClip]:
        source, own = (self.main, shape) if step >= VALIDATION_STEP else self.turn(shape)
        return source.clips(step, own, positions)

    def trained_on(self) -> TrainedOn:
        found = self.main.trained_on()
        for _, source in self.others:
            found = found.joined(source.trained_on())
        return found

    def turn(self, shape: StepShape) -> tuple[Source, StepShape]:
        """Return the source of the step of this shape, and the shape with the number that the step has for that source."""
        number, rest = shape.number, 1.0
        for share, source in self.others:
            before = part(number, share / rest)  # of the steps that no earlier source has
            if part(number + 1, share / rest) > before:
                return source, replace(shape, number=before)
            number, rest = number - before, rest - share
        return self.main, replace(shape, number=number)
