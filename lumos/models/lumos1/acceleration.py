"""Optional ways to run the decoder: int8 weights, and compiled norms and MLPs. Both change a model in place."""

from __future__ import annotations

import torch

from lumos.errors import UserError
from lumos.models.lumos1.modeling import MLP, HeadNorm, LumosForVideoGeneration, RMSNorm


def use_int8_weights(model: LumosForVideoGeneration) -> None:
    """Quantize the linear layers of the decoder layers to int8 weights, with one scale per output channel (torchao).

    Matrix products still run in the model's dtype. The embedding and the head are not quantized.
    Raises UserError if torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise UserError(f'int8 weights need torchao ({error}): pip install -e ".[int8]", or leave int8 out') from error
    quantize_(model.model.layers, Int8WeightOnlyConfig(version=2))


def has_int8_weights(model: LumosForVideoGeneration) -> bool:
    """Return whether `use_int8_weights` has changed the model."""
    return type(model.model.layers[0].mlp.up_proj.weight.data) is not torch.Tensor


def compile_parts(model: LumosForVideoGeneration, backend: str = "inductor") -> None:
    """Compile the norms and MLPs of the model with torch.compile; all layers share the compiled code.

    Attention and the cache are not compiled. The first clip takes longer, because compilation runs then.
    Raises UserError if torch.compile does not work here (no C++ compiler, or no Triton).
    """
    try:
        torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.ones(8, device=model.device))
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"torch.compile does not work here ({reason[0]}); leave compile out") from error
    for module in model.modules():
        if isinstance(module, MLP | RMSNorm | HeadNorm):
            module.compile(dynamic=True, backend=backend)
