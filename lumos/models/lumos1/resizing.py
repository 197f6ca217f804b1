"""Converts a model folder to another clip size with the same codes: it replaces the video tokenizer and adapts the config.

The weights of the decoder do not change. It reads the same size tokens and positions as in training: one
unit of size now stands for more pixels or fewer, and the distances of neighbouring codes stay as they were.
"""

from __future__ import annotations

from pathlib import Path
from shutil import copy2
from typing import Any

import torch

from lumos.compression.record import RECORD
from lumos.errors import UserError, shown
from lumos.files import parse_json, read_text, replacing_folder, write_json
from lumos.models.lumos1.configuration import SCALED_SCHEMES, LumosConfig
from lumos.models.lumos1.pipeline import LumosPipeline
from lumos.models.lumos1.rope import axis_strides
from lumos.pipeline.defaults import ClipDefaults
from lumos.runtime import no_progress_bar, versions
from tokenizer import VideoTokenizer
from tokenizer.loading import link_tokenizer, stored_dtype
from tokenizer.resizing import halve, same_codes


def resize(folder: str | Path, out: str | Path, video_tokenizer: str | Path | None = None, link: bool = False) -> ClipDefaults:
    """Write the resized model folder `out` and return the default clip shape of the resized model.

    Decoder and video tokenizer keep the dtypes in which they are stored, and the folder's record of compression goes
    along. If an error occurs, `out` is not written.

    Args:
        folder: the model folder to resize.
        out: the folder to write.
        video_tokenizer: the folder of a tokenizer of another size with the same codes. None: the tokenizer
            of half the size that is derived from that of the model.
        link: name the folder of `video_tokenizer` in video_tokenizer.json, in place of a copy.

    Raises UserError for `link` without `video_tokenizer`, for a tokenizer with other codes, for a model whose
    prompt states the size in words, and if no tokenizer of half the size can be derived.
    """
    if link and video_tokenizer is None:
        raise UserError("--link-video-tokenizer names the tokenizer of another folder; say which by --video-tokenizer")
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
    _set_compression(config, after.spatial_compression)
    clip = pipe.clip.scaled(after.spatial_compression, before.spatial_compression)
    resized = LumosPipeline(pipe.model.to(dtype), pipe.text_tokenizer, after.to(stored_dtype(source)), pipe.settings, clip)
    resized.trained_on = pipe.trained_on
    with no_progress_bar(), replacing_folder(out) as writing:
        resized.save_pretrained(writing)
        if link:
            link_tokenizer(writing, Path(video_tokenizer))
        if (Path(folder) / RECORD).is_file():
            copy2(Path(folder) / RECORD, writing)
        write_json(writing / "training.json", record)
    return clip


def _set_compression(config: LumosConfig, compression: int) -> None:
    """Set the spatial compression of a config, in place, so that the same codes keep their positions and size tokens."""
    strides = list(axis_strides(config))
    config.pixels_per_size_unit = config.pixels_per_size_unit * compression // config.spatial_compression
    config.spatial_compression = compression
    if config.position_scheme in SCALED_SCHEMES:
        config.position_strides = None if strides == [config.temporal_compression, compression, compression] else strides


def _record(folder: Path, video_tokenizer: str | Path | None) -> dict[str, Any]:
    """Return the content of the folder's training.json with this resize appended to its list "resized"."""
    file = folder / "training.json"
    before = parse_json(read_text(file, "a record of training"), str(file)) if file.is_file() else {}
    if not isinstance(before, dict) or not isinstance(before.get("resized", []), list):
        raise UserError(f"{file} must hold a JSON object, with a list if it has 'resized'; mend it or take it away")
    step = {"from": str(folder), "video_tokenizer": video_tokenizer and str(video_tokenizer), **versions()}
    return {**before, "resized": [*before.get("resized", []), step]}
