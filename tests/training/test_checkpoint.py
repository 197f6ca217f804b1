from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumos.errors import RunError, UserError
from lumos.settings import to_plain
from lumos.training import checkpoint
from lumos.training.sections import StageSettings


def write(root: Path, step: int, keep_last: int = 9, keep_every: int = 0) -> Path:
    checkpoint.begin(root, step)
    folder = checkpoint.writing_folder(root, step)
    written = checkpoint.save_tensors(folder, 0, {checkpoint.key("weight", "a", 0): torch.full((4,), float(step))})
    return checkpoint.finish(root, folder, step, {"note": "x"}, [written], keep_last=keep_last, keep_every=keep_every)


def truncate(folder: Path) -> None:
    file = checkpoint.tensor_file(folder, 0)
    file.write_bytes(file.read_bytes()[:-3])


def flip_a_bit(folder: Path) -> None:
    file = checkpoint.tensor_file(folder, 0)
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)


def remove_a_file(folder: Path) -> None:
    checkpoint.tensor_file(folder, 0).unlink()


def spoil_the_state(folder: Path) -> None:
    (folder / checkpoint.STATE).write_text('{"format": 1, ')


def empty_the_state(folder: Path) -> None:
    (folder / checkpoint.STATE).write_text("[]")


def read(folder: Path) -> dict:
    return json.loads((folder / checkpoint.STATE).read_text())


def rewrite(folder: Path, sealed: bool = True, **changes: object) -> None:
    """Change the state. sealed: with a matching checksum, as if a version of the program had written it."""
    state = {**read(folder), **changes}
    if sealed and state["format"] == checkpoint.FORMAT:
        state.pop(checkpoint.CHECKSUM)
        state[checkpoint.CHECKSUM] = checkpoint._checksum(state)
    (folder / checkpoint.STATE).write_text(json.dumps(state))


def make_old(folder: Path) -> None:
    """As earlier versions wrote it."""
    state = {**read(folder), "format": 2}
    del state[checkpoint.CHECKSUM]
    (folder / checkpoint.STATE).write_text(json.dumps(state))


def change_the_note(folder: Path) -> None:
    rewrite(folder, sealed=False, note="y")


def drop_the_checksum(folder: Path) -> None:
    state = read(folder)
    del state[checkpoint.CHECKSUM]
    (folder / checkpoint.STATE).write_text(json.dumps(state))


def add_a_file(folder: Path) -> None:
    shutil.copy(checkpoint.tensor_file(folder, 0), checkpoint.tensor_file(folder, 1))


def make_a_pipe(folder: Path) -> None:
    (folder / checkpoint.STATE).unlink()
    os.mkfifo(folder / checkpoint.STATE)


MISFITS = [
    {"step": 7}, {"step": True}, {"step": "2"}, {"step": -2}, {"step": None}, {"step": 2.0}, {"files": {}}, {"files": []},
    {"files": None}, {"world": 2}, {"world": 0}, {"world": "1"}, {"world": 10**9}, {"files": {"rank-0000.safetensors": [1]}},
    {"files": {"rank-0000.safetensors": 7}}, {"files": {"../step-00000001/rank-0000.safetensors": [1, 2]}}, {"format": 4},
    {"format": None}, {"format": [3]},
]  # fmt: skip


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("misfit", MISFITS, ids=str)
def test_a_state_that_does_not_fit_is_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture, misfit: dict, old: bool):
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    if old:
        make_old(folder)
    rewrite(folder, **misfit)
    assert checkpoint.latest(tmp_path)[0].name == "step-00000001"
    assert "warning: checkpoint" in caplog.text


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path: Path):
    folder = write(tmp_path, 2)
    make_old(folder)
    assert checkpoint.latest(tmp_path)[1]["note"] == "x"
    rewrite(folder, world=3, meters={}, settings={})  # of a tokenizer's training with its own loop
    with pytest.raises(UserError, match=r"written by an earlier version.*name another output_dir"):
        checkpoint.latest(tmp_path)


def test_a_checkpoint_under_another_steps_name_is_damaged(tmp_path: Path):
    write(tmp_path, 2)
    write(tmp_path, 4).rename(tmp_path / "step-00000009")
    assert checkpoint.latest(tmp_path)[1]["step"] == 2


def test_a_state_without_what_a_run_needs_is_damaged(tmp_path: Path):
    write(tmp_path, 2)
    with pytest.raises(RunError, match="no checkpoint"):
        checkpoint.latest(tmp_path, fields=checkpoint.RUN_FIELDS)
    assert checkpoint.latest(tmp_path, fields={"note": str})[1]["step"] == 2


def test_good_checkpoints_of_later_steps_are_never_renamed(tmp_path: Path):
    """The checkpoints could not be read for a moment when the run began."""
    for step in (10, 20, 30):
        write(tmp_path, step)
    truncate(checkpoint.checkpoint_folder(tmp_path, 20))
    for step in (11, 12, 13):
        write(tmp_path, step, keep_last=2)
    assert [checkpoint.step_of(folder) for folder in checkpoint.list_checkpoints(tmp_path)] == [12, 13, 30]
    assert [path.name for path in tmp_path.glob("damaged-*")] == ["damaged-step-00000020"]


