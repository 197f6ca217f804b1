"""Reads a config of `compress distill`: that of a generator, of the decoder of a tokenizer, or of a diffusers model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lumos.compression.decoder_distillation import DecoderDistillSettings, distill_decoder
from lumos.compression.distillation import distill
from lumos.compression.latent_distillation import distill_latents
from lumos.compression.latent_settings import GENERATOR, build_latent_settings
from lumos.compression.settings import load_settings
from lumos.settings import read_yaml
from lumos.training.settings import recipe_folders


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Any, Callable[[Any], dict[str, Any]]]:
    """Return the settings in a YAML file with overrides, and the function that trains with them.

    A file with the key start_from is that of a decoder, flat as those of `train-tokenizer`; one with `generator: diffusers` is that
    of a model of diffusers. Raises UserError, see
    `lumos.training.settings.load_settings`.
    """
    raw = read_yaml(path, list(overrides), recipe_folders())
    if "start_from" in raw:
        return DecoderDistillSettings.from_dict(raw), distill_decoder
    if raw.get("generator") == GENERATOR:
        return build_latent_settings({"name": Path(path).stem, **raw}), distill_latents
    return load_settings(path, list(overrides)), distill
