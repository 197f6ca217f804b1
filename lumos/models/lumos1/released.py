"""Converts released Lumos-1 weights and their tokenizers into one model folder of this library.

    <lumos>/config.json, model*.safetensors                          the decoder, one of 1B/... or 3B/...
    <cosmos>/tokenizer/text_tokenizer.json                           the text tokenizer
    <cosmos>/Cosmos-Tokenizer-DV4x8x8/encoder.jit, decoder.jit       the video tokenizer

All files are checked before any is written. The decoder is copied shard by shard (a shard is one of several
weight files), so memory holds at most one shard of the result (docs/reference, sections 1.4 and 10).
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lumos.errors import NotFound, RunError, UserError, shown
from lumos.files import check_writable, replacing_folder, write_json
from lumos.models.lumos1.configuration import LumosConfig
from lumos.models.lumos1.conversion import INDEX, WEIGHTS, check_written, match_layout, read_config, read_shapes, weight_files
from lumos.models.lumos1.modeling import LumosForVideoGeneration
from lumos.models.lumos1.request import check_agreement
from lumos.models.lumos1.settings import GenerationSettings
from lumos.pipeline.defaults import ClipDefaults, write_defaults
from lumos.runtime import versions
from tokenizer import TextTokenizer, VideoTokenizer, VideoTokenizerConfig, loading
from tokenizer.text import find_tokenizer_file

RECORD = "conversion.json"
SHARD_BYTES = 2**30
STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

PUBLISHED_IDS = {
    "<s>": 0, "<eoss>": 8196, "<racm3:break>": 8197, "<reserved08706>": 8710, "<reserved08799>": 8803,
    "<reserved08999>": 9003, "<reserved09000>": 9004, "<reserved09001>": 9005,
}  # fmt: skip
"""Ids of tokens by which the released text tokenizer is recognised (docs/reference, section 2.1)."""

DEFAULTS = {
    "image-256p": (GenerationSettings(guidance_scale=16.0), ClipDefaults(num_frames=1, height=256, width=448, target_size=352)),
    "video-256p": (GenerationSettings(), ClipDefaults(height=256, width=448, target_size=352)),
    "video-384p": (GenerationSettings(), ClipDefaults()),
}
"""Sampling options and clip shape of the published scripts for each kind of checkpoint (docs/reference, section 6.6)."""

FOLDERS = {  # name of a released folder -> its entry of DEFAULTS
    "stage-1-image": "image-256p",
    "stage-2-joint": "video-256p",
    "stage-2-joint-384p": "video-384p",
    "v2-stage2-joint-384p-sft": "video-384p",
}


@dataclass(frozen=True)
class Part:
    """One tensor of the decoder.

    name: its key in the converted folder. file, key: where the release stores it.
    shape, dtype: how it is written.
    """

    name: str
    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as it is written."""
        return math.prod(self.shape) * self.dtype.itemsize


