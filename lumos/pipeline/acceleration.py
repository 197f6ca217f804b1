"""Optional ways to run a network: int8 weights, and compiled norms and MLPs. Both change it in place."""

from __future__ import annotations

import torch
from torch import nn

from lumos.errors import UserError


def use_int8_weights(layers: nn.Module) -> None:
    """Quantize the linear layers of the network's layers to int8 weights, with one scale per output channel (torchao).

    Matrix products still run in the model's dtype. Raises UserError if torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise UserError(f"int8 weights need torchao ({error}); pip install 'lumos-video[int8]', or leave int8 out") from error
    quantize_(layers, Int8WeightOnlyConfig(version=2))


def has_int8_weights(layers: nn.Module) -> bool:
    """Return whether `use_int8_weights` has changed the layers."""
    return any(type(module.weight.data) is not torch.Tensor for module in layers.modules() if isinstance(module, nn.Linear))


def compile_parts(model: nn.Module, kinds: tuple[type[nn.Module], ...], backend: str = "inductor") -> None:
    """Compile the modules of these kinds with torch.compile; all layers share the compiled code.

    The first clip takes longer, because compilation runs then. Raises UserError if torch.compile does not
    work here (no C++ compiler, or no Triton).
    """
    try:
        torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.ones(8, device=next(model.parameters()).device))
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"torch.compile does not work here ({reason[0]}); leave compile out") from error
    for module in model.modules():
        if isinstance(module, kinds):
            module.compile(dynamic=True, backend=backend)
