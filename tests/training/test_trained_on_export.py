"""A training records its data in its model folder: scenes, shards, and the data of its base model."""

from __future__ import annotations

from pathlib import Path

import pytest

from lumos import VideoPipeline
from lumos.cli import main
from lumos.data.shards import format as shards
from lumos.data.shards import source as shard_source
from lumos.data.trained_on import TrainedOn, read_trained_on
from lumos.training.loop import train


@pytest.mark.slow
def test_a_training_on_scenes_says_what_they_show(micro_settings, tmp_path: Path):
    first = train(micro_settings(training={"max_steps": 1}))
    found = read_trained_on(first["export"])
    assert found.is_complete
    assert "circle" in found.lists["shapes"]
    assert {"red", "background"} <= found.words
    assert VideoPipeline.from_pretrained(first["export"], device="cpu").trained_on == found
    base = Path(first["export"])
    file = base / "trained_on.json"
    file.write_text(file.read_text().replace('"red"', '"crimson"'))
    again = micro_settings(
        model={"from": str(base), "preset": None, "overrides": {}}, training={"max_steps": 1, "output_dir": str(tmp_path / "again")}
    )
    joined = read_trained_on(train(again)["export"])
    assert {"red", "crimson"} <= joined.words
    file.unlink()
    assert main(["export", str(tmp_path / "again"), "--out", str(tmp_path / "out")]) == 0
    assert read_trained_on(tmp_path / "out") == joined  # an export later needs neither the data nor the base model


def test_shards_give_the_words_of_their_captions(tmp_path: Path, monkeypatch):
    captions = [["a red circle", "A RED square"], ["the dog runs"]]
    for number, texts in enumerate(captions):
        (tmp_path / f"shard-{number:06d}.parquet").write_text("\n".join(texts))
    broken = set()

    def read_texts(path: Path, column: str) -> list[str]:
        assert column == "caption"
        if path.name in broken:
            raise shards.damaged(path, "cut off")
        return path.read_text().split("\n")

    monkeypatch.setattr(shards, "read_texts", read_texts)
    source = object.__new__(shard_source.ShardSource)
    source.index = type("Index", (), {"paths": sorted(tmp_path.glob("*.parquet"))})
    source.reader = type("Reader", (), {"copies": None})
    words = {"a", "red", "circle", "square", "the", "dog", "runs"}
    assert source.trained_on() == TrainedOn(frozenset(words))
    for limit, name in ((2, "MAX_CAPTIONS"), (3, "MAX_WORDS")):
        with monkeypatch.context() as patch:
            patch.setattr(shard_source, name, limit)
            found = source.trained_on()
            assert not found.is_complete
            assert len(found.words) <= max(limit, 4)
    with monkeypatch.context() as patch:
        patch.setattr(shard_source, "MAX_CAPTIONS", 3)
        assert source.trained_on() == TrainedOn(frozenset(words))
    broken.add("shard-000001.parquet")
    assert source.trained_on() == TrainedOn(frozenset({"a", "red", "circle", "square"}), False)
    source.reader.copies = object()  # shards behind a URL are not read
    assert source.trained_on() == TrainedOn(frozenset(), False)


def test_captions_of_a_shard_are_read_back(tmp_path: Path):
    pytest.importorskip("pyarrow")
    import numpy as np

    rows = []
    for clip, caption in enumerate(("a red circle", "der Käfer läuft")):
        row = {
            "id": "x", "clip": clip, "codes": np.zeros((1, 2, 2), np.uint16), "num_frames": 1, "height": 16, "width": 16, "fps": 8,
            "caption": caption, "source": "x", "start": 0.0,
        }  # fmt: skip
        rows.append({**row, "checksum": shards.checksum(row)})
    shards.write_shard(tmp_path / "shard-000000.parquet", rows)
    assert shards.read_texts(tmp_path / "shard-000000.parquet", "caption") == ["a red circle", "der Käfer läuft"]
