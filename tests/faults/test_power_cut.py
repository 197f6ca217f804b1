"""Files are synchronized in an order that survives a power cut: each file before the file that refers to it."""

from __future__ import annotations

from pathlib import Path

from lumos.commands import bench_faults as faults
from lumos.data.ingest.encode import ClipSettings
from lumos.data.ingest.ingest import ingest
from lumos.prompt_lists.results import Results
from lumos.training.loop import train


def test_the_log_reaches_the_disk_before_its_checkpoint(material: Path, tmp_path: Path, disk):
    settings = faults.training_settings(material, tmp_path / "run", max_steps=4, eval_every=0)
    settings.data.processes = 0
    train(settings)
    disk.check_renames()
    before = 0
    for step in (2, 4):
        visible = disk.calls.index(("rename", tmp_path / "run" / "checkpoints" / f"step-{step:08d}"))
        assert ("sync", tmp_path / "run" / "log.jsonl") in disk.calls[before:visible]
        before = visible
    assert ("rename", tmp_path / "run" / "export") in disk.calls


def test_journals_reach_the_disk_before_their_shard(material: Path, tmp_path: Path, disk):
    (tmp_path / "clips").mkdir()
    for path in sorted((material / "clips").iterdir())[:6]:
        (tmp_path / "clips" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "clips" / "0.txt").unlink()  # is skipped
    size = f"{faults.SIDE}x{faults.SIDE}"
    ingest([tmp_path / "clips"], tmp_path / "out", material / "video_tokenizer", max_failure_rate=1.0,
           settings=ClipSettings(fps=8, size=size, num_frames=5), shard_clips=1)  # fmt: skip
    disk.check_renames()
    before = 0
    for shard in ("shard-000000.parquet", "shard-000001.parquet"):
        visible = disk.calls.index(("rename", tmp_path / "out" / shard))
        for journal in ("shards.jsonl", "skipped.jsonl"):
            assert ("sync", tmp_path / "out" / journal) in disk.calls[before:visible]
        before = visible


def test_a_clip_of_a_list_is_on_the_disk_before_it_is_visible(tmp_path: Path, disk):
    results = Results(tmp_path / "out", "clips")
    results.put("deep/a.bin", lambda path: path.write_bytes(b"x"))
    disk.check_renames()
    assert ("rename", tmp_path / "out" / "clips" / "deep" / "a.bin") in disk.calls
