"""Training from shards behind a URL: the same clips, few bytes at the start, a bounded cache, and changed shards."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

import fsspec
import pytest
import torch
from run_log import read_log
from shard_folder import write_folder

pytest.importorskip("pyarrow")

from lumos.cli import main
from lumos.data.curriculum import StepShape
from lumos.data.shards import format as shards
from lumos.data.shards import remote as storage
from lumos.data.shards.remote import Remote
from lumos.errors import RunError, UserError
from lumos.models.lumos1.training import ArdfTask
from lumos.training.loop import train

CPU = torch.device("cpu")
VIDEO = StepShape("video", 6)
CONTENT = "the content of data.path"


@pytest.fixture
def bucket(folder):
    """The shards of `folder` in a file system in memory."""
    system = fsspec.filesystem("memory")
    system.put(str(folder), "/bucket/shards", recursive=True)
    yield system
    system.rm("/bucket", recursive=True)


@pytest.fixture
def remote_settings(shard_settings, tmp_path):
    def make(url="memory://bucket/shards", **sections):
        data = {"cache_dir": str(tmp_path / "cache"), "shuffle_shards": 2} | sections.pop("data", {})
        return shard_settings(url, data=data, **sections)

    return make


def clips(task: ArdfTask, number: int) -> list[tuple]:
    found = task.source.clips(0, StepShape("video", 6, 0, number), range(6))
    return [(clip.name, clip.caption, clip.codes.tobytes()) for clip in found]


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_remote_shards_give_the_clips_of_the_local_folder(remote_settings, shard_settings, folder, bucket, tmp_path, scheme: str):
    url = "memory://bucket/shards" if scheme == "memory" else folder.as_uri()
    remote = ArdfTask(remote_settings(url), CPU)
    local = ArdfTask(shard_settings(data={"shuffle_shards": 2}), CPU)
    assert [clips(remote, number) for number in (0, 7, 2)] == [clips(local, number) for number in (0, 7, 2)]
    assert remote.resume_fingerprint() == local.resume_fingerprint()
    assert list((tmp_path / "cache").glob("*.parquet"))


@pytest.mark.slow
def test_the_start_reads_footers_and_steps_read_what_they_need(
    remote_settings, micro_tokenizers, tmp_path, monkeypatch, bucket
):
    path = write_folder(tmp_path / "many", micro_tokenizers["video"], [(3, 40, 40)] * 60)
    bucket.put(str(path), "/bucket/many", recursive=True)
    read, whole = [], Remote._call

    def counted(self, method, *args, **options):
        result = whole(self, method, *args, **options)
        read.append((method, self.name, len(result) if method == "cat_file" else 0))
        return result

    monkeypatch.setattr(Remote, "_call", counted)
    monkeypatch.setattr(shards, "FOOTER_BYTES", 3000)
    task = ArdfTask(remote_settings("memory://bucket/many", data={"cache_gb": 0.00022}), CPU)
    size = sum(file.stat().st_size for file in path.glob("*.parquet"))
    assert sum(n for _, name, n in read if name.endswith(".parquet")) < size / 10
    assert not [method for method, *_ in read if method == "get_file"]
    limit = 0
    for number in range(20):  # two epochs
        task.source.clips(0, StepShape("video", 6, 0, number), range(6))
        limit = max(limit, bytes_in(tmp_path / "cache"))
    wait_for(lambda: task.source.reader.downloads._value == 4)
    fetched = [name for method, name, _ in read if method == "get_file"]
    assert set(fetched) == {path.name for path in shards.shard_paths(path)}
    assert 0 < limit < 0.7 * size  # the limit, and a copy or two that are being made


def bytes_in(folder: Path) -> int:
    """Return the bytes of the folder's shards; shards may be added or removed meanwhile."""
    sizes = []
    for file in folder.glob("*.parquet"):
        with contextlib.suppress(FileNotFoundError):
            sizes.append(file.stat().st_size)
    return sum(sizes)


def wait_for(done) -> None:
    end = time.monotonic() + 300
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_shards_are_fetched_before_they_are_needed(remote_settings, bucket, tmp_path):
    task = ArdfTask(remote_settings(), CPU)
    source = task.source
    source.clips(0, VIDEO, range(1))
    coming = {f"{source.reader.digests[shard]}.parquet" for shard in source.pools["video"].order.next_shards(VIDEO)}
    wait_for(lambda: coming <= {path.name for path in (tmp_path / "cache").glob("*.parquet")})


