"""Three hundred dirty items: each is taken or skipped for the reason in the table, by any number of workers, in every run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

from dirty_sources import TAKEN, Sources, build, remove_deep

from lumos.data.ingest.encode import ClipSettings
from lumos.data.ingest.ingest import ingest
from lumos.data.shards import format as shards

SETTINGS = ClipSettings(fps=12, size="8x8", num_frames=5)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dirty(tmp_path_factory) -> Sources:
    root = tmp_path_factory.mktemp("sources")
    yield build(root)
    remove_deep(root)


@pytest.fixture(scope="module")
def tokenizer(micro_folder) -> Path:
    return micro_folder / "video_tokenizer"


def found(out: Path) -> dict[str, str]:
    """Return the result of an ingest for each item, read from its files."""
    journal = [json.loads(line) for line in (out / "skipped.jsonl").read_text("ascii").splitlines()]
    taken = [row["id"] for row in shards.read_shards(out)]
    verdicts = {entry["id"]: entry["reason"] for entry in journal} | dict.fromkeys(taken, TAKEN)
    assert len(verdicts) == len(journal) + len(taken)  # no item twice
    assert all(entry["detail"].isprintable() and entry["detail"] for entry in journal)
    return verdicts


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_each_of_300_dirty_items_has_its_verdict(dirty, tokenizer, tmp_path, workers):
    assert len(dirty.verdicts) == 300
    said = []
    for run in range(2):
        report = ingest(dirty.sources, tmp_path, tokenizer, SETTINGS, workers=workers, max_failure_rate=1, warn=said.append)
        assert report["new_items"] == (0 if run else 300)
        assert found(tmp_path) == dirty.verdicts
        text = (tmp_path / "report.json").read_bytes().decode("utf-8")
        assert {entry["id"]: entry["reason"] for entry in json.loads(text)["skipped"]} == {
            id_: verdict for id_, verdict in dirty.verdicts.items() if verdict != TAKEN
        }
    assert said[:2] == said[2:]  # a second run sees nothing that changed
    assert [warning.partition(";")[0].split("/")[-1] for warning in said[:2]] == [
        "dirty has 1 texts beside no picture or clip", "zeros.tar has no media file and no row",
    ]  # fmt: skip
