"""Find, read, check and write video tokenizer folders.

Published weights are TorchScript archives. `tokenizer.torchscript` reads only their tensors: Python
unpickles nothing and torch runs nothing.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lumos.errors import NotFound, RunError, UserError, as_text, reason_of, shown
from lumos.files import folder_sha256, read_json, updating_folder, write_json
from tokenizer.configuration import BOOKKEEPING_KEYS, VideoTokenizerConfig
from tokenizer.torchscript import read_torchscript

SUBFOLDER = "video_tokenizer"
REFERENCE = f"{SUBFOLDER}.json"
"""The file of a model folder that names the tokenizer of another folder: `folder`, relative to it, and `sha256` of its files."""
WEIGHTS = "model.safetensors"
MAX_CONFIG_BYTES = 2**20
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Number formats of safetensors files."""
JIT_PAIR = ("encoder.jit", "decoder.jit")
JIT_WHOLE = "autoencoder.jit"

_NOT_PARAMETERS = re.compile(r"(^|\.)(wavelets|_arange|patch_size_buffer)$|^(quantizer|inv_quant|loss)\.")
"""Matches the constants that published files store beside the weights."""


def find_tokenizer_folder(folder: Path) -> Path:
    """Return the folder with the tokenizer's weights.

    It is the subfolder `video_tokenizer`, the folder that `video_tokenizer.json` names, or the folder itself. Raises
    NotFound if none holds weights, and UserError for a reference that is wrong or names a tokenizer that has changed.
    """
    for candidate in (folder / SUBFOLDER, folder):
        if candidate.is_dir() and _weight_files(candidate):
            return candidate
        if (folder / REFERENCE).is_file():
            return _referenced(folder / REFERENCE)
    if not folder.is_dir():
        raise NotFound(f"no folder {folder}: give a video tokenizer folder, or a model folder with {SUBFOLDER}/")
    raise NotFound(
        f"no video tokenizer in {folder}: it needs config.json with {WEIGHTS}, or {' and '.join(JIT_PAIR)}, or {JIT_WHOLE}, "
        f"there or in its subfolder {SUBFOLDER}"
    )


def _referenced(file: Path) -> Path:
    """Return the folder that a reference names, whose files must have the SHA-256 of the reference."""
    found = read_json(file, "the reference to a video tokenizer", MAX_CONFIG_BYTES)
    if not isinstance(found, dict) or not all(isinstance(found.get(key), str) for key in ("folder", "sha256")):
        raise UserError(f"{file} must hold a JSON object with the texts folder and sha256")
    folder = file.parent / found["folder"]
    if not (folder.is_dir() and _weight_files(folder)):
        raise NotFound(
            f"{file} names the video tokenizer {found['folder']}, and there is none in {folder}: copy that folder to this place, "
            f"or copy a video tokenizer to {file.parent / SUBFOLDER}"
        )
    if folder_sha256(folder) != found["sha256"]:
        raise UserError(
            f"the video tokenizer in {folder} is another one than {file} names: its files have another SHA-256; take the two "
            "model folders from the same release"
        )
    return folder


def write_reference(folder: Path, tokenizer: Path) -> None:
    """Write `video_tokenizer.json` into a model folder, which names the folder of a tokenizer in place of a copy of it."""
    place = os.path.relpath(tokenizer.resolve(), folder.resolve())
    write_json(folder / REFERENCE, {"folder": Path(place).as_posix(), "sha256": folder_sha256(tokenizer)})


def link_tokenizer(folder: Path, source: Path) -> None:
    """Replace the tokenizer in a model folder by `video_tokenizer.json`, which names that of the folder `source`."""
    shutil.rmtree(folder / SUBFOLDER)
    write_reference(folder, find_tokenizer_folder(source))


def _weight_files(folder: Path) -> list[Path]:
    """Return the files with the weights, or [] if there are none.

    They are, in this order of preference: model.safetensors, other safetensors files, encoder.jit and
    decoder.jit, autoencoder.jit.
    """
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
    """Return whether this is the folder of another model, for example a decoder: its config.json has a model_type."""
    try:
        config = read_json(folder / "config.json", "a config", MAX_CONFIG_BYTES)
    except UserError:
        return False
    return isinstance(config, dict) and "model_type" in config