def convert(
    lumos: str | Path,
    cosmos: str | Path,
    out: str | Path,
    *,
    text_tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    defaults: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write the model folder `out` and return the content of its conversion.json.

    If an error occurs, `out` is not created.

    Args:
        lumos: the released folder of the decoder.
        cosmos: the folder that holds both tokenizers, or the folder of the video tokenizer.
        out: the folder to write; it must not exist.
        text_tokenizer: the file or folder of the text tokenizer, if it is not in its usual place.
        dtype: the dtype of the written weights. None keeps the dtype of each tensor.
        defaults: a key of DEFAULTS. None chooses by the name of the folder `lumos`, and video-384p for an
            unknown name.
        shard_bytes: the most bytes of a shard.

    Raises UserError, before anything is written, for files, keys and shapes that are missing or wrong,
    for tokenizers of another model, and for too little free space. Raises RunError for damaged files and
    for values that are not finite.
    """
    lumos, cosmos, out = Path(lumos), Path(cosmos), Path(out)
    for folder, what in ((lumos, "decoder"), (cosmos, "tokenizers")):
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; give the released {what}'s")
    if out.exists():
        raise UserError(f"{out} exists already; name another place, or move it away")
    check_writable(out)
    kind = defaults or FOLDERS.get(lumos.resolve().name, "video-384p")
    if kind not in DEFAULTS:
        raise UserError(f"defaults {shown(kind)} are unknown; allowed: {', '.join(DEFAULTS)}")
    config = read_config(lumos)
    parts = decoder_parts(lumos, config, dtype)
    text_file = find_text_tokenizer(lumos, cosmos, text_tokenizer)
    text = TextTokenizer.from_pretrained(text_file, limit=config.visual_token_start)
    check_published(text, text_file)
    video_folder = find_video_tokenizer(cosmos)
    video_config, video = read_video_tokenizer(video_folder, dtype)
    with torch.device("meta"):
        check_agreement(config, text, VideoTokenizer(video_config))
    check_space(out, sum(p.nbytes for p in parts) + sum(t.nbytes for t in video.values()))

    bytes_of = Counter()
    for part in parts:
        bytes_of[part.dtype] += part.nbytes
    config.dtype = bytes_of.most_common(1)[0][0]
    made = {
        "lumos": str(lumos), "video_tokenizer": str(video_folder), "text_tokenizer": str(text_file), "defaults": kind,
        "dtype": str(config.dtype).removeprefix("torch."), "parameters": sum(math.prod(p.shape) for p in parts), **versions(),
    }  # fmt: skip
    with replacing_folder(out) as writing:
        config.save_pretrained(writing)
        write_shards(writing, parts, shard_bytes)
        loading.write_folder(writing / loading.SUBFOLDER, video_config, video)
        text.save_pretrained(writing / "text_tokenizer")
        write_defaults(writing, *DEFAULTS[kind])
        write_json(writing / RECORD, made)
    return made


def decoder_parts(folder: Path, config: LumosConfig, dtype: torch.dtype | None) -> list[Part]:
    """Return the tensors of the decoder in the order of its files. Only the headers of the files are read.

    Raises UserError if keys, shapes or dtypes are not those of the model.
    """
    files = weight_files(folder)
    renamed, shapes = match_layout(folder, read_shapes(files), config, LumosForVideoGeneration)
    parts = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                if key not in renamed:
                    continue
                stored = opened.get_slice(key).get_dtype()
                if stored not in STORED:
                    raise UserError(f"{file}: {key} is stored as {stored}; a released checkpoint has {', '.join(STORED)}")
                parts.append(Part(renamed[key], file, key, shapes[renamed[key]], dtype or STORED[stored]))
    return parts


def shards(parts: Iterable[Part], limit: int) -> list[list[Part]]:
    """Group the parts, in order, into shards of at most `limit` bytes; a part larger than that is alone."""
    groups: list[list[Part]] = [[]]
    for part in parts:
        if groups[-1] and sum(p.nbytes for p in groups[-1]) + part.nbytes > limit:
            groups.append([])
        groups[-1].append(part)
    return groups


def write_shards(folder: Path, parts: list[Part], limit: int) -> None:
    """Write model.safetensors, or shards model-00001-of-0000N.safetensors with an index, named as in transformers.

    Raises RunError if a file cannot be written, or if the written files do not hold all tensors.
    """
    groups = shards(parts, limit)
    names = [f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = [WEIGHTS]
    for name, group in zip(names, groups, strict=True):
        try:
            save_file(read_parts(group), folder / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise RunError(f"cannot write {name} ({error}); check free space, or choose another place") from error
    if len(groups) > 1:
        weight_map = {part.name: name for name, group in zip(names, groups, strict=True) for part in group}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(p.nbytes for p in parts)}, "weight_map": weight_map})
    check_written(folder, {part.name: part.shape for part in parts})


def read_parts(group: list[Part]) -> dict[str, Tensor]:
    """Return the tensors of a shard by name, in the shape and dtype in which they are written.

    Raises RunError for values that are not finite in that dtype.
    """
    tensors = {}
    for file, run in groupby(group, key=lambda part: part.file):
        with safe_open(file, framework="pt") as opened:
            for part in run:
                tensor = opened.get_tensor(part.key).view(part.shape).to(part.dtype)
                if not torch.stack(tensor.aminmax()).isfinite().all():  # aminmax makes no copy and passes NaN on
                    raise RunError(f"{file}: {part.key} has values that are not finite as {part.dtype}; download it again, or "
                                   "choose a dtype with a wider range")  # fmt: skip
                tensors[part.name] = tensor
    return tensors


def find_text_tokenizer(lumos: Path, cosmos: Path, named: str | Path | None) -> Path:
    """Return the file of the text tokenizer: `named`, or the first in the usual folders of the release.

    Raises UserError if there is none.
    """
    if named is not None:
        return find_tokenizer_file(Path(named))
    places = [cosmos / "tokenizer", cosmos, cosmos.parent / "tokenizer", lumos, lumos.parent.parent / "tokenizer"]
    for place in places:
        if place.is_dir():
            try:
                return find_tokenizer_file(place)
            except UserError:
                continue
    raise UserError(f"no text_tokenizer.json in {', '.join(map(str, places))}; name it (text_tokenizer / --text-tokenizer)")


def check_published(tokenizer: TextTokenizer, file: Path) -> None:
    """Raise UserError unless the tokens of PUBLISHED_IDS have their published ids."""
    for token, wanted in PUBLISHED_IDS.items():
        found = tokenizer.token_to_id(token)
        if found != wanted:
            has = "does not have it" if found is None else f"has {found}"
            raise UserError(f"{file} is no Lumos-1 text tokenizer: {token} must be id {wanted}, it {has}")


def find_video_tokenizer(cosmos: Path) -> Path:
    """Return the folder of the video tokenizer: `cosmos` or one of its subfolders.

    Of several, it is the one whose name contains DV4x8x8. Raises UserError if there is none, or if the
    name does not decide.
    """
    found = []
    for folder in (cosmos, *sorted(p for p in cosmos.iterdir() if p.is_dir())):
        try:
            found.append(loading.find_tokenizer_folder(folder))
        except NotFound:
            continue
    found = list(dict.fromkeys(found))
    named = [folder for folder in found if "DV4x8x8" in folder.name]
    if not found:
        raise UserError(
            f"no video tokenizer in {cosmos} or its subfolders; it needs encoder.jit and decoder.jit, or autoencoder.jit, "
            "as in Cosmos-Tokenizer-DV4x8x8"
        )
    if len(found) > 1 and len(named) != 1:
        raise UserError(f"{cosmos} holds several video tokenizers ({', '.join(p.name for p in found)}); name the folder of one")
    return found[0] if len(found) == 1 else named[0]


def read_video_tokenizer(folder: Path, dtype: torch.dtype | None) -> tuple[VideoTokenizerConfig, dict[str, Tensor]]:
    """Return the config and the weights (some hundred MB) of the video tokenizer.

    dtype: the dtype of the weights; None keeps the stored one.
    Raises UserError if the weights are not those of the config.
    """
    config = loading.read_config(folder)
    tensors = loading.read_tensors(folder)
    config = loading.fitted(config, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    with torch.device("meta"):
        loading.check_layout(VideoTokenizer(config).state_dict(), tensors, folder)
    return config, {key: tensor.to(dtype or tensor.dtype) for key, tensor in tensors.items()}


def check_space(out: Path, needed: int) -> None:
    """Raise UserError if the disk of `out` has less than `needed` bytes free."""
    place = out.absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{out} needs {needed / 1e6:,.0f} MB, {place} has {free / 1e6:,.0f} MB free; free space or choose another place"
        )
