"""Clip numbers and random generators as pure functions of (seed, step, position in the step)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TypeVar

import torch

N = TypeVar("N", str, int)

POSITIONS_PER_STEP = 1 << 16
"""Upper limit of the number of clips in a step."""

VALIDATION_STEP = 1 << 36
"""Step number that stands for the validation set; no training run reaches it."""

VALIDATION_SEED = 0
"""Seed of the validation clips and their masks, the same in all runs so that runs can be compared."""


def sample_index(step: int, position: int) -> int:
    """Return the number of the clip at `position` of `step`; each clip of a run has its own number.

    Raise ValueError if `position` is not below POSITIONS_PER_STEP.
    """
    if not 0 <= position < POSITIONS_PER_STEP:
        raise ValueError(f"position {position} in a step; allowed: 0 to {POSITIONS_PER_STEP - 1}")
    return step * POSITIONS_PER_STEP + position


def sample_generator(seed: int, step: int, position: int, purpose: str) -> torch.Generator:
    """Return a CPU generator whose seed is a hash of (seed, step, position, purpose)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{position}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def drawn_name(generator: torch.Generator, shares: Mapping[N, float]) -> N:
    """Return a key of `shares`, such as the name of a pattern of given frames, drawn by its share.

    The order of the names has no effect. Uses one draw of the generator.
    """
    names = sorted(name for name, share in shares.items() if share > 0)
    ends = torch.tensor([shares[name] for name in names], dtype=torch.float64).cumsum(0)
    at = torch.rand((), generator=generator, dtype=torch.float64) * ends[-1]
    return names[min(int(torch.searchsorted(ends, at, right=True)), len(names) - 1)]
