"""Ingest: frame rates, skipped items, and kills, after which no clip is missing or stored twice."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import warnings
import weakref
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from ingest_helpers import FLAGS, SETTINGS, content, moving

pytest.importorskip("pyarrow")

from lumos.cli import main
from lumos.data.ingest.encode import ClipSettings, _clips, clip_starts, ingest_item
from lumos.data.ingest.ingest import ingest
from lumos.data.ingest.item import Item
from lumos.data.ingest.manifest import items
from lumos.data.shards import format as shards
from lumos.data.shards.source import ShardIndex
from lumos.errors import RunError, UserError
from lumos.video.frames import from_uint8
from lumos.video.io import read_image, read_video, write_video
from lumos.video.reading import OpenVideo
from tokenizer import VideoTokenizer


def test_clips_at_30_fps_are_sampled_at_12_fps(tmp_path):
    frames = np.repeat(np.arange(60, dtype=np.uint8) * 4, 16 * 24 * 3).reshape(60, 16, 24, 3)
    write_video(tmp_path / "a.mp4", frames, 30)
    item = Item("a.mp4", str(tmp_path / "a.mp4"))
    settings = ClipSettings(fps=12, size="16x24", num_frames=9, clips_per_video=2)
    found = list(_clips(item, tmp_path / "a.mp4", settings, 4))
    assert [round(start * 12) for start, *_ in found] == [2, 13]  # 24 frames: gaps of 2 before, between and after
    assert [origin for *_, origin in found] == [(16, 24, 2.5)] * 2
    for start, clip, _ in found:
        shown = clip.mean(axis=(1, 2, 3)) / 4
        expected = np.floor((start + np.arange(9) / 12) * 30 + 1e-6)
        assert np.abs(shown - expected).max() < 0.6
    part = list(_clips(Item("a", str(tmp_path / "a.mp4"), start=0.5, end=1.25), tmp_path / "a.mp4", settings, 4))
    assert [start for start, *_ in part] == [0.5]
    assert abs(part[0][1][0].mean() / 4 - 15) < 0.6


def test_hdr_video_is_skipped_with_its_own_reason(tmp_path, tokenizer):
    """This holds for a file that would be too short and for a file with an unknown suffix as well."""
    (folder := tmp_path / "films").mkdir()
    for name, frames in (("a.mp4", 9), ("short.mp4", 3)):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("libx264", rate=12)
            stream.height, stream.width, stream.pix_fmt, stream.codec_context.color_trc = 16, 24, "yuv420p10le", 16
            for _ in range(frames):
                frame = av.VideoFrame.from_ndarray(np.zeros((16, 24, 3), np.uint8))
                container.mux(stream.encode(frame.reformat(format="yuv420p10le")))
            container.mux(stream.encode())
        (folder / name).with_suffix(".txt").write_text("a circle")
    (folder / "a.mp4").rename(folder / "a.unknown")
    report = ingest([folder], tmp_path / "out", tokenizer, SETTINGS, max_failure_rate=1)
    assert report["reasons"] == {"high dynamic range": 2}
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert all("is an HDR video (PQ)" in line["detail"] for line in lines)


def test_clips_of_a_long_video_do_not_overlap_and_lie_inside():
    for available in range(5, 60):
        for clips in range(1, 8):
            starts = clip_starts(available, 5, clips)
            assert len(starts) == min(clips, available // 5)
            assert all(b - a >= 5 for a, b in pairwise(starts))
            assert starts[0] >= 0
            assert starts[-1] + 5 <= available
    assert clip_starts(25, 5, 1) == [10]


def test_clips_of_a_video_are_read_and_encoded_one_at_a_time(tmp_path, tokenizer, monkeypatch):
    write_video(tmp_path / "a.mp4", moving(0, 60), 12)
    model, held = VideoTokenizer.from_pretrained(tokenizer), []
    encode = model.encode

    def one(video):
        gc.collect()
        held.append(sum(ref() is not None for ref in alive))
        return encode(video)

    read_part = OpenVideo.read

    def read(*args, **options):
        frames, fps = read_part(*args, **options)
        if options.get("fps"):
            alive.append(weakref.ref(frames))
        return frames, fps

    alive = []
    monkeypatch.setattr(model, "encode", one)
    monkeypatch.setattr(OpenVideo, "read", read)
    settings = ClipSettings(fps=12, size="16x24", num_frames=5, clips_per_video=12)
    rows = ingest_item(Item("a", str(tmp_path / "a.mp4")), settings, model)
    assert [row["clip"] for row in rows] == list(range(12))
    assert len(held) == 12
    assert max(held) <= 2


@pytest.mark.parametrize("words", ["CUDA out of memory. Tried to allocate", "can't allocate memory: you tried to allocate", None])
def test_an_item_that_runs_out_of_memory_fails_alone(clips, tokenizer, tmp_path, monkeypatch, words):
    encode = VideoTokenizer.encode

    def sometimes(self, video):
        if video.shape[2] == 1:  # the picture
            raise MemoryError if words is None else RuntimeError(words)
        return encode(self, video)

    monkeypatch.setattr(VideoTokenizer, "encode", sometimes)
    report = ingest([clips], tmp_path / "out", tokenizer, SETTINGS, max_failure_rate=0.5)
    assert (report["encoded"], report["reasons"]["out of memory"]) == (7, 1)
    with pytest.raises(RuntimeError, match="a bug"):
        ingest_item(Item("a", str(clips / "picture.png")), SETTINGS, _Broken.from_pretrained(tokenizer))


class _Broken(VideoTokenizer):
    def encode(self, video):
        raise RuntimeError("a bug")


def test_sizes_by_aspect_ratio():
    assert ClipSettings(size="256p").target(720, 1280) == (256, 448)
    assert ClipSettings(size="480p").target(1000, 1600) == (480, 768)
    with pytest.raises(UserError, match="size '512' is unknown; allowed: 256p, 384p, 480p"):
        ClipSettings(size="512").target(1, 1)


def test_rows_hold_codes_caption_and_source_of_a_clip(ingested, clips, tokenizer):
    rows = list(shards.read_shards(ingested))
    assert [row["id"] for row in rows] == [f"clips/{n}.mp4" for n in (0, 1, 2, 4, 5, 6, 7)] + ["clips/picture.png"]
    model = VideoTokenizer.from_pretrained(tokenizer)
    row = rows[3]
    frames, _ = read_video(clips / "4.mp4", fps=12, num_frames=5, start=row["start"], size=(16, 24))
    assert np.array_equal(row["codes"], model.encode(from_uint8(frames[None]))[0].numpy())
    assert (row["caption"], row["fps"], row["grid"], row["num_frames"]) == ("caption 4", 12, [2, 2, 3], 5)
    assert [row[name] for name in shards.ORIGIN] == [*read_video(clips / "4.mp4")[0].shape[1:3], 2.0]  # 24 fps
    picture = rows[-1]
    assert np.array_equal(picture["codes"], model.encode(from_uint8(read_image(clips / "picture.png")[None, None]))[0].numpy())
    assert (picture["num_frames"], picture["fps"], picture["grid"]) == (1, 1, [1, 2, 3])
    assert [picture[name] for name in shards.ORIGIN] == [*read_image(clips / "picture.png").shape[:2], 1.0]
    report = json.loads((ingested / "report.json").read_text())
    assert report["reasons"] == {"unreadable": 1, "too short": 1, "no caption": 1}
    assert {entry["id"] for entry in report["skipped"]} == {"clips/3.mp4", "clips/8.mp4", "clips/9.mp4"}
    assert (report["items"], report["encoded"], report["clips"]) == (11, 8, 8)


def test_shards_are_read_by_datasets(ingested, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = [str(path) for path in shards.shard_paths(ingested)]
    data = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
    assert data.features["codes"].feature.dtype == "uint16"
    assert [row["caption"] for row in data] == [row["caption"] for row in shards.read_shards(ingested)]


def test_a_second_run_does_nothing_and_new_clips_are_added(ingested, clips, tokenizer, tmp_path):
    out, source = tmp_path / "shards", tmp_path / "more" / "clips"
    shutil.copytree(ingested, out)
    shutil.copytree(clips, source)
    before = content(out)
    report = ingest([source], out, tokenizer, SETTINGS, shard_clips=3, max_failure_rate=0.5)
    assert report["new_items"] == 0
    assert content(out) == before
    shutil.copy(source / "0.mp4", source / "3.mp4")  # mended
    write_video(source / "new.mp4", moving(50, 24), 24)
    (source / "new.txt").write_text("new")
    report = ingest([source], out, tokenizer, SETTINGS, shard_clips=3, max_failure_rate=0.5, retry_skipped=True)
    assert (report["encoded"], report["reasons"]) == (10, {"too short": 1, "no caption": 1})
    ids = [row["id"] for row in shards.read_shards(out)]
    assert ids[-2:] == ["clips/3.mp4", "clips/new.mp4"]
    assert len(set(ids)) == len(ids)


def test_a_killed_ingest_continued_equals_an_uninterrupted_one(ingested, clips, tokenizer, tmp_path, forks):
    out = tmp_path / "shards"
    script = (
        "import os, signal, sys; from lumos.data.ingest.encode import ClipSettings; from lumos.data.ingest.ingest import ingest\n"
        "def on_item(done, skipped):\n"
        "    if done + skipped == 9: os.kill(os.getpid(), signal.SIGKILL)\n"
        "settings = ClipSettings(fps=12, size='16x24', num_frames=5)\n"
        "ingest([sys.argv[1]], sys.argv[2], sys.argv[3], settings, shard_clips=3, max_failure_rate=0.5, on_item=on_item)\n"
    )
    killed = forks.run(["-c", script, clips, out, tokenizer])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    half = content(out)
    assert set(half) == {"shard-000000.parquet", "shard-000001.parquet", "shards.jsonl", "skipped.jsonl"}
    with (out / "skipped.jsonl").open("a") as journal:
        journal.write('{"id": "clips/9.m')  # a kill in the middle of a line
    (out / ".shard-000002.parquet.1234.part").write_bytes(b"PAR1 half a shard")
    ingest([clips], out, tokenizer, SETTINGS, shard_clips=3, max_failure_rate=0.5)
    assert content(out) == content(ingested)


def test_killed_at_random_lines_no_clip_is_lost_or_doubled(ingested, clips, tokenizer, tmp_path, forks):
    script = Path(__file__).with_name("killed_ingest.py")
    done = forks.run([script, clips, tmp_path, tokenizer, 9, 3])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(f"ended with {-signal.SIGKILL}") >= 5, done.stdout
    whole = [row["id"] for row in shards.read_shards(ingested)]
    left = [[row["id"] for row in shards.read_shards(folder)] for folder in tmp_path.glob("*/killed-*")]
    assert all(ids == whole[: len(ids)] for ids in left)  # a shard that is there is whole and holds what it should
    assert len({len(ids) for ids in left}) > 1
    for number in range(3):
        assert content(tmp_path / str(number) / "out") == content(ingested)


@pytest.mark.slow
def test_several_processes_write_the_same_shards(ingested, clips, tokenizer, tmp_path):
    ingest([clips], tmp_path / "out", tokenizer, SETTINGS, shard_clips=3, max_failure_rate=0.5, workers=2)
    assert content(tmp_path / "out") == content(ingested)


def test_what_the_sources_lack_is_in_the_report(clips, tokenizer, tmp_path):
    source = tmp_path / "clips"
    source.mkdir()
    shutil.copy(clips / "0.mp4", source / "0.mp4")
    for name in ("0", "1"):
        (source / f"{name}.txt").write_text("a cat")
    said: list[str] = []
    report = ingest([source], tmp_path / "out", tokenizer, SETTINGS, warn=said.append)
    assert (report["encoded"], report["warnings"]) == (1, said)
    assert said == [f"{source} has 1 texts beside no picture or clip; the first is '1.txt'"]


def test_broken_files_of_all_kinds_among_good_ones(clips, tokenizer, tmp_path):
    """A broken file gives a clip or a line in the journal and never ends the run; all good files give clips."""
    source = tmp_path / "clips"
    source.mkdir()
    whole = (clips / "0.mp4").read_bytes()
    random = np.random.default_rng(0)
    for n in range(12):
        broken = bytearray(whole)
        if n < 8:  # bytes changed, first in few places, then in many
            for at in random.integers(0, len(broken), 4 ** (n // 2 + 1)):
                broken[at] = random.integers(0, 256)
        else:
            broken = (b"", b"a text", whole[: len(whole) // 3], whole[len(whole) // 10 :])[n - 8]
        (source / f"{n}-broken.mp4").write_bytes(broken)
        shutil.copy(clips / f"{n % 3}.mp4", source / f"{n}-good.mp4")
        for name in ("broken", "good"):
            (source / f"{n}-{name}.txt").write_text("text")
    report = ingest([source], tmp_path / "out", tokenizer, SETTINGS, max_failure_rate=0.5)
    done = [row["id"] for row in shards.read_shards(tmp_path / "out")]
    skipped = {entry["id"]: entry["reason"] for entry in report["skipped"]}
    assert {f"clips/{n}-good.mp4" for n in range(12)} <= set(done)
    assert sorted([*done, *skipped]) == sorted(f"clips/{n}-{name}.mp4" for n in range(12) for name in ("broken", "good"))
    assert [skipped[f"clips/{n}-broken.mp4"] for n in range(8, 12)] == ["unreadable"] * 4


def test_too_many_failures_exit_with_1_and_keep_good_clips(clips, tokenizer, tmp_path, capsys):
    command = ["ingest", str(clips), "--out", str(tmp_path / "out"), "--tokenizer", str(tokenizer), *FLAGS, "--workers", "0"]
    assert main([*command, "--max-failure-rate", "0.2"]) == 1
    assert "3 of 11 items gave no clip (" in capsys.readouterr().err
    assert len(list(shards.read_shards(tmp_path / "out"))) == 8
    assert json.loads((tmp_path / "out" / "report.json").read_text())["stopped"].startswith("3 of 11")
    assert main([*command, "--max-failure-rate", "0.3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["new_items"] == 0


def test_a_tokenizer_that_is_not_there_is_a_usage_error(clips, tmp_path, capsys):
    assert main(["ingest", str(clips), "--out", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "nowhere"), *FLAGS]) == 2
    assert f"no folder {tmp_path / 'nowhere'}: give a video tokenizer folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_settings_or_tokenizer_are_refused(ingested, clips, tokenizer, tmp_path):
    with pytest.raises(UserError, match="made with fps 12, not 8"):
        ingest([clips], ingested, tokenizer, ClipSettings(fps=8, size="16x24", num_frames=5))
    other = VideoTokenizer.from_pretrained(tokenizer)
    other.half().save_pretrained(tmp_path / "half")  # an export in half precision is no other tokenizer
    other.encoder.conv_in[0].conv3d.weight.data.add_(0.1)
    other.save_pretrained(tmp_path / "other")
    ingest([clips], ingested, tmp_path / "half", SETTINGS, max_failure_rate=0.5)
    with pytest.raises(UserError, match="made with another tokenizer"):
        ingest([clips], ingested, tmp_path / "other", SETTINGS)
    for wrong, words in (({"num_frames": 6}, "num_frames 6"), ({"size": "15x24"}, "multiples of 8"), ({"fps": 0}, "fps 0")):
        with pytest.raises(UserError, match=words):
            ingest([clips], tmp_path / "new", tokenizer, ClipSettings(**wrong))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="nothing to ingest"):
        ingest([tmp_path / "empty"], tmp_path / "new", tokenizer, SETTINGS)


def test_a_truncated_or_changed_shard_is_found(ingested, clips, tokenizer, tmp_path):
    out = tmp_path / "shards"
    shutil.copytree(ingested, out)
    path = shards.shard_paths(out)[1]
    whole = path.read_bytes()
    rows = shards.read_group(path, 0)
    path.write_bytes(whole[:-40])
    for use in (lambda: list(shards.read_shards(out)), lambda: ingest([clips], out, tokenizer, SETTINGS)):
        with pytest.raises(RunError, match=r"shard-000001\.parquet is damaged or cut off"):
            use()
    path.unlink()
    rows[0]["codes"] = (rows[0]["codes"] + 1) % 64
    shards.write_shard(out / "shard-000009.parquet", rows)
    with pytest.raises(RunError, match=r"the checksum of clips/4\.mp4 is wrong"):
        list(shards.read_shards(out))


def test_a_second_source_of_one_name_is_an_error_unless_moved(ingested, clips, tokenizer, tmp_path):
    out, other, moved = tmp_path / "shards", tmp_path / "b" / "clips", tmp_path / "c" / "clips"
    shutil.copytree(ingested, out)
    before = content(out)
    shutil.copytree(clips, moved, copy_function=shutil.copyfile)  # with new times
    write_video(other / "1.mp4", moving(77, 24), 24)
    (other / "1.txt").write_text("caption 1")
    (other / "0.mp4").write_bytes((clips / "9.mp4").read_bytes())
    (other / "0.txt").write_text("not yet known")
    with pytest.raises(UserError, match=r"b/clips/0\.mp4 would have the name clips/0\.mp4, which another file"):
        ingest([other], out, tokenizer, SETTINGS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ingest([moved], out, tokenizer, SETTINGS, max_failure_rate=0.5)["new_items"] == 0
    assert content(out) == before


def test_changed_files_and_captions_are_counted(ingested, clips, tokenizer, tmp_path, capsys):
    source, out = tmp_path / "clips", tmp_path / "shards"
    shutil.copytree(clips, source)
    command = ["ingest", str(source), "--out", str(out), "--tokenizer", str(tokenizer), *FLAGS, "--workers", "0"]
    command += ["--max-failure-rate", "0.5"]
    assert main(command) == 0
    (source / "0.txt").write_text("another caption")
    write_video(source / "1.mp4", moving(77, 24), 24)
    os.utime(source / "2.mp4")  # touched only
    (source / "9.txt").write_text("a caption at last")
    capsys.readouterr()
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "warning: 2 items changed (file or caption) since they were ingested, such as clips/0.mp4" in shown.err
    assert "warning: 1 items that were skipped changed since, such as clips/9.mp4; --retry-skipped" in shown.err
    (source / "captions.csv").write_text("path,caption\n4,given")
    assert main([*command, "--captions", str(source / "captions.csv")]) == 0
    assert "warning: 3 items changed" in capsys.readouterr().err


@pytest.mark.parametrize("lost", [[1], [0, 1], [2]])
def test_deleted_shards_are_filled_with_what_they_held(ingested, clips, tokenizer, tmp_path, lost):
    """The same holds with another shard size, because training runs identify the folder by names and digests."""
    out = tmp_path / "shards"
    shutil.copytree(ingested, out)
    before, known = content(out), ShardIndex(out).content
    for number in lost:
        (out / f"shard-{number:06d}.parquet").unlink()
    report = ingest([clips], out, tokenizer, SETTINGS, max_failure_rate=0.5, shard_clips=2)
    assert (report["encoded"], report["clips"], report["warnings"]) == (8, 8, [])
    assert ShardIndex(out).content == known
    assert all(content(out)[name] == data for name, data in before.items() if name.endswith("parquet"))


@pytest.mark.slow
def test_a_deleted_shard_keeps_its_number_for_its_own_items(ingested, clips, tokenizer, tmp_path):
    out, source = tmp_path / "shards", tmp_path / "a"
    shutil.copytree(ingested, out)
    source.mkdir()
    for n in (0, 1):
        write_video(source / f"{n}.mp4", moving(50 + n, 24), 24)
        (source / f"{n}.txt").write_text("new")
    known = content(out)
    (out / "shard-000001.parquet").unlink()
    with pytest.warns(UserWarning, match=r"shard-000001\.parquet is missing, and its 3 items are not in the sources"):
        ingest([source], out, tokenizer, SETTINGS, max_failure_rate=0.5)
    assert [path.name[8:12] for path in shards.shard_paths(out)] == ["0000", "0002", "0003"]
    ingest([clips], out, tokenizer, SETTINGS, max_failure_rate=0.5)
    assert content(out)["shard-000001.parquet"] == known["shard-000001.parquet"]
    (out / "shard-000000.parquet").unlink()
    changed = tmp_path / "clips"
    shutil.copytree(clips, changed)
    (changed / "1.mp4").unlink()
    with pytest.warns(UserWarning, match=r"shard-000000\.parquet differs from the shard that it replaces \(1 of its 3 items gave"):
        ingest([changed], out, tokenizer, SETTINGS, max_failure_rate=0.5)
    assert [row["id"] for row in shards.read_shards(out)][:3] == ["clips/0.mp4", "clips/2.mp4", "clips/4.mp4"]


def test_only_one_ingest_writes_into_a_folder(clips, tokenizer, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another ingest is writing"):
            ingest([clips], tmp_path / "out", tokenizer, SETTINGS)


def test_one_function_makes_shorter_clips_if_asked(clips, tokenizer):
    item = next(item for item in items([clips]) if item.id == "clips/8.mp4")
    found = list(_clips(item, Path(item.path), ClipSettings(fps=24, size="16x24", num_frames=5, min_frames=1), 4))
    assert [frames.shape[0] for _, frames, _ in found] == [1]
