"""The networks of a model folder that can be made smaller: the generator's own, and the video tokenizer with its decoder.

A network knows its files, what it costs, and how a smaller one is written so that it loads like the folder it came from.
"""

from __future__ import annotations

import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar

import torch

from lumos import registry
from lumos.compression.prunable import Prunable
from lumos.compression.record import RECORD
from lumos.errors import NotFound, UserError
from lumos.files import folder_sha256
from lumos.pipeline.defaults import ClipDefaults
from lumos.runtime import no_progress_bar, parameter_count
from lumos.training.tokenizer.flops import decoder_flops
from tokenizer import VideoTokenizer
from tokenizer.loading import (
    SUBFOLDER,
    check_layout,
    find_tokenizer_folder,
    fitted,
    header,
    read_config,
    read_headers,
    stored_dtype,
)

PARTS = ("model", "decoder")
UTILISATION = 0.4
"""The share of a device's peak FLOP/s that is assumed in seconds, as in `python -m lumos plan`."""
WEIGHTS = re.compile(r"(generation_)?config\.json|model.*\.safetensors(\.index\.json)?|.*\.jit")
"""Files of a network that a smaller one has of its own."""
NOT_COPIED = re.compile(r"README.*|\..*|video_tokenizer\.json|" + RECORD)
"""Entries of a model folder that say nothing true of a smaller model, or are written anew."""


class Network(ABC):
    """A network in a folder.

    folder  the folder that the user names
    place   the folder of its config and weights
    clip    the clips for which costs are counted
    ends    whether rules may remove the first and the last unit without being asked to
    """

    part: ClassVar[str]
    folder: Path
    place: Path
    clip: ClipDefaults
    ends: bool = False

    @property
    def sha256(self) -> str:
        """The hash of the config and the weights."""
        return weights_sha256(self.place)

    @abstractmethod
    def on_meta(self) -> Prunable:
        """Return the network without weights, on the meta device."""

    @abstractmethod
    def load(self, dtype: torch.dtype | None = None) -> Prunable:
        """Return the network in eval mode on the CPU; dtype None: that of the files."""

    @abstractmethod
    def write(self, network: Prunable, folder: Path) -> None:
        """Write a smaller network into a new folder, beside copies of all that belongs to it."""

    @abstractmethod
    def written_at(self, folder: Path) -> Network:
        """Return the network that `write` has written."""

    @abstractmethod
    def renewed(self, network: Prunable, seed: int) -> Prunable:
        """Return a network of the same config with new weights, where it may have new ones."""

    @abstractmethod
    def flops(self, network: Prunable) -> tuple[float, dict[str, int]]:
        """Return the FLOPs of a clip, and bytes of it by name that depend on the network."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The number format of the files."""

    def costs(self, network: Prunable, peak: float) -> dict[str, Any]:
        """Return what the network costs: parameters, bytes of weights, FLOPs, and seconds of a clip at a device's peak FLOP/s."""
        flops, sizes = self.flops(network)
        parameters = parameter_count(network)
        seconds = flops / (peak * UTILISATION)
        return {"parameters": parameters, "weight_bytes": parameters * self.dtype.itemsize, "flops": flops, **sizes,
                "seconds": seconds}  # fmt: skip


class GeneratorNetwork(Network):
    """The network of a generator."""

    part = "model"

    def __init__(self, folder: str | Path):
        self.folder = self.place = Path(folder)
        self.generator = registry.generator_of(folder)
        self.cost = self.generator.load("cost", "clip")
        self.config, self.sampling, self.clip = self.cost.model_of(folder, None)
        if not hasattr(self.kind, "without"):
            raise UserError(f"models of the generator {self.generator.name} cannot be made smaller")

    @property
    def kind(self) -> type:
        return self.generator.load("model")

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.config.dtype or torch.float32
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype

    def on_meta(self) -> Prunable:
        with torch.device("meta"):
            return self.kind(self.config)

    def load(self, dtype: torch.dtype | None = None) -> Prunable:
        with no_progress_bar():
            return self.kind.from_pretrained(self.folder, dtype=dtype or self.dtype).eval()

    def write(self, network: Prunable, folder: Path) -> None:
        copy_others(self.folder, folder, WEIGHTS)
        with no_progress_bar():
            network.save_pretrained(folder)

    def written_at(self, folder: Path) -> Network:
        return GeneratorNetwork(folder)

    def renewed(self, network: Prunable, seed: int) -> Prunable:
        torch.manual_seed(seed)
        return self.kind(network.config).to(self.dtype)

    def flops(self, network: Prunable) -> tuple[float, dict[str, int]]:
        text_tokens = 16 if network.config.max_prompt_tokens < 512 else 160
        report = self.cost.clip_cost(network.config, self.clip, self.sampling, text_tokens, self.dtype).report(1.0, 1.0)
        cache = report["bytes"].get("cache")
        return report["flops"]["total"], {} if cache is None else {"kv_bytes": cache}


