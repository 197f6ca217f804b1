"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from lumos.errors import shown


def learning_rate(
    step: int,
    *,
    lr: float,
    max_steps: int,
    min_lr: float = 0.0,
    warmup_steps: int = 0,
    schedule: str = "cosine",
    decay_steps: int | None = None,
) -> float:
    """Return the learning rate of optimizer step `step`. Steps are numbered from 0 to max_steps - 1.

    Every schedule begins with a linear warm-up from lr / warmup_steps to lr. After it,
    - `constant` stays at lr,
    - `cosine` follows half a cosine down to min_lr in the last step,
    - `wsd` (warm-up, stable, decay) stays at lr, then falls linearly to min_lr over the last
      `decay_steps` (default: a fifth of max_steps).

    Steps after max_steps keep the last value. Raises ValueError for a negative step or an unknown
    schedule.
    """
    if step < 0:
        raise ValueError(f"step is {step}; it must not be negative")
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    if schedule == "cosine":
        start = warmup_steps
    elif schedule == "wsd":
        start = max(warmup_steps, max_steps - (decay_steps or max(1, max_steps // 5)))
    else:
        raise ValueError(f"schedule is {shown(schedule)}; allowed: constant, cosine, wsd")
    progress = min(1.0, max(0.0, (step + 1 - start) / max(1, max_steps - start)))
    fall = (1 - math.cos(math.pi * progress)) / 2 if schedule == "cosine" else progress
    return lr + (min_lr - lr) * fall
