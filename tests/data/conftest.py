"""Eleven small sources, good and bad, and the folder that an ingest of them writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from ingest_helpers import SETTINGS, moving
from PIL import Image

from lumos.video.io import write_video


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """Seven good clips of a second and a picture; a truncated clip, a clip that is too short, and a clip without a caption."""
    folder = tmp_path_factory.mktemp("source") / "clips"
    for n in range(10):
        write_video(folder / f"{n}.mp4", moving(n, 3 if n == 8 else 24), 24)
        if n != 9:
            (folder / f"{n}.txt").write_text(f"caption {n}")
    whole = (folder / "3.mp4").read_bytes()
    (folder / "3.mp4").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(moving(99, 1)[0]).save(folder / "picture.png")
    (folder / "picture.txt").write_text("a picture")
    return folder


@pytest.fixture(scope="session")
def tokenizer(micro_folder) -> Path:
    return micro_folder / "video_tokenizer"


@pytest.fixture(scope="session")
def ingested(clips, tokenizer, tmp_path_factory) -> Path:
    """The folder that an uninterrupted run writes, with three clips in each shard."""
    out = tmp_path_factory.mktemp("out") / "shards"
    from lumos.data.ingest.ingest import ingest

    ingest([clips], out, tokenizer, SETTINGS, shard_clips=3, max_failure_rate=0.5)
    return out