def read_config(folder: Path) -> VideoTokenizerConfig:
    """Return the configuration in config.json of the folder.

    Published folders have no config.json, or one without sizes. The published sizes are then the
    default, and a name like DV8x16x16, CV8x8x8 or CI16x16 in the folder's path gives the kind and the
    compression (frames x rows x columns, or rows x columns). Raises UserError for a wrong setting and RunError for a damaged file.
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
        values = _published_sizes(str(folder.resolve()))
    try:
        return VideoTokenizerConfig.from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _published_sizes(path: str) -> dict[str, object]:
    """Return the settings that the name of a published tokenizer in a path tells."""
    if named := re.search(r"(DV|CV)(\d+)x(\d+)x\3(?!\d)", path):
        found = {"name": named[1], "temporal_compression": int(named[2]), "spatial_compression": int(named[3])}
    elif named := re.search(r"(CI)(\d+)x\2(?!\d)", path):
        found = {"name": named[1], "spatial_compression": int(named[2])}
    else:
        return {}
    is_small_patch = found["name"] != "DV" and path[named.end() :].startswith("-360p")
    return found | ({"patch_size": 2} if is_small_patch else {})


def fitted(config: VideoTokenizerConfig, shapes: Mapping[str, tuple[int, ...]]) -> VideoTokenizerConfig:
    """Return the configuration of a continuous video network with the facts that only its weights tell.

    `shapes` has the shape of each weight. The keys tell the number of decoder levels, which published
    networks of temporal compression 4 build with two whatever their configuration says, and whether
    samplers have the convolutions that they do not use (the first generation of published networks).
    Other configurations are returned unchanged.
    """
    if not config.is_continuous or config.is_image or config.decoder_num_res_blocks is not None or config.decoder_channels:
        return config  # the config of a smaller decoder says all of this
    widths: list[int] = []
    while shape := shapes.get(f"decoder.up.{len(widths)}.block.0.conv1.0.conv3d.weight"):
        widths.append(shape[0] // config.channels)
    mult = tuple(widths) if widths and len(widths) != len(config.channels_mult) else None
    try:
        config = replace(config, decoder_channels_mult=mult, unused_samplers=True)
    except UserError:  # the weights are those of another configuration, which `check_layout` says
        return config
    unused = _unused_weights(config)
    return replace(config, unused_samplers=not unused or not unused.isdisjoint(shapes))


def _unused_weights(config: VideoTokenizerConfig) -> set[str]:
    """Return the keys of the weights of the convolutions that the samplers of a network do not use."""
    found = set()
    for place, samplers, of_space, of_time in (
        ("encoder.down.{}.downsample", config.encoder_samplers(), "conv1", "conv2"),
        ("decoder.up.{}.upsample", config.decoder_samplers(), "conv2", "conv1"),
    ):
        for level, axes in enumerate(samplers):
            used = {of_space: axes.spatial, of_time: axes.temporal, "conv3": any(axes)} if axes else {}
            found |= {f"{place.format(level)}.{conv}.conv3d.weight" for conv, is_used in used.items() if not is_used}
    return found


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all weights of the folder, on the CPU and in their stored dtype.

    The constants that published files store beside the weights are left out. Raises RunError for a
    damaged file.
    """
    return _of_files(folder, load_file)


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Return `read_tensors(folder)` on the meta device. Of safetensors files only the headers are read."""
    return {name: tensor.to("meta") for name, tensor in _of_files(folder, header).items()}


def _of_files(folder: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the weights of the folder; `read` reads a safetensors file."""
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        try:
            found = read(path) if path.suffix == ".safetensors" else read_torchscript(path)
        except RunError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:
            raise RunError(f"cannot read the video tokenizer's weights in {path}: {reason_of(error)}") from error
        tensors.update(found)
    return {key: tensor for key, tensor in tensors.items() if not _NOT_PARAMETERS.search(key)}


def header(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file on the meta device, from its header.

    Raises RunError for a number format that is not in DTYPES.
    """
    found = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_slice(name)
            if (dtype := DTYPES.get(tensor.get_dtype())) is None:
                raise RunError(f"{path} holds numbers of the format {shown(tensor.get_dtype())}; known: {', '.join(DTYPES)}")
            found[name] = torch.empty(tensor.get_shape(), dtype=dtype, device="meta")
    return found


def stored_dtype(folder: str | Path) -> torch.dtype:
    """Return the dtype of the stored weights of a tokenizer folder, or of the tokenizer in a model folder."""
    return next(iter(read_headers(find_tokenizer_folder(Path(folder))).values())).dtype


def check_layout(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], folder: Path) -> None:
    """Raise UserError unless `expected` and `found` have the same keys with the same shapes."""
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
        f"the weights in {folder} do not fit its config.json: {', '.join(parts)}; take both files from the same tokenizer"
    )


def write_folder(folder: Path, config: VideoTokenizerConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write config.json and model.safetensors, either both or none. Other files in the folder stay."""
    weights = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
    with updating_folder(folder, {WEIGHTS, "config.json"}.__contains__) as writing:
        save_file(weights, writing / WEIGHTS, metadata={"format": "pt"})
        write_json(writing / "config.json", config.to_dict())
