from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumos.training.schedule import learning_rate


@given(
    st.sampled_from(["constant", "cosine", "wsd"]),
    st.integers(1, 200),
    st.data(),
)
def test_against_the_rule_step_by_step(schedule: str, max_steps: int, data: st.DataObject):
    warmup = data.draw(st.integers(0, max_steps - 1))
    decay = data.draw(st.integers(1, max_steps)) if schedule == "wsd" else None
    lr, min_lr = 2.0, 0.5
    rates = [
        learning_rate(s, lr=lr, min_lr=min_lr, warmup_steps=warmup, max_steps=max_steps, schedule=schedule, decay_steps=decay)
        for s in range(max_steps + 3)
    ]
    for step, rate in enumerate(rates[:max_steps]):
        if step < warmup:
            expected = lr / warmup * (step + 1)
        elif schedule == "constant":
            expected = lr
        elif schedule == "cosine":
            expected = min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * (step + 1 - warmup) / (max_steps - warmup)))
        else:
            length = min(decay, max_steps - warmup)
            left = max_steps - 1 - step  # 0 in the last step
            expected = min_lr + (lr - min_lr) * min(1.0, left / length)
        assert rate == pytest.approx(expected)
    assert rates[max_steps - 1 :] == pytest.approx([lr if schedule == "constant" else min_lr] * 4)


def test_wrong_calls():
    with pytest.raises(ValueError, match="negative"):
        learning_rate(-1, lr=1.0, max_steps=10)
    with pytest.raises(ValueError, match="constant, cosine, wsd"):
        learning_rate(5, lr=1.0, max_steps=10, schedule="linear")
