"""The source that mixes other sources: shares, numbers of steps, and steps that depend on their shape alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lumos.data.curriculum import Curriculum, StepShape
from lumos.data.mixture import MixtureSource
from lumos.data.seeding import VALIDATION_STEP
from lumos.data.source import TrainingClip
from lumos.data.trained_on import TrainedOn
from lumos.training.sections import StageSettings


class Named:
    """A source whose clips have its name and the number of the shape."""

    def __init__(self, name: str, frames: int):
        self.name, self.most_codes, self.identity = name, {"video": frames, "image": 1}, {"the content": name}
        self.usual_shape = {"num_frames": frames, "height": 8, "width": 8, "fps": 8}

    def clips_in(self, shape: StepShape) -> int:
        return shape.batch_size + len(self.name)

    def clips(self, step: int, shape: StepShape, positions: range) -> list[TrainingClip]:
        return [TrainingClip(None, "", 8, f"{self.name} {shape.kind} {shape.number} {position}") for position in positions]

    def trained_on(self) -> TrainedOn:
        return TrainedOn.of([self.name])


@pytest.fixture
def mixture() -> MixtureSource:
    return MixtureSource(Named("new", 5), [(0.5, Named("old", 9)), (0.1, Named("older", 3))])


def test_each_source_has_its_share_of_any_stretch(mixture):
    names = [mixture.turn(StepShape("video", 2, number=number))[0].name for number in range(1000)]
    for name, share in (("new", 0.4), ("old", 0.5), ("older", 0.1)):
        assert names.count(name) == pytest.approx(1000 * share, abs=1)
        for start in range(0, 900, 50):
            assert names[start : start + 100].count(name) == pytest.approx(100 * share, abs=2)


def test_a_source_has_its_steps_without_gaps(mixture):
    curriculum = Curriculum([StageSettings(image_share=0.3)], 2)
    seen: dict[tuple[str, str], list[int]] = {}
    for step in range(300):
        source, shape = mixture.turn(curriculum(step))
        seen.setdefault((source.name, shape.kind), []).append(shape.number)
    assert len(seen) == 6
    assert all(numbers == list(range(len(numbers))) for numbers in seen.values())


def test_clips_are_those_of_the_source_of_the_step(mixture):
    for number in range(20):
        shape = StepShape("video", 2, number=number)
        source, own = mixture.turn(shape)
        assert mixture.clips(7, shape, range(3)) == source.clips(7, own, range(3))
        assert mixture.clips(7, shape, range(1, 3)) == mixture.clips(7, shape, range(3))[1:]
        assert mixture.clips_in(shape) == 2 + len(source.name)
        validation = mixture.clips(VALIDATION_STEP, shape, range(2))
        assert [clip.name for clip in validation] == [f"new video {number} {i}" for i in range(2)]


def test_a_mixture_knows_the_facts_of_all(mixture):
    assert mixture.usual_shape["num_frames"] == 5
    assert mixture.most_codes == {"video": 9, "image": 1}
    assert mixture.trained_on().words == {"new", "old", "older"}
    assert list(mixture.identity.values()) == ["new", "old", "older"]
    other = MixtureSource(Named("new", 5), [(0.5, Named("old", 9)), (0.1, Named("other", 3))])
    assert other.identity != mixture.identity


def test_shapes_differ_only_by_their_number(mixture):
    shape = StepShape("image", 4, stage=2, number=11, first_frames=5)
    assert replace(mixture.turn(shape)[1], number=11) == shape
