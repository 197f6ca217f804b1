"""A folder of clips that were encoded before, to train models of diffusers on: latents and text states.

    latents.json        {"format": 1, "inputs": {...}}
    NAME.safetensors    a clip each, with these tensors:
        latents         [C, T, h, w], as the network reads them, so scaled and shifted
        text            [L, D], the states of the prompt; of an image-to-video U-Net, those of the image
        condition       [c, T, h, w], optional: concatenated to the channels of the noisy latents
        inputs.NAME     optional: the argument NAME of the network, without the axis of clips

`inputs` in latents.json has arguments that are the same number for all clips, such as {"guidance": 6000.0}.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lumos.data.curriculum import StepShape
from lumos.data.seeding import sample_generator
from lumos.errors import NotFound, RunError, UserError, reason_of, shown
from lumos.files import read_json
from lumos.settings import is_number

INDEX = "latents.json"
FORMAT = 1
LATENTS, TEXT, CONDITION, INPUT = "latents", "text", "condition", "inputs."
RANKS = {LATENTS: 4, TEXT: 2, CONDITION: 4}
WAYS = {"format", "inputs"}

LatentClip = dict[str, Tensor]
"""The tensors of a clip by name."""


class LatentFolder:
    """The clips of a folder in an order that is a pure function of the seed. It is the source of a training.

    names   of the files
    inputs  arguments of the network that are equal for all clips
    shapes  {tensor: its shape} of the first clip
    """

    def __init__(self, folder: str | Path, seed: int):
        self.folder, self.seed = Path(folder), seed
        if not self.folder.is_dir():
            raise NotFound(f"there is no folder {self.folder}; name a folder of latents")
        index = read_json(self.folder / INDEX, "the description of a folder of latents")
        if not isinstance(index, dict) or index.get("format") != FORMAT or not index.keys() <= WAYS:
            allowed = f'{{"format": {FORMAT}, "inputs": {{}}}}'
            raise UserError(f"{self.folder / INDEX} is {shown(index)}; it must be an object such as {allowed}")
        self.inputs = index.get("inputs", {})
        if not isinstance(self.inputs, dict) or not all(is_number(value) for value in self.inputs.values()):
            raise UserError(f"{self.folder / INDEX}: inputs is {shown(self.inputs)}; it must be an object of numbers by name")
        self.names = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not self.names:
            raise NotFound(f"{self.folder} has no .safetensors files; each clip is one")
        self.all_shapes = [read_shapes(self.folder / name) for name in self.names]
        self.shapes = self.all_shapes[0]
        if other := next((i for i, found in enumerate(self.all_shapes) if found.keys() != self.shapes.keys()), None):
            raise UserError(
                f"{self.folder / self.names[other]} has the tensors {', '.join(sorted(self.all_shapes[other]))}, but "
                f"{self.names[0]} has {', '.join(sorted(self.shapes))}; all clips of a folder have the same"
            )
        self.most_codes = {"video": 0, "image": 0}  # steps do not count codes

    def clips_in(self, shape: StepShape) -> int:
        return shape.batch_size

    def sha256(self) -> str:
        """Return a hash of the names of the clips, of the shapes of their tensors, and of the inputs."""
        facts = [self.inputs, *zip(self.names, ([*sorted(found.items())] for found in self.all_shapes), strict=True)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def at(self, number: int) -> int:
        """Return the index of the clip that stands at a place of the endless order of clips; each epoch has an order of its own."""
        epoch, place = divmod(number, len(self.names))
        return int(self._order(epoch)[place])

    @functools.lru_cache(maxsize=4)  # noqa: B019, one source a run
    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.names), generator=sample_generator(self.seed, epoch, 0, "order of latents"))

    def read(self, index: int) -> LatentClip:
        """Return the tensors of a clip. Raises RunError if its file cannot be read."""
        path = self.folder / self.names[index]
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{path} cannot be read: {reason_of(error)}; write it again") from error


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return {tensor: its shape} of the file of a clip. Raises UserError if it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {reason_of(error)}; write it again") from error
    for name, shape in found.items():
        if name not in RANKS and not name.startswith(INPUT):
            raise UserError(f"{path} has a tensor {shown(name)}; allowed: {', '.join(RANKS)} and {INPUT}NAME")
        if name in RANKS and (len(shape) != RANKS[name] or 0 in shape):
            raise UserError(f"{path}: {name} has the shape {list(shape)}; it must have {RANKS[name]} axes, none of them empty")
    for name in (LATENTS, TEXT):
        if name not in found:
            raise UserError(f"{path} has no tensor {name}; it needs {LATENTS} [C, T, h, w] and {TEXT} [L, D]")
    if CONDITION in found and found[CONDITION][1:] != found[LATENTS][1:]:
        raise UserError(
            f"{path}: {CONDITION} has the shape {list(found[CONDITION])}, latents {list(found[LATENTS])}; all but the channels "
            "must be equal"
        )
    return found


def groups_of(clips: list[dict[str, Any]]) -> list[list[int]]:
    """Return the indices of clips in groups whose tensors have equal shapes, so that a network can read a group at once."""
    found: dict[tuple, list[int]] = {}
    for i, clip in enumerate(clips):
        found.setdefault(tuple((name, tuple(tensor.shape)) for name, tensor in sorted(clip.items())), []).append(i)
    return list(found.values())