def test_files_and_links_in_the_way_do_not_stop_saving(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    root = tmp_path / "checkpoints"
    write(root, 1).rename(tmp_path / "moved")
    (root / "step-00000001").symlink_to(tmp_path / "moved")
    (root / ".writing-notes").write_text("a file")
    (root / ".writing-link").symlink_to(tmp_path / "elsewhere")
    (root / ".writing-00000002").write_text("a file")
    (root / "step-00000002").write_text("a file")
    (root / "step-\u00b2").mkdir()
    (root / "step-00000003").mkdir()
    (root / "damaged-step-00000003").write_text("a file")
    write(root, 2, keep_last=1)
    assert sorted(path.name for path in root.iterdir()) == ["damaged-step-00000003", "step-00000002", "step-\u00b2"]
    assert (tmp_path / "elsewhere" / "kept").exists()
    assert (tmp_path / "moved" / checkpoint.STATE).exists()


def test_a_checkpoint_is_on_the_disk_before_it_is_visible(tmp_path: Path, disk):
    for step in (2, 2, 3):
        write(tmp_path / "checkpoints", step)
    disk.check_renames()


def test_a_checkpoint_is_readable_as_the_umask_says(tmp_path: Path):
    assert {path.stat().st_mode & 0o777 for path in write(tmp_path, 2).iterdir()} == {0o666 & ~os.umask(os.umask(0o022))}


def test_round_trip(tmp_path: Path):
    folder = write(tmp_path, 3)
    found, state = checkpoint.latest(tmp_path)
    assert (found, state["step"], state["note"]) == (folder, 3, "x")
    assert checkpoint.Stored(found).read("weight", "a", 0, 4).tolist() == [3.0] * 4


def test_a_save_after_a_fallback_sets_damaged_ones_aside(tmp_path: Path):
    for step in (10, 20, 30):
        write(tmp_path, step)
    for step in (20, 30):
        truncate(checkpoint.checkpoint_folder(tmp_path, step))
    assert checkpoint.latest(tmp_path)[1]["step"] == 10
    write(tmp_path, 15, keep_last=2)
    assert [checkpoint.step_of(folder) for folder in checkpoint.list_checkpoints(tmp_path)] == [10, 15]
    assert checkpoint.latest(tmp_path)[1]["step"] == 15
    assert sorted(path.name for path in tmp_path.glob("damaged-*")) == ["damaged-step-00000020", "damaged-step-00000030"]
    write(tmp_path, 20, keep_last=1)
    assert [checkpoint.step_of(folder) for folder in checkpoint.list_checkpoints(tmp_path)] == [20]


def test_a_folder_without_checkpoints_has_no_latest(tmp_path: Path):
    assert checkpoint.latest(tmp_path / "nothing") is None
    checkpoint.begin(tmp_path, 5)  # a kill before the rename
    assert checkpoint.latest(tmp_path) is None


def test_only_the_newest_are_kept_and_left_overs_go(tmp_path: Path):
    checkpoint.begin(tmp_path, 1)
    for step in (2, 9, 10):
        write(tmp_path, step, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000009", "step-00000010"]


def test_checkpoints_at_multiples_of_keep_every_stay(tmp_path: Path):
    for step in range(2, 16, 2):
        write(tmp_path, step, keep_last=2, keep_every=4)
    assert [checkpoint.step_of(p) for p in checkpoint.list_checkpoints(tmp_path)] == [4, 8, 12, 14]


@pytest.mark.parametrize("damage", [
    truncate, flip_a_bit, remove_a_file, spoil_the_state, empty_the_state, change_the_note, drop_the_checksum, add_a_file,
    make_a_pipe,
])  # fmt: skip
def test_a_damaged_one_falls_back_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage):
    write(tmp_path, 1)
    damage(write(tmp_path, 2))
    folder, state = checkpoint.latest(tmp_path)
    assert (folder.name, state["step"]) == ("step-00000001", 1)
    assert "step-00000002" in caplog.text
    damage(folder)
    with pytest.raises(RunError, match="move the folder away"):
        checkpoint.latest(tmp_path)


def test_views_are_stored_whole(tmp_path: Path):
    base = torch.arange(6.0)
    checkpoint.save_tensors(tmp_path, 0, {"a": base[:3], "b": base[3:], "c": base.view(2, 3).T})
    loaded = checkpoint.Stored(tmp_path).own(0)
    assert loaded["a"].tolist() == [0, 1, 2]
    assert loaded["b"].tolist() == [3, 4, 5]
    assert loaded["c"].tolist() == [[0, 3], [1, 4], [2, 5]]


@given(st.integers(1, 40), st.data())
@settings(deadline=None, max_examples=30)
def test_any_range_of_values_is_read_from_any_split(count: int, data: st.DataObject):
    """Any part of a parameter that is split at random over files equals that part of the whole tensor."""
    cuts = sorted(data.draw(st.sets(st.integers(1, count), max_size=5)) | {0, count})
    whole = torch.randn(count)
    with tempfile.TemporaryDirectory() as folder:
        for rank, (low, high) in enumerate(itertools.pairwise(cuts)):
            checkpoint.save_tensors(Path(folder), rank, {checkpoint.key("weight", "a.b", low): whole[low:high]})
        stored = checkpoint.Stored(Path(folder))
        start = data.draw(st.integers(0, count))
        length = data.draw(st.integers(0, count - start))
        assert torch.equal(stored.read("weight", "a.b", start, length), whole[start : start + length])
        with pytest.raises(RunError, match=rf"{count} of the {count + 1} values of weight a\.b"):
            stored.read("weight", "a.b", 0, count + 1)
        with pytest.raises(RunError, match="0 of the 1 values of exp_avg"):
            stored.read("exp_avg", "a.b", 0, 1)


@pytest.mark.parametrize("parts", [[(0, 5), (0, 5)], [(0, 6), (5, 10)], [(0, 10), (0, 10)], [(5, 10)], [(0, 5), (6, 10)]])
def test_values_that_are_missing_or_there_twice_are_an_error(tmp_path: Path, parts: list[tuple[int, int]]):
    """This holds also if as many values are stored twice as are missing."""
    for rank, (low, high) in enumerate(parts):
        checkpoint.save_tensors(tmp_path, rank, {checkpoint.key("weight", "a", low): torch.arange(float(low), high)})
    with pytest.raises(RunError, match="of weight a"):
        checkpoint.Stored(tmp_path).read("weight", "a", 0, 10)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"a": [6]}, "has 2 tensors of weight, the model 1: it has b"),
        ({"a": [6], "b": [2], "c": [1]}, "has 2 tensors of weight, the model 3: it lacks c"),
        ({"a": [6], "b": [1]}, "has 2 values of weight b, the model 1"),
        ({"a": [6], "b": [3]}, "2 of the 3 values of weight b are there"),
    ],
)
def test_reading_a_whole_checkpoint_needs_matching_shapes(tmp_path: Path, shapes: dict[str, list[int]], words: str):
    tensors = {"a": torch.arange(6.0), "b": torch.arange(2.0)}
    checkpoint.save_tensors(tmp_path, 0, {checkpoint.key("weight", name, 0): values for name, values in tensors.items()})
    stored = checkpoint.Stored(tmp_path)
    whole = stored.read_whole("weight", {"a": torch.Size([2, 3]), "b": torch.Size([2])})
    assert torch.equal(whole["a"], tensors["a"].view(2, 3))
    with pytest.raises(RunError, match=words):
        stored.read_whole("weight", {name: torch.Size(shape) for name, shape in shapes.items()})


