"""Batches, shards, resuming after a stop, and the manifest, with a generator that only records its requests."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumos.errors import RunError, UserError
from lumos.evaluation.manifest import differences, keep_manifest
from lumos.evaluation.prompt_lists import Entry
from lumos.evaluation.rendering import batches_of, seed_of
from lumos.files import file_sha256, folder_sha256
from lumos.prompt_lists import results as results_module
from lumos.prompt_lists.results import Results, check_made, parse_shard, render


def some_entries(counts, images=False):
    return [
        Entry(f"p{n}", tuple(f"p{n}-{i}.mp4" for i in range(count)), {}, f"caption {n}", "x.png" if images else None)
        for n, count in enumerate(counts)
    ]


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(1, 6), st.integers(1, 5), st.booleans())
def test_shards_share_the_batches_and_batches_the_samples(counts, size, shards, images):
    entries = some_entries(counts, images)
    batches = batches_of(entries, 3, size)
    assert [s.file for batch in batches for s in batch] == [file for e in entries for file in e.files]
    assert all(1 <= len(batch) <= size for batch in batches)
    assert all(s.seed == seed_of(3, s.file) for batch in batches for s in batch)
    if images:
        assert all(len({s.caption for s in batch}) == 1 for batch in batches)
    else:
        assert len(batches) == -(-sum(counts) // size)
    parts = [batches[k::shards] for k in range(shards)]
    assert sorted(s.file for part in parts for batch in part for s in batch) == sorted(f for e in entries for f in e.files)


def test_seeds_follow_from_the_name_alone():
    short, long = batches_of(some_entries([2]), 0, 5), batches_of(some_entries([3, 4]), 0, 2)
    assert short[0][1] == long[0][1]
    seeds = {seed_of(base, f"p-{i}.mp4") for base in range(3) for i in range(1000)}
    assert len(seeds) == 3000
    assert max(seeds) < 2**53


def draw(batch):
    return [np.full((1, 2, 2, 3), len(batch) * 16 + n, np.uint8) for n, _ in enumerate(batch)]


def save(path, sample, frames):
    path.write_bytes(f"{sample.seed} {sample.caption} ".encode() + frames.tobytes())


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def whole(tmp_path):
    """Batches of a list, and the files that one uninterrupted process makes of them."""
    batches = batches_of(some_entries([5, 3, 4]), 0, 5)
    assert render(Results(tmp_path / "whole", "videos"), batches, draw, save) == 12
    return batches, contents(tmp_path / "whole")


def test_shards_make_the_same_files(whole, tmp_path):
    batches, expected = whole
    for k in (2, 1):
        results = Results(tmp_path / "parts", "videos", (k, 2))
        render(results, batches[k - 1 :: 2], draw, save)
        missing = results.tidy([s.file for batch in batches for s in batch])
        assert missing == (len(batches[0::2][0]) + len(batches[0::2][1]) if k == 2 else 0)
    assert contents(tmp_path / "parts") == expected


@pytest.mark.parametrize("files_until_stop", range(12))
def test_a_stopped_run_goes_on_to_the_same_files(whole, files_until_stop, tmp_path):
    batches, expected = whole
    out, saved = tmp_path / "out", []

    def stop(path, sample, frames):
        path.write_bytes(b"half")
        if len(saved) == files_until_stop:
            raise KeyboardInterrupt
        save(path, sample, frames)
        saved.append(sample.file)

    with pytest.raises(KeyboardInterrupt):
        render(Results(out, "videos"), batches, draw, stop)
    assert b"half" not in contents(out / "videos").values()
    assert (out / ".unfinished").exists()
    results = Results(out, "videos")
    assert render(results, batches, draw, save) == 12 - files_until_stop
    assert results.tidy([s.file for batch in batches for s in batch]) == 0
    assert contents(out) == expected


def test_a_missing_file_makes_its_whole_batch_again(whole, tmp_path):
    batches, expected = whole
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    (tmp_path / "out" / "videos" / "p0-3.mp4").unlink()
    asked = []
    made = render(Results(tmp_path / "out", "videos"), batches, lambda batch: asked.append(len(batch)) or draw(batch), save)
    assert (made, asked) == (1, [5])
    assert contents(tmp_path / "out") == expected


def test_leftovers_of_another_split_are_removed_at_the_end(whole, tmp_path):
    batches, expected = whole
    left = tmp_path / "out" / ".unfinished" / "3-of-4"
    left.mkdir(parents=True)
    (left / "x.mp4").touch()
    results = Results(tmp_path / "out", "videos", (1, 1))
    render(results, batches[:1], draw, save)
    assert results.tidy([s.file for batch in batches for s in batch]) == 7
    assert left.exists()  # its process may be at work
    render(results, batches, draw, save)
    results.tidy([s.file for batch in batches for s in batch])
    assert contents(tmp_path / "out") == expected


def test_a_full_disk_is_an_error_with_a_name(tmp_path):
    def full(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"cannot write .*a.mp4: No space left on device"):
        Results(tmp_path, "videos").put("a.mp4", full)


def test_names_differing_in_case_need_a_case_sensitive_disk(tmp_path, monkeypatch):
    results = Results(tmp_path, "videos")
    results.check_case(["A cat-0.mp4", "a cat-0.mp4"])
    assert list(tmp_path.iterdir()) == [results.folder]
    monkeypatch.setattr(results_module, "ignores_case", lambda folder: True)
    results.check_case(["a cat-0.mp4", "a dog-0.mp4"])
    with pytest.raises(UserError, match=r"'A cat-0.mp4' and 'a cat-0.mp4' are one file"):
        results.check_case(["A cat-0.mp4", "a cat-0.mp4"])


def test_shards_by_hand_and_by_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert parse_shard(None) == (1, 1)
    assert parse_shard("2/4") == (2, 4)
    for wrong in ("0/4", "5/4", "2", "a/b", "-1/2", "1/0", "2/4/8", ""):
        with pytest.raises(UserError, match="is not allowed; give the part and the number of parts"):
            parse_shard(wrong)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    assert parse_shard(None) == (3, 3)
    with pytest.raises(UserError, match="a launcher started 3 processes"):
        parse_shard("1/2")


INPUTS = {"seed": 0, "settings": {"steps": 5}, "seeds": {f"{i}.mp4": i for i in range(9)}}


def test_the_manifest_is_kept_and_compared(tmp_path):
    out = tmp_path / "out"
    keep = lambda inputs, around: keep_manifest(out, out / "videos", inputs, around)  # noqa: E731
    assert keep({"seed": 9}, {}) == []  # nothing came of it
    assert keep(INPUTS, {"versions": {"torch": "2.13"}, "path": tmp_path}) == []
    (out / "videos").mkdir()
    (out / "videos" / "0.mp4").touch()
    before = (out / "manifest.json").read_bytes()
    assert json.loads(before)["inputs"] == INPUTS
    assert keep(INPUTS, {"versions": {"torch": "2.14"}, "path": tmp_path}) == ["versions.torch was 2.13, now 2.14"]
    with pytest.raises(UserError, match=r"begun with other inputs: seed was 0, now 1; settings.steps was 5, now 6; choose"):
        keep({**INPUTS, "seed": 1, "settings": {"steps": 6}}, {})
    with pytest.raises(UserError, match="and 5 more"):
        keep({**INPUTS, "seeds": {}}, {})
    assert (out / "manifest.json").read_bytes() == before
    (out / "manifest.json").write_text("{")
    with pytest.raises(RunError, match="is damaged"):
        keep(INPUTS, {})
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"holds files, but no .*manifest.json says what made them"):
        keep(INPUTS, {})


def test_differences_list_added_and_removed_values():
    assert differences({"a": 1, "b": {"c": 2}}, {"b": {"d": 3}}) == [
        "a was 1, now None", "b.c was 2, now None", "b.d was None, now 3"
    ]  # fmt: skip


def test_hashes(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "model.safetensors").write_bytes(b"weights")
    assert file_sha256(folder / "config.json") == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    first = folder_sha256(folder)
    (folder / "README.md").write_text("more")
    assert folder_sha256(folder) == first
    shutil.copytree(folder, tmp_path / "copy")
    assert folder_sha256(tmp_path / "copy") == first
    (folder / "sub" / "model.safetensors").write_bytes(b"other")
    assert folder_sha256(folder) != first
    (tmp_path / "copy" / "sub" / "model.safetensors").rename(tmp_path / "copy" / "model.safetensors")
    assert folder_sha256(tmp_path / "copy") != first
    only = [folder / "config.json"]
    assert folder_sha256(folder, only) == folder_sha256(folder, only * 2) != folder_sha256(folder)


def test_files_that_are_not_there_in_the_end_are_an_error(tmp_path):
    results = Results(tmp_path, "videos")
    for file in ("a.mp4", "b.mp4"):
        results.put(file, lambda path: path.write_bytes(b"x"))
    check_made(results, ["a.mp4", "b.mp4"])
    check_made(results, ["a.mp4", "c.mp4"], {"c.mp4"})
    with pytest.raises(RunError, match=r"2 of 3 files that were to be made are not in .*videos, 'c\.mp4' first"):
        check_made(results, ["a.mp4", "c.mp4", "d.mp4"])
