"""Weights of a new model from trained ones: video from pictures, large from small, long from short.

    image       every weight but those of temporal attention, or all of them if it is a video model
    temporal    temporal attention and its gain, from a video model; without it they are new, and the gain is 0

A gain of 0 leaves the image model unchanged: a clip gives frame by frame what the image model gives.
Source: reference, section 10.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lumos.errors import UserError, shown
from lumos.models.stiv.configuration import AXES, StivConfig
from lumos.models.stiv.loading import check_keys
from lumos.models.stiv.modeling import StivForVideoGeneration

TEMPORAL = re.compile(r"^blocks\.\d+\.(temporal\.|temporal_gain$)")


def initialized(config: StivConfig, image: str | Path, temporal: str | Path | None = None) -> tuple[StivForVideoGeneration, dict]:
    """Return a new model of `config` with the weights of folders, and a record of where they came from.

    Its config has the position scales for the size in `config.trained_grid`, see `position_scale`.
    New weights are drawn from torch's global generator.
    Raises UserError that lists tensors which are missing, unknown or of another shape.
    """
    parents = {"image": StivForVideoGeneration.from_pretrained(image, dtype=torch.float32)}
    if temporal is not None:
        parents["temporal"] = StivForVideoGeneration.from_pretrained(temporal, dtype=torch.float32)
    scales = position_scale(config, *(parent.config for parent in parents.values()))
    config = StivConfig(**config.to_dict() | {"position_scale": scales})
    model = StivForVideoGeneration(config)
    state = inherited(model, *parents.values(), source=" and ".join(map(str, filter(None, (image, temporal)))))
    model.load_state_dict(state)
    record = {kind: {"folder": str(folder), "position_scale": parents[kind].config.position_scale}
              for kind, folder in (("image", image), ("temporal", temporal)) if folder is not None}  # fmt: skip
    return model, record | {"position_scale": config.position_scale}


def inherited(
    model: StivForVideoGeneration, image: StivForVideoGeneration, temporal: StivForVideoGeneration | None = None,
    source: str = "the model to start from",
) -> dict[str, Tensor]:
    """Return the whole state of `model`, taken from its parents.

    If no parent has temporal attention, that of `model` stays as it is, with a gain of 0.
    Raises UserError that lists tensors which are missing, unknown or of another shape, and for parents that cannot be used.
    """
    if temporal is not None and not temporal.config.temporal_attention:
        raise UserError(f"init.temporal of {source} is a model for pictures, without temporal attention; give a video model")
    if temporal is not None and not model.config.temporal_attention:
        raise UserError("init.temporal has no effect: the new model has no temporal attention; leave it out")
    if image.config.temporal_attention and not model.config.temporal_attention:
        raise UserError(f"{source} is a video model; a model for pictures cannot be made of it")
    wanted, of_image = model.state_dict(), image.state_dict()
    of_time = of_image if temporal is None else temporal.state_dict()
    found = {name: value for name, value in of_image.items() if not TEMPORAL.match(name)}
    found |= {name: value for name, value in of_time.items() if TEMPORAL.match(name)}
    if model.config.temporal_attention and not any(map(TEMPORAL.match, found)):
        new = {name: value for name, value in wanted.items() if TEMPORAL.match(name)}
        found |= {name: torch.zeros_like(value) if name.endswith("temporal_gain") else value for name, value in new.items()}
    found = adapted_patches(found, image.config, model.config)
    check_keys(source, *({name: tuple(value.shape) for name, value in state.items()} for state in (wanted, found)))
    return found


def adapted_patches(state: Mapping[str, Tensor], before: StivConfig, after: StivConfig) -> dict[str, Tensor]:
    """Return a state whose patch layers have temporal patches of `after.temporal_patch_size` in place of 1.

    The input weights are repeated and divided by the size, the output rows are repeated: repeated frames give what one
    frame gave. Raises UserError for a change from another size than 1.
    """
    size = after.temporal_patch_size
    if size == before.temporal_patch_size:
        return dict(state)
    if before.temporal_patch_size != 1:
        raise UserError(
            f"temporal_patch_size {size} cannot be made of a model with {before.temporal_patch_size}; give "
            f"{before.temporal_patch_size}, or start from a model with 1"
        )
    return dict(state) | {
        "patch_in.weight": state["patch_in.weight"].repeat(1, size) / size,
        "patch_out.weight": state["patch_out.weight"].repeat(size, 1),
        "patch_out.bias": state["patch_out.bias"].repeat(size),
    }


def position_scale(config: StivConfig, image: StivConfig, temporal: StivConfig | None = None) -> dict[str, float]:
    """Return the position scales of a model of `config` whose weights come from models of other sizes.

    Along an axis that has grown, the positions of the larger grid cover the range of the trained one: the scale is the
    trained one times trained / now. Along other axes it stays. The time axis is that of the parent with temporal attention;
    if there is none, time is learned anew, with scale 1.

    Raises UserError if both grids are not known (`trained_grid`).
    """
    of_time = temporal or (image if image.temporal_attention else None)
    scales = {}
    for axis in AXES:
        parent = of_time if axis == "time" else image
        if parent is None:
            scales[axis] = 1.0
            continue
        if parent.trained_grid is None or config.trained_grid is None:
            raise UserError(
                f"trained_grid is {shown(parent.trained_grid)} in the model to start from and {shown(config.trained_grid)} in the "
                "new one; both must name the tokens of their clips, or positions cannot be scaled"
            )
        trained, now = parent.trained_grid[axis], config.trained_grid[axis]
        scales[axis] = parent.position_scale[axis] * min(1.0, trained / now)
    return scales

