"""The config of the model that the settings of a training describe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lumos.errors import UserError, as_text, instead, reason_of, shown
from lumos.models.stiv.configuration import AXES, OMITTED, StivConfig
from lumos.models.stiv.initialization import position_scale
from lumos.models.stiv.latents import check_combination
from lumos.models.stiv.loading import read_config
from lumos.models.stiv.patterns import check_shares
from lumos.models.stiv.training_settings import StivTrainingSettings

SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "patch_size", "text_width", "temporal_attention")
"""Fields of StivConfig that a model folder and model.preset must have in common."""
SET_ELSEWHERE = {
    "latents": "latents.kind", "latent_mean": "latents.mean", "latent_std": "latents.std", "text_encoder": "text_encoder",
    "patterns": "patterns", "trained_grid": "the sizes of the data", "position_scale": "init.image and the sizes of the data",
}  # fmt: skip
"""Fields of StivConfig that model.overrides may not have, and what sets them."""


def model_config(settings: StivTrainingSettings) -> StivConfig:
    """Return the config of the model that the settings name, without the sizes of the data and measured statistics.

    Raises UserError if the settings are not valid, or if the model folder and the preset differ in shape.
    """
    model = settings.model
    known = set(StivConfig().to_dict()) | set(OMITTED)
    for key in model.overrides:
        if key in SET_ELSEWHERE:
            raise UserError(f"model.overrides may not hold {key}; it is set by {SET_ELSEWHERE[key]}")
        if key not in known:
            raise UserError(f"model.overrides.{as_text(key)} is unknown{instead(key, sorted(known - set(SET_ELSEWHERE)))}")
    changes = dict(model.overrides) | {"patterns": trained_patterns(settings)}
    given = {"latents": settings.latents.kind, "text_encoder": settings.text_encoder,
             "latent_mean": settings.latents.mean or None, "latent_std": settings.latents.std or None}  # fmt: skip
    changes |= {name: value for name, value in given.items() if value is not None}
    try:
        preset = model.preset and StivConfig.preset(model.preset, **changes)
        if model.from_ is None:
            return preset if settings.init.image is None else _like_parent(preset, settings)
        stored = folder_config(model.from_, "model.from")
        config = StivConfig(**_fields(stored) | changes)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    except TypeError as error:
        raise UserError(f"model.overrides: {shown(model.overrides)} cannot be used ({reason_of(error)})") from error
    for name in SHAPE if preset else ():
        found, wanted = getattr(stored, name), getattr(preset, name)
        if found != wanted:
            raise UserError(
                f"model.from: {model.from_} has {name} {shown(found)}, but model.preset {model.preset} has {shown(wanted)}; name a "
                "folder of that shape, or leave model.preset out (model.preset=null)"
            )
    _check_same_latents(config, stored, model.from_)
    return config


def trained_patterns(settings: StivTrainingSettings) -> list[str]:
    """Return the names of the patterns that the training reaches, sorted; "none" is reached by image dropout and pictures too."""
    found = {name for name, share in settings.patterns.items() if share > 0}
    dropped = settings.dropout.image > 0 or settings.dropout.joint > 0
    has_pictures = any(stage.image_share > 0 for stage in settings.data.stages)
    return sorted(found | {"none"} if dropped or has_pictures else found)


def folder_config(folder: str, setting: str) -> StivConfig:
    """Return the config of a model folder. Raises UserError, which names the setting, if there is none."""
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{setting}: {folder} is no model folder: it has no config.json")
    return read_config(Path(folder))


def parents_of(settings: StivTrainingSettings) -> dict[str, StivConfig]:
    """Return the configs of the models that the weights come from, by "image" and "temporal"; empty for random weights."""
    init, base = settings.init, settings.model.from_
    if base is not None:
        return {"image": folder_config(base, "model.from")}
    found = {"image": init.image, "temporal": init.temporal}
    return {kind: folder_config(folder, f"init.{kind}") for kind, folder in found.items() if folder is not None}


def with_clips(config: StivConfig, settings: StivTrainingSettings, num_frames: int, height: int, width: int) -> StivConfig:
    """Return the config for usual clips of this size: the grid of their tokens, and the position scales that go with it.

    A model whose grid was larger keeps its grid. Adapters (LoRA) keep the config of their base model.
    Raises UserError for clips whose sizes the model cannot have.
    """
    grid = grid_of(config, num_frames, height, width)
    if settings.lora.rank is not None:
        return config
    parents = parents_of(settings)
    before = parents["image"].trained_grid if settings.model.from_ is not None else None
    if before is not None:
        grid = {axis: max(grid[axis], before[axis]) for axis in AXES}
    config = StivConfig(**_fields(config) | {"trained_grid": grid})
    if not parents or (settings.model.from_ is not None and before is None):
        return config
    return StivConfig(**_fields(config) | {"position_scale": position_scale(config, *parents.values())})


def grid_of(config: StivConfig, num_frames: int, height: int, width: int) -> dict[str, int]:
    """Return the tokens of a clip along each axis. Raises UserError for sizes that the model cannot have."""
    unit = config.spatial_compression * config.patch_size
    for name, side in (("height", height), ("width", width)):
        if side % unit:
            raise UserError(f"{name} {side} of clips is not allowed; give a multiple of {unit}")
    sides = (side // config.spatial_compression for side in (height, width))
    return dict(zip(AXES, config.grid(config.latent_frames(num_frames), *sides), strict=True))


def check_clips(config: StivConfig, settings: StivTrainingSettings) -> None:
    """Raise UserError for numbers of frames and patterns of given frames that the model does not support."""
    data = settings.data
    if data.source == "shards" and config.latents not in ("per_frame", "causal"):
        raise UserError(
            f"latents {config.latents} are made from frames, and shards hold codes; set latents.kind=per_frame or causal, or "
            "data.source=worlds"
        )
    shares = {name: share for name, share in settings.patterns.items() if share > 0}
    check_combination(config.latents, temporal_patch_size=config.temporal_patch_size, patterns=shares)
    stages = data.stages or [None]
    if all(stage is not None and stage.image_share == 1 for stage in stages):
        if set(shares) != {"none"}:
            raise UserError("patterns give frames of clips, and this run trains on pictures only; set patterns to {none: 1}")
        return
    if not config.temporal_attention:
        raise UserError(
            "a model without temporal attention (model.overrides.temporal_attention) trains on pictures only; give "
            "every stage image_share 1, or leave it out"
        )
    if config.temporal_patch_size > 1 and any(stage is not None and stage.image_share for stage in stages):
        raise UserError(f"a picture is no multiple of temporal_patch_size {config.temporal_patch_size}; set image_share 0")
    lengths = {"data.num_frames": data.num_frames, "data.min_frames": data.min_frames}
    lengths |= {f"data.stages[{i}].first_frames": stage and stage.first_frames for i, stage in enumerate(stages)}
    for name, frames in lengths.items():
        if frames is not None:
            try:
                latents = config.latent_frames(frames)
                config.grid(latents, config.patch_size, config.patch_size)
                check_shares(shares, latents, config.latents)
            except UserError as error:
                raise UserError(f"{name} {frames}: {error}") from error


def planned_config(settings: StivTrainingSettings) -> tuple[StivConfig, str | None]:
    """Return `model_config`, and a sentence about an assumption, or None.

    If model.from or init.image do not exist yet, the model is assumed to have the sizes of model.preset.
    """
    missing = next((folder for folder in (settings.model.from_, settings.init.image) if folder is not None
                    and not (Path(folder) / "config.json").is_file()), None)  # fmt: skip
    if missing is None or settings.model.preset is None:
        return model_config(settings), None
    settings = replace(settings, model=replace(settings.model, from_=None), init=type(settings.init)())
    return model_config(settings), f"{missing}, which is not there yet, has the shape of {settings.model.preset}"


def _like_parent(config: StivConfig, settings: StivTrainingSettings) -> StivConfig:
    """Return the config with the statistics of the latents of init.image."""
    parent = folder_config(settings.init.image, "init.image")
    _check_same_latents(config, parent, settings.init.image)
    named = settings.latents.mean
    statistics = {} if named else {"latent_mean": parent.latent_mean, "latent_std": parent.latent_std}
    return StivConfig(**_fields(config) | statistics)


def _check_same_latents(config: StivConfig, parent: StivConfig, folder: str) -> None:
    for name in ("latent_channels", "spatial_compression", "text_encoder"):
        if getattr(config, name) != getattr(parent, name):
            raise UserError(
                f"{folder} has {name} {shown(getattr(parent, name))}, the new model {shown(getattr(config, name))}; its weights "
                f"are of no use then; set model.overrides.{name} or text_encoder to the same"
            )


def _fields(config: StivConfig) -> dict[str, Any]:
    """Return the fields that `StivConfig` declares."""
    values = config.to_dict()
    return {name: values[name] for name in StivConfig.__annotations__ if name in values}
