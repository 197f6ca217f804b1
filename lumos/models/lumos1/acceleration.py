"""Optional ways to run the decoder: int8 weights, compiled norms and MLPs. Both change a model in place."""

from __future__ import annotations

import torch

from lumos.errors import UserError
from lumos.models.lumos1.modeling import MLP, HeadNorm, LumosForVideoGeneration, RMSNorm


def use_int8_weights(model: LumosForVideoGeneration) -> None:
    """Keep the linear layers of the decoder's layers as int8 with a scale for each output (torchao); products run in the
    model's dtype. Embedding and head stay as they are. UserError without torchao.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise UserError(f'int8 weights need torchao ({error}): pip install -e ".[int8]", or leave int8 out') from error
    quantize_(model.model.layers, Int8WeightOnlyConfig(version=2))


def has_int8_weights(model: LumosForVideoGeneration) -> bool:
    return type(model.model.layers[0].mlp.up_proj.weight.data) is not torch.Tensor


def compile_parts(model: LumosForVideoGeneration, backend: str = "inductor") -> None:
    """Run norms and MLPs, all that is neither attention nor cache, by torch.compile; layers share the compiled code.

    The first clip waits for the compiler. UserError where torch.compile does not work (no C++ compiler, no Triton).
    """
    try:
        torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.ones(8, device=model.device))
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"torch.compile does not work here ({reason[0]}); leave compile out") from error
    for module in model.modules():
        if isinstance(module, MLP | RMSNorm | HeadNorm):
            module.compile(dynamic=True, backend=backend)
