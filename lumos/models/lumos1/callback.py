"""The `callback_on_step_end` argument of a pipeline call, as in the pipelines of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lumos.errors import UserError, shown
from lumos.models.lumos1.configuration import LumosConfig
from lumos.models.lumos1.engine import code_offsets
from lumos.models.lumos1.sequence import Frame
from lumos.pipeline.base import StepCallback, VideoPipeline
from lumos.pipeline.calls import check_answer

TENSOR_INPUTS = ("codes", "history")



def step_callback(
    pipe: VideoPipeline,
    callback: StepCallback,
    names: Sequence[str],
    *,
    grid: tuple[int, int],
    steps_before: Callable[[int], int],
    history: Callable[[], Tensor],
    config: LumosConfig,
) -> Callable[[int, int, Tensor], None]:
    """Return a function (frame, step, ids) that calls `callback_on_step_end` and applies the codes that it returns.

    The function gets the ids [B, n] of the frame's span and changes them in place.

    Args:
        callback: the user's function of (pipe, step, codes still masked, tensors).
        names: the tensors that the callback asks for, from TENSOR_INPUTS.
        grid: rows and columns of codes in a latent frame.
        steps_before: returns the number of steps of all latent frames before a frame.
        history: returns the codes [B, t, h, w] of the frames before the current one.

    Raises UserError for a callback that is not callable and for unknown names. The returned function
    raises UserError if the callback returns codes of another shape or out of range.
    """
    if not callable(callback):
        raise UserError(f"callback_on_step_end is {shown(callback)}; give a function of (pipe, step, codes still masked, tensors)")
    if isinstance(names, str):
        raise UserError(f"callback_on_step_end_tensor_inputs is the text {shown(names)}; give a list of names, as [{shown(names)}]")
    if unknown := [name for name in names if name not in TENSOR_INPUTS]:
        raise UserError(f"callback_on_step_end_tensor_inputs {unknown} are not offered; allowed: {', '.join(TENSOR_INPUTS)}")
    offsets = code_offsets(Frame(0, *grid))

    def hook(frame: int, step: int, ids: Tensor) -> None:
        at = offsets.to(ids.device)
        tokens = ids[:, at]
        codes = (tokens - config.visual_token_start).masked_fill(tokens == config.mask_token_id, -1).view(-1, *grid)
        offered = {"codes": lambda: codes.clone(), "history": history}
        still_masked = int((codes < 0).sum(dim=(1, 2)).max())
        result = callback(pipe, steps_before(frame) + step, still_masked, {name: offered[name]() for name in names})
        if "codes" in (result := check_answer(result, TENSOR_INPUTS)):
            changed = check_codes(result["codes"], codes, config).to(ids.device)
            ids[:, at] = torch.where(changed < 0, tokens.view_as(changed), changed + config.visual_token_start).flatten(1)

    return hook


def check_codes(changed: Any, codes: Tensor, config: LumosConfig) -> Tensor:
    """Return the codes that a callback has changed, int64 [B, h, w] like `codes`.

    Raises UserError unless they have the shape of `codes`, values in range, and -1 (still masked) at
    the same positions.
    """
    if not isinstance(changed, Tensor) or changed.shape != codes.shape or changed.is_floating_point():
        given = f"{changed.dtype} {list(changed.shape)}" if isinstance(changed, Tensor) else type(changed).__name__
        raise UserError(f"the callback gave codes {given}; give whole numbers {list(codes.shape)}")
    changed = changed.to(codes)
    if not torch.equal(changed < 0, codes < 0) or changed.min() < -1 or changed.max() >= config.visual_token_count:
        raise UserError(
            f"the callback gave codes that cannot be used; give 0 to {config.visual_token_count - 1} where a code is decided, "
            "and -1 where it is still masked"
        )
    return changed
