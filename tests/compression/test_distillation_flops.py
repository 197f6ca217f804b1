"""The FLOPs of a step of distillation are those of the student, and of all passes of the teacher."""

from __future__ import annotations

import pytest
import torch

from lumos.compression.distillation import make_task
from lumos.data.curriculum import StepShape

VIDEO = StepShape("video", 4)


@pytest.mark.parametrize("generator", ["lumos1", "stiv"])
def test_flops_count_the_passes_of_the_teacher(distilling, pairs, generator):
    """A pass of the teacher is a third of its training step. The critic needs two of its first half, and a backward pass."""

    def flops(step: int = 0, model: str = "student", **distill: object) -> float:
        weights = {"task": 1.0, "kd": 0.0, "icd": 0.0, "mca": 0.0} | distill
        made = distilling(generator, distill=weights, model={"from": pairs(generator)[model]})
        return make_task(made, torch.device("cpu")).batch(step, VIDEO, range(4)).flops

    student, teacher = flops(teacher=None), flops(model="teacher", teacher=None) / 3
    assert flops(kd=1.0) == flops(icd=1.0) == flops(mca=1.0, motion="difference") == pytest.approx(student + teacher)
    assert flops(step=4, icd=1.0) == flops(step=4, teacher=None)  # icd has fallen to 0
    judged, warming = (flops(mca=1.0, critic_warmup=steps) - student - teacher for steps in (0, 1))
    assert judged / 3 == pytest.approx(warming / 2)
    assert 0.3 * teacher < judged / 3 < 0.7 * teacher  # the first half of the blocks, and the ends
