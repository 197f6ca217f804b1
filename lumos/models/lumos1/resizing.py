"""A model folder made to draw at another size with the same codes: its video tokenizer is exchanged, its decoder is told.

The decoder's weights stay. It goes on reading the size tokens and the positions that it was trained with: one unit of size now
stands for more pixels (or fewer), and neighbouring codes are as far apart as they were.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lumos.errors import UserError, shown
from lumos.files import parse_json, read_text, replacing_folder, write_json
from lumos.models.lumos1.configuration import SCALED_SCHEMES, LumosConfig
from lumos.models.lumos1.pipeline import LumosPipeline
from lumos.models.lumos1.rope import axis_strides
from lumos.pipeline.defaults import ClipDefaults
from lumos.runtime import no_progress_bar, versions
from tokenizer import VideoTokenizer
from tokenizer.loading import stored_dtype
from tokenizer.resizing import halve, same_codes


def resize(folder: str | Path, out: str | Path, video_tokenizer: str | Path | None = None) -> ClipDefaults:
    """Write the model folder `out`, whole or not at all, in the number formats of what it is made of; returns the clip it makes.

    video_tokenizer: a folder with a tokenizer of another size and the same codes; None: the one of half the size that is inside
    the model's. UserError for tokenizers with other codes, for models that read their size in words, and if there is no such half.
    """
    record = _record(Path(folder), video_tokenizer)
    with no_progress_bar():
        pipe = LumosPipeline.from_pretrained(folder, dtype=torch.float32, device="cpu")
    dtype = pipe.model.config.dtype = LumosConfig.from_pretrained(folder).dtype or torch.float32
    source, before = video_tokenizer or folder, pipe.video_tokenizer
    after = halve(before) if video_tokenizer is None else VideoTokenizer.from_pretrained(source)
    if video_tokenizer is not None and not same_codes(before, after):
        raise UserError(f"the video tokenizer of {video_tokenizer} makes other codes than the one of {folder}, which the decoder "
                        "was trained on; train it with start_from and train_encoder=false")  # fmt: skip
    config = pipe.model.config
    if any(f"{{{side}}}" in config.prompt_template for side in ("width", "height")):
        raise UserError(f"the decoder of {folder} reads its size in words ({shown(config.prompt_template)}): it cannot be resized")
    _tell(config, after.spatial_compression)
    clip = pipe.clip.scaled(after.spatial_compression, before.spatial_compression)
    resized = LumosPipeline(pipe.model.to(dtype), pipe.text_tokenizer, after.to(stored_dtype(source)), pipe.settings, clip)
    with no_progress_bar(), replacing_folder(out) as writing:
        resized.save_pretrained(writing)
        write_json(writing / "training.json", record)
    return clip


def _tell(config: LumosConfig, compression: int) -> None:
    """Change the config to a spatial compression; positions and size tokens of the same codes stay."""
    strides = list(axis_strides(config))
    config.pixels_per_size_unit = config.pixels_per_size_unit * compression // config.spatial_compression
    config.spatial_compression = compression
    if config.position_scheme in SCALED_SCHEMES:
        config.position_strides = None if strides == [config.temporal_compression, compression, compression] else strides


def _record(folder: Path, video_tokenizer: str | Path | None) -> dict[str, Any]:
    file = folder / "training.json"
    before = parse_json(read_text(file, "a record of training"), str(file)) if file.is_file() else {}
    if not isinstance(before, dict) or not isinstance(before.get("resized", []), list):
        raise UserError(f"{file} must hold a JSON object, with a list if it has 'resized'; mend it or take it away")
    step = {"from": str(folder), "video_tokenizer": video_tokenizer and str(video_tokenizer), **versions()}
    return {**before, "resized": [*before.get("resized", []), step]}
