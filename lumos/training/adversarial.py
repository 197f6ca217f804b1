"""The losses of a network that judges results, and of the network whose results it judges."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def critic_losses(real: Tensor, fake: Tensor) -> Tensor:
    """Return the hinge loss of a critic for each score: max(0, 1 - D(real)) + max(0, 1 + D(fake)), of the shape of the scores."""
    return F.relu(1 - real) + F.relu(1 + fake)


def generator_losses(fake: Tensor, kind: str = "hinge") -> Tensor:
    """Return the loss of the network whose results a critic judges, of the shape of the scores.

    kind: "hinge", -D(fake); or "log", softplus(-D(fake)), which is -log of the probability that a clip is real.
    """
    return F.softplus(-fake) if kind == "log" else -fake
