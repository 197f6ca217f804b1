"""Video tokenizer folders: find, read, check and write them.

Nothing here is unpickled by Python or run by torch. TorchScript archives, the published form, are read for their tensors only
(`tokenizer.torchscript`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lumos.errors import NotFound, RunError, UserError, as_text, reason_of, shown
from lumos.files import read_json, updating_folder, write_json
from tokenizer.configuration import BOOKKEEPING_KEYS, VideoTokenizerConfig
from tokenizer.torchscript import read_torchscript

SUBFOLDER = "video_tokenizer"
WEIGHTS = "model.safetensors"
MAX_CONFIG_BYTES = 2**20
JIT_PAIR = ("encoder.jit", "decoder.jit")
JIT_WHOLE = "autoencoder.jit"

_NOT_PARAMETERS = re.compile(r"(^|\.)(wavelets|_arange|patch_size_buffer)$|^(quantizer|inv_quant|loss)\.")
"""Constants that published files store beside the weights."""


def find_tokenizer_folder(folder: Path) -> Path:
    """The folder itself if it holds a tokenizer's weights, else its subfolder `video_tokenizer`."""
    for candidate in (folder / SUBFOLDER, folder):
        if candidate.is_dir() and _weight_files(candidate):
            return candidate
    if not folder.is_dir():
        raise NotFound(f"no folder {folder}: give a video tokenizer folder, or a model folder with {SUBFOLDER}/")
    raise NotFound(
        f"no video tokenizer in {folder}: it needs config.json with {WEIGHTS}, or {' and '.join(JIT_PAIR)}, or {JIT_WHOLE}, "
        f"there or in its subfolder {SUBFOLDER}"
    )


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: one safetensors file, the pair of archives, or the whole archive."""
    if _is_other_model(folder):
        return []
    preferred = folder / WEIGHTS
    others = sorted(folder.glob("*.safetensors"))
    if preferred.is_file() or others:
        return [preferred] if preferred.is_file() else others
    pair = [folder / name for name in JIT_PAIR]
    if all(path.is_file() for path in pair):
        return pair
    return [folder / JIT_WHOLE] if (folder / JIT_WHOLE).is_file() else []


def _is_other_model(folder: Path) -> bool:
    """True for the folder of a Hugging Face model, a decoder for instance: its config.json names a model type."""
    try:
        config = read_json(folder / "config.json", "a config", MAX_CONFIG_BYTES)
    except UserError:
        return False
    return isinstance(config, dict) and "model_type" in config


def read_config(folder: Path) -> VideoTokenizerConfig:
    """config.json of the folder.

    The published folders describe their network by name only (no file, or a file without sizes): then the published sizes
    hold, and a name like DV8x16x16 in the folder's name gives the compression (frames x rows x columns).
    """
    path = folder / "config.json"
    values: dict[str, object] = {}
    if path.is_file():
        try:
            values = read_json(path, "a video tokenizer's config", MAX_CONFIG_BYTES)
        except UserError as error:
            raise RunError(f"{error}; copy it again") from error
        if not isinstance(values, dict):
            raise UserError(f"{path} holds {shown(values, 60)}; it must hold a JSON object with the settings of a video tokenizer")
    if set(values) <= BOOKKEEPING_KEYS:
        named = re.search(r"DV(\d+)x(\d+)x\2(?!\d)", str(folder.resolve()))
        if named:
            values = {"temporal_compression": int(named[1]), "spatial_compression": int(named[2])}
    try:
        return VideoTokenizerConfig.from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All weights of the folder on the CPU in their stored dtype, without the constants that published files carry."""
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        try:
            found = load_file(path) if path.suffix == ".safetensors" else read_torchscript(path)
        except RunError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:
            raise RunError(f"cannot read the video tokenizer's weights in {path}: {reason_of(error)}") from error
        tensors.update(found)
    return {key: tensor for key, tensor in tensors.items() if not _NOT_PARAMETERS.search(key)}


def stored_dtype(folder: str | Path) -> torch.dtype:
    """The number format of the weights of a tokenizer folder, or of a model folder's tokenizer."""
    return next(iter(read_tensors(find_tokenizer_folder(Path(folder))).values())).dtype


def check_layout(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], folder: Path) -> None:
    """Raise ValueError unless both have the same keys with the same shapes."""
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    wrong = [key for key in expected if key in found and expected[key].shape != found[key].shape]
    if not (missing or unexpected or wrong):
        return
    parts = [
        f"{len(keys)} {kind} (first: {as_text(keys[0], 80)})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if keys
    ]
    raise UserError(
        f"the weights in {folder} do not fit its config.json: {', '.join(parts)}; are sizes and files of one tokenizer?"
    )


def write_folder(folder: Path, config: VideoTokenizerConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write config.json and model.safetensors, both or none; other files of the folder stay."""
    weights = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
    with updating_folder(folder, {WEIGHTS, "config.json"}.__contains__) as writing:
        save_file(weights, writing / WEIGHTS, metadata={"format": "pt"})
        write_json(writing / "config.json", config.to_dict())
