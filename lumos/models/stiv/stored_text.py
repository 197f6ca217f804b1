"""States of a frozen text encoder, stored beside the shards of a data set, so that training runs the encoder once for each caption.

The folder of the shards gets a folder text_states-<fingerprint of the encoder>. It has a safetensors file for each shard:

    keys     uint8 [n, 16]     hashes of the ids of n different captions, the empty one included
    starts   int64 [n + 1]     where the states of each begin
    states   float16 [m, e]    states of all tokens, one caption after the other

Texts that are not in the files, such as those of other sources, are encoded when they are needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lumos.data.shards.format import read_texts, shard_paths
from lumos.errors import NotFinite, RunError, reason_of
from lumos.files import replacing
from lumos.models.stiv.text_encoder import FrozenTextEncoder, TextStates, last_states
from tokenizer.fingerprint import network_fingerprint

BATCH = 16
"""Captions that are encoded at a time."""


class StoredTextStates:
    """A frozen text encoder whose states of the captions of a folder of shards are read from files.

    Files that do not exist are made first. Processes that start together may each make a file; the files are equal, and each
    appears completely or not at all.

    caption_ids: returns the ids of a caption, cut to what the encoder reads.
    Raises RunError for a damaged file, NotFinite if the encoder's numbers are NaN or infinite in float16.
    """

    def __init__(self, shards: Path, encoder: FrozenTextEncoder, caption_ids: Callable[[str], Sequence[int]]):
        self.encoder, self.places, self.files = encoder, {}, []
        folder = shards / f"text_states-{network_fingerprint(encoder.model)[:12]}"
        for shard in shard_paths(shards):
            file = folder / f"{shard.stem}.safetensors"
            if not file.is_file():
                captions = dict.fromkeys(["", *read_texts(shard, "caption")])
                write(file, encoder, [tuple(caption_ids(caption)) for caption in captions])
            self._open(file)

    def encode(self, ids: Tensor, mask: Tensor) -> TextStates:
        """Return what the encoder returns, float32 on its device: ids int64 [B, m], mask bool [B, m]. Padding has states of 0."""
        device = next(self.encoder.model.parameters()).device
        rows = [tuple(row[kept].tolist()) for row, kept in zip(ids.cpu(), mask.cpu(), strict=True)]
        unknown = [i for i, row in enumerate(rows) if key_of(row) not in self.places]
        states = torch.zeros(*ids.shape, self.encoder.width, device=device)
        if unknown:
            states[unknown] = self.encoder.encode(ids[unknown], mask[unknown]).states.float() * mask[unknown].to(device)[..., None]
        for i, row in enumerate(rows):
            if (place := self.places.get(key_of(row))) is not None:
                file, start, end = place
                states[i, : len(row)] = self.files[file][start:end].to(device, torch.float32)
        mask = mask.to(device)
        return TextStates(states, mask, last_states(states, mask))

    def _open(self, file: Path) -> None:
        try:
            opened = safe_open(file, framework="pt")
            keys, starts = opened.get_tensor("keys").numpy(), opened.get_tensor("starts").tolist()
            self.files.append(opened.get_slice("states"))
            for n, key in enumerate(keys):
                self.places[key.tobytes()] = len(self.files) - 1, starts[n], starts[n + 1]
        except (SafetensorError, OSError, IndexError) as error:
            raise RunError(f"{file} is damaged ({reason_of(error)}); delete it, and training makes it again") from error


def write(file: Path, encoder: FrozenTextEncoder, rows: Sequence[tuple[int, ...]]) -> None:
    """Write the states of different rows of ids to a file. Raises NotFinite for states that float16 cannot hold."""
    rows = sorted(dict.fromkeys(rows), key=len)
    states = []
    for begin in range(0, len(rows), BATCH):
        part = rows[begin : begin + BATCH]
        mask = torch.arange(max(map(len, part))) < torch.tensor([len(row) for row in part])[:, None]
        ids = torch.zeros(mask.shape, dtype=torch.int64)
        ids[mask] = torch.tensor([id_ for row in part for id_ in row])
        states.append(encoder.encode(ids, mask).states.cpu()[mask].half())
    if not all(torch.isfinite(part).all() for part in states):
        raise NotFinite("the text encoder's numbers are not finite in float16; check its weights, or leave store_text_states out")
    starts = np.cumsum([0, *map(len, rows)])
    keys = np.stack([np.frombuffer(key_of(row), np.uint8) for row in rows])
    tensors = {"keys": torch.from_numpy(keys), "starts": torch.from_numpy(starts), "states": torch.cat(states)}
    file.parent.mkdir(exist_ok=True)
    with replacing(file) as temporary:
        save_file(tensors, temporary)


def key_of(row: Sequence[int]) -> bytes:
    """Return the hash of a row of ids."""
    return hashlib.blake2b(np.asarray(row, "<i8").tobytes(), digest_size=16).digest()