def test_a_cache_too_small_for_what_is_in_use(remote_settings, bucket):
    with pytest.raises(UserError, match=r"data.cache_gb 1e-06 is too little.*with data.shuffle_shards 2, .* GB of it are in use"):
        ArdfTask(remote_settings(data={"cache_gb": 1e-6}), CPU)


def test_faults_of_a_remote_folder(remote_settings, bucket, monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match="memory://bucket/none holds no ingested clips"):
        ArdfTask(remote_settings("memory://bucket/none"), CPU)
    task = ArdfTask(remote_settings(), CPU)
    name = "/bucket/shards/shard-000001.parquet"
    whole = bucket.cat_file(name)
    bucket.pipe_file(name, whole[:-10])
    with pytest.raises(RunError, match=r"memory://bucket/shards/shard-000001\.parquet is damaged or cut off.*copy it again"):
        ArdfTask(remote_settings(), CPU)
    for now in (whole[:-10], bucket.cat_file(name.replace("1.parquet", "2.parquet"))):
        bucket.pipe_file(name, now)
        with pytest.raises(RunError, match=r"shard-000001\.parquet is not what it was when the run began"):
            [clips(task, number) for number in range(3)]
    bucket.rm_file(name)
    with pytest.raises(RunError, match=r"shard-000001\.parquet does not exist any more"):
        [clips(task, number) for number in range(3)]


def test_inspect_reads_urls(bucket, folder, capsys):
    assert main(["inspect", "memory://bucket/shards", "--no-sheet"]) == 0
    remote = capsys.readouterr().out
    assert main(["inspect", str(folder), "--no-sheet"]) == 0
    assert capsys.readouterr().out == remote
    assert main(["inspect", "nonsense://bucket"]) == 2
    assert "Protocol not known: nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["more", "fewer", "other codes", "other order", "another place"])
def test_shards_enter_the_resume_fingerprint(shard_settings, folder, tmp_path, change: str):
    path = tmp_path / "shards"
    shutil.copytree(folder, path)
    before = ArdfTask(shard_settings(path), CPU).resume_fingerprint()
    last = shards.shard_paths(path)[-1]
    rows = shards.read_group(last, 0)
    if change == "fewer":
        last.unlink()
    elif change == "more":
        shards.write_shard(shards.next_shard(path), rows)
    elif change == "other codes":
        rows[0]["codes"] = rows[0]["codes"] ^ 1
        rows[0]["checksum"] = shards.checksum(rows[0])
        shards.write_shard(last, rows)
    elif change == "other order":
        shards.write_shard(last, rows[::-1])
    else:
        path = path.rename(tmp_path / "moved")
    after = ArdfTask(shard_settings(path), CPU).resume_fingerprint()
    assert [key for key in before if before[key] != after[key]] == [CONTENT] * (change != "another place")


@pytest.mark.slow
def test_a_resumed_run_refuses_shards_that_changed(shard_settings, folder, tmp_path):
    path = tmp_path / "shards"
    shutil.copytree(folder, path)

    def run(**data) -> dict:
        return train(shard_settings(path, data=data, training={"max_steps": 1}))

    run()
    with pytest.raises(UserError, match=r"of another run: data.shuffle_shards was 16, now 3;"):
        run(shuffle_shards=3)
    shards.shard_paths(path)[-1].unlink()
    words = rf"of another run: {CONTENT} was 5 shards with 25 clips \(digest \w+\), now 4 shards with 20 clips \(digest"
    with pytest.raises(UserError, match=words):
        run()


@pytest.mark.slow
def test_processes_read_what_one_process_would(remote_settings, shard_settings, bucket, tmp_path):
    losses = {}
    for name, make, data in (("here", shard_settings, {"shuffle_shards": 2}), ("processes", remote_settings, {"processes": 2})):
        settings = make(data=data, training={"output_dir": str(tmp_path / name), "max_steps": 4})
        train(settings)
        losses[name] = read_log(tmp_path / name)
    assert losses["here"] == losses["processes"]
