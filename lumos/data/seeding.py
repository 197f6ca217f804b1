"""Numbers of clips and random generators as pure functions of (seed, step, position)."""

from __future__ import annotations

import hashlib

import torch

POSITIONS_PER_STEP = 1 << 16

VALIDATION_STEP = 1 << 36
"""Step number under which the validation set is drawn; no training run gets that far."""

VALIDATION_SEED = 0
"""Of validation clips and their masks, whatever the run's own seed: runs can be compared."""


def sample_index(step: int, position: int) -> int:
    """Number of the clip at `position` of `step`: no two of a run are equal."""
    if not 0 <= position < POSITIONS_PER_STEP:
        raise ValueError(f"position {position} in a step; allowed: 0 to {POSITIONS_PER_STEP - 1}")
    return step * POSITIONS_PER_STEP + position


def sample_generator(seed: int, step: int, position: int, purpose: str) -> torch.Generator:
    """A CPU generator of its own for each (seed, step, position, purpose)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{position}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