class DecoderNetwork(Network):
    """The decoder of a video tokenizer, alone or in a model folder. The encoder stays as it is."""

    part = "decoder"
    ends = True

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.place = find_tokenizer_folder(self.folder)
        self.is_alone = not is_model_folder(self.folder)
        if self.is_alone:
            side = 16 * read_config(self.place).spatial_compression
            self.clip = ClipDefaults(num_frames=17, height=side, width=side, target_size=None)
        else:
            self.clip = registry.generator_of(folder).load("cost", "clip").model_of(folder, None)[2]

    @property
    def dtype(self) -> torch.dtype:
        return stored_dtype(self.place)

    def on_meta(self) -> Prunable:
        found = read_headers(self.place)
        config = fitted(read_config(self.place), {name: tuple(tensor.shape) for name, tensor in found.items()})
        with torch.device("meta"):
            network = VideoTokenizer(config)
        check_layout(network.state_dict(), found, self.place)
        return network.eval().requires_grad_(False)

    def load(self, dtype: torch.dtype | None = None) -> Prunable:
        return VideoTokenizer.from_pretrained(self.place, dtype=dtype or self.dtype)

    def write(self, network: Prunable, folder: Path) -> None:
        if self.is_alone:
            copy_others(self.folder, folder, WEIGHTS)
            network.save_pretrained(folder)
        else:
            copy_others(self.folder, folder, re.compile(SUBFOLDER))
            network.save_pretrained(folder / SUBFOLDER)

    def written_at(self, folder: Path) -> Network:
        return DecoderNetwork(folder)

    def renewed(self, network: Prunable, seed: int) -> Prunable:
        torch.manual_seed(seed)
        made = VideoTokenizer(network.config).to(self.dtype)
        kept = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("decoder.")}
        made.load_state_dict(kept, strict=False)
        return made.eval().requires_grad_(False)

    def flops(self, network: Prunable) -> tuple[float, dict[str, int]]:
        """Return the FLOPs of decoding a clip."""
        return float(decoder_flops(network.config, self.clip.num_frames, self.clip.height, self.clip.width)), {}


def network_of(folder: str | Path, part: str | None = None) -> Network:
    """Return a network of a folder. part: one of PARTS; None: the model of a model folder, the decoder of a tokenizer's folder.

    Raises UserError for a folder that has no such network; if it has neither, the message is that of a model folder.
    """
    if part is None:
        part = "decoder" if not is_model_folder(Path(folder)) and has_tokenizer(Path(folder)) else "model"
    return {"model": GeneratorNetwork, "decoder": DecoderNetwork}[part](folder)


def is_model_folder(folder: Path) -> bool:
    """Return whether a folder is that of a generator, and not that of a tokenizer alone."""
    try:
        registry.generator_of(folder)
    except UserError:
        return False
    return True


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has the weights of a video tokenizer, its own or in a folder that it names."""
    try:
        find_tokenizer_folder(folder)
    except NotFound:
        return False
    return True


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 of the config and the weights of a network's folder, without the tokenizers beside them."""
    return folder_sha256(folder, [path for path in folder.iterdir() if WEIGHTS.fullmatch(path.name)])


def copy_others(source: Path, target: Path, own: re.Pattern[str]) -> None:
    """Copy the entries of a model folder but those whose names match `own`, and but those that say nothing of a smaller model.

    A tokenizer that the folder only refers to is copied too.
    """
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        if not own.fullmatch(entry.name) and not NOT_COPIED.fullmatch(entry.name):
            copy(entry, target / entry.name)
    try:
        tokenizer = find_tokenizer_folder(source)
    except NotFound:
        return
    if source not in (tokenizer, tokenizer.parent) and not own.fullmatch(SUBFOLDER):
        copy(tokenizer, target / SUBFOLDER)


def copy(source: Path, target: Path) -> None:
    """Copy a file or a folder."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=shutil.copy2)
    else:
        shutil.copy2(source, target)


def written_counts(folder: Path) -> tuple[int, int]:
    """Return the numbers and the bytes of all tensors in the safetensors files of a folder, from their headers."""
    tensors = [tensor for path in folder.glob("*.safetensors") for tensor in header(path).values()]
    return sum(tensor.numel() for tensor in tensors), sum(tensor.nbytes for tensor in tensors)


def kept_stages(network: Prunable, removed: Collection[str]) -> list[int] | list[str]:
    """Return the stages that stay, by their numbers if they have numbers."""
    kept = [name for name in network.stages() if name not in removed]
    return [int(name) for name in kept] if all(name.isdecimal() for name in kept) else kept


def in_one_place(path: str | Path) -> str:
    """Return a path relative to the working folder if it lies in it, for records."""
    return os.path.relpath(path) if Path(path).resolve().is_relative_to(Path.cwd()) else str(path)
