"""Folders of shards with random codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lumos.data.shards import format as shards
from lumos.data.shards.description import DESCRIPTION, FORMAT
from lumos.files import write_json
from tokenizer.fingerprint import tokenizer_facts
from tokenizer.video import VideoTokenizer


def write_folder(folder: Path, tokenizer: str, grids: list[tuple[int, int, int]]) -> Path:
    """Write random codes as clips into shards of five."""
    random = np.random.default_rng(0)
    rows = []
    for n, grid in enumerate(grids):
        codes = random.integers(0, 1000, grid).astype(np.uint16)
        t, h, w = grid
        row = {"id": f"c/{n}", "clip": 0, "codes": codes, "num_frames": t * 4 - 3, "height": h * 8, "width": w * 8}
        caption = "a red circle moves left on a gray background" if n % 2 else "a small blue square grows"
        rest = {"fps": 12 if t > 1 else 1, "caption": caption, "source": f"{n}.mp4", "start": 0.0}
        rows.append(row | rest | {"checksum": shards.checksum(row | rest)})
    folder.mkdir()
    for start in range(0, len(rows), 5):
        shards.write_shard(shards.next_shard(folder), rows[start : start + 5])
    facts = tokenizer_facts(VideoTokenizer.from_pretrained(tokenizer))
    write_json(folder / DESCRIPTION, {"format": FORMAT, "tokenizer": facts, "settings": {"fps": 12}})
    return folder


MIXED = [(3, 4, 4)] * 12 + [(2, 4, 6)] * 6 + [(1, 4, 4)] * 5 + [(1, 6, 4)] * 2
