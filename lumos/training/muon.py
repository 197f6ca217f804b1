"""An optimizer that updates the matrices of layers by Muon (orthogonal momentum) and all other weights by AdamW."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
"""Coefficients of five steps that bring all singular values near 1 (K. Jordan, Muon: https://kellerjordan.github.io/posts/muon)."""


class Muon(torch.optim.AdamW):
    """Updates groups with "muon": True by Muon, and all others by AdamW, with the same learning rate and decay rule.

    A convolution [m, ...] is updated as a matrix of m rows. A matrix [m, n] moves by lr * 0.2 * sqrt(max(m, n)) times its
    orthogonal momentum, so that an update is on average as large as one of AdamW and takes the same lr (arXiv 2502.16982,
    section 2.2). The only state of a matrix is the momentum, under AdamW's name `exp_avg`. Muon needs whole matrices, so it
    does not work with ZeRO 1 to 3, which divide them over processes.

    half: whether the products of the update are computed in bfloat16 on a CPU too.
    """

    half = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)
        return super().step(closure)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """Update matrices by Muon, and delete their gradients so that AdamW leaves these matrices unchanged."""
        alike: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                alike[len(parameter), parameter[0].numel()].append(parameter)
        for (rows, columns), parameters in alike.items():
            gradients, momenta = [p.grad.reshape(rows, columns) for p in parameters], []
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(parameter)}
                state["step"] += 1
                momenta.append(state["exp_avg"].view(rows, columns))
                parameter.grad = None
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            torch._foreach_lerp_(gradients, momenta, MOMENTUM)
            size = group["lr"] * 0.2 * max(rows, columns) ** 0.5
            matrices = [parameter.view(rows, columns) for parameter in parameters]
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, list(orthogonal(torch.stack(gradients), self.half)), alpha=-size)


def orthogonal(matrices: Tensor, half: bool = False) -> Tensor:
    """Return approximately the nearest (semi-)orthogonal matrices [N, m, n]: their singular values are from 0.7 to 1.2.

    With `half`, and always on CUDA, the products are computed in bfloat16, which is accurate enough and fast.
    """
    x = matrices.bfloat16() if half or matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in NEWTON_SCHULZ:
        square = x @ x.mT
        x = a * x + torch.baddbmm(square, square, square, beta=b, alpha=c) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def layer_matrices(model: nn.Module) -> set[str]:
    """Return the names of the trained weights of linear layers, without embedding and head."""
    linear = {f"{name}.weight": module.weight for name, module in model.named_modules() if type(module) is nn.Linear}
    return {name for name, weight in linear.items() if weight.requires_grad}
