"""Kills of an ingest with several processes lose nothing and double nothing."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from forks import Forks
from PIL import Image

pytest.importorskip("pyarrow")

from lumos.data.shards import format as shards
from lumos.video.io import write_video

HERE = Path(__file__).parent
KILLED = f"ended with {-signal.SIGKILL}"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and kills by signal")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Forty pictures and two clips, of which the first, one in the middle and the last are slow; one picture has no caption."""
    folder, random = tmp_path_factory.mktemp("source") / "set", np.random.default_rng(0)
    folder.mkdir()
    for n in range(42):
        if n in (9, 30):
            write_video(folder / f"{n:02d}.mp4", random.integers(0, 255, (12, 16, 24, 3), dtype=np.uint8), 12)
        else:
            Image.fromarray(random.integers(0, 255, (16, 24, 3), dtype=np.uint8)).save(folder / f"{n:02d}.png")
        if n != 33:
            (folder / f"{n:02d}.txt").write_text("slow" if n in (0, 20, 41) else f"caption {n}")
    return folder


@pytest.fixture(scope="module")
def small(source, tmp_path_factory) -> Path:
    """Twelve of the items, which fill three shards and a part of one; one of them has no caption."""
    folder = tmp_path_factory.mktemp("small") / "set"
    folder.mkdir()
    for n in (0, 1, 2, 3, 4, 5, 6, 9, 32, 33, 34, 35):
        for file in source.glob(f"{n:02d}.*"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def driven(forks: Forks, source: Path, small: Path, micro_folder: Path, tmp_path_factory, times) -> Path:
    """The folders of killed_ingests.py. One process makes all, because workers share a server whose imports take seconds."""
    folder = tmp_path_factory.mktemp("driven")
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    places = source, small, folder, micro_folder / "video_tokenizer"
    done = forks.run([HERE / "killed_ingests.py", *places, times(3, 6), times(1, 2), times(2, 4)], env=environment)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    (folder / "told").write_text(done.stdout)
    return folder


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.suffix in (".parquet", ".jsonl")}


def check(folder: Path, kind: str, least: int) -> None:
    """A kill leaves a part of the whole result, and the resumed ingest gives the whole result."""
    whole = [row["id"] for row in shards.read_shards(folder / "whole")]
    for left in folder.glob(f"{kind}-*.killed*"):
        ids = [row["id"] for row in shards.read_shards(left)]
        assert ids == whole[: len(ids)], left
    resumed = [out for out in folder.glob(f"{kind}-*") if out.is_dir() and ".killed" not in out.name]
    assert len(resumed) >= least
    for out in resumed:
        assert content(out) == content(folder / "whole"), out


def kills(folder: Path, kind: str) -> int:
    """Return the number of these ingests that were killed, as the driver reports it."""
    return sum(line.startswith(f"{kind}: ") and line.endswith(KILLED) for line in (folder / "told").read_text().splitlines())


@pytest.mark.parametrize(("kind", "few", "many"), [("call", 3, 6), ("time", 1, 2)])
def test_a_killed_ingest_of_two_workers_is_resumed(driven, times, kind, few, many):
    least = times(few, many)
    assert kills(driven, kind) >= least
    check(driven / f"{kind}s", kind, least)


def test_slow_items_are_waited_for_also_after_a_kill(driven, times):
    assert kills(driven, "slow") == times(2, 4)
    assert len(list(shards.read_shards(driven / "slow" / "whole"))) == 41
    check(driven / "slow", "workers", times(2, 4))