def test_processes_come_to_one_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Each of two processes checks its share of the files; both skip a checkpoint that one of them finds damaged."""
    write(tmp_path, 1)
    truncate(write(tmp_path, 2))
    damaged = checkpoint.read_state(tmp_path / "step-00000002", rank=1, world=2)  # the only file is in the other's share
    assert damaged["step"] == 2
    asked = []

    def any_of(mine: bool) -> bool:
        asked.append(mine)
        return mine or len(asked) == 1  # the other process found the first one damaged

    assert checkpoint.latest(tmp_path, 1, 2, any_of)[1]["step"] == 1
    assert asked == [False, False]


def test_random_state_comes_back():
    state = checkpoint.random_state()
    first = torch.rand(3)
    checkpoint.set_random_state(state)
    assert torch.equal(torch.rand(3), first)
    checkpoint.set_random_state({})


def test_a_stage_field_that_an_old_checkpoint_lacks_is_default():
    before = {"steps": None, "image_share": 0.5, "batch_size": None, "image_batch_size": None}
    state = {"identity": {"data.stages": [before]}, "step": 1}

    def check(**fields: object) -> None:
        now = {"data.stages": [to_plain(StageSettings(image_share=0.5, **fields))]}
        checkpoint.check_fits(Path("step-1"), state, identity=now, max_steps=2)

    check()
    with pytest.raises(UserError, match=r"is of another run: data.stages was .*'first_frames': None.*'first_frames': 5"):
        check(first_frames=5)


def test_later_and_unreadable_checkpoints_are_never_renamed(tmp_path: Path, monkeypatch):
    for step in (10, 20, 30):
        write(tmp_path, step)
    rewrite(checkpoint.checkpoint_folder(tmp_path, 20), format=checkpoint.FORMAT + 1)
    unreadable = checkpoint.checkpoint_folder(tmp_path, 30)
    make_a_pipe(unreadable)
    write(tmp_path, 11)
    assert [checkpoint.step_of(folder) for folder in checkpoint.list_checkpoints(tmp_path)] == [10, 11, 20, 30]


def test_warnings_about_checkpoints_escape_control_characters(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    root = tmp_path / "\x1b[31mrun"
    write(root, 1)
    truncate(write(root, 2))
    checkpoint.latest(root)
    said = caplog.text
    assert "trying the checkpoint before it" in said
    assert "\x1b" not in said
