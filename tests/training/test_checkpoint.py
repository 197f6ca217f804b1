from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lumos.errors import RunError
from lumos.training import checkpoint


def write(root: Path, step: int, keep_last: int = 9) -> Path:
    checkpoint.begin(root, step)
    folder = checkpoint.writing_folder(root, step)
    checkpoint.save_tensors(folder, 0, {"model.a": torch.full((4,), float(step))})
    return checkpoint.finish(root, folder, step, {"note": "x"}, keep_last)


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


def test_round_trip(tmp_path: Path):
    folder = write(tmp_path, 3)
    found, state = checkpoint.latest(tmp_path)
    assert (found, state["step"], state["note"]) == (folder, 3, "x")
    assert checkpoint.load_tensors(found, 0)["model.a"].tolist() == [3.0] * 4


def test_none_at_all(tmp_path: Path):
    assert checkpoint.latest(tmp_path / "nothing") is None
    checkpoint.begin(tmp_path, 5)  # a kill before the rename
    assert checkpoint.latest(tmp_path) is None


def test_only_the_newest_are_kept_and_left_overs_go(tmp_path: Path):
    checkpoint.begin(tmp_path, 1)
    for step in (2, 10, 9):
        write(tmp_path, step, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000009", "step-00000010"]


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, remove_a_file, spoil_the_state, empty_the_state])
def test_a_damaged_one_falls_back_loudly(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage):
    write(tmp_path, 1)
    damage(write(tmp_path, 2))
    folder, state = checkpoint.latest(tmp_path)
    assert (folder.name, state["step"]) == ("step-00000001", 1)
    assert "step-00000002" in capsys.readouterr().err
    damage(folder)
    with pytest.raises(RunError, match="move the folder away"):
        checkpoint.latest(tmp_path)


def test_views_are_stored_whole(tmp_path: Path):
    base = torch.arange(6.0)
    checkpoint.save_tensors(tmp_path, 0, {"a": base[:3], "b": base[3:], "c": base.view(2, 3).T})
    loaded = checkpoint.load_tensors(tmp_path, 0)
    assert loaded["a"].tolist() == [0, 1, 2]
    assert loaded["b"].tolist() == [3, 4, 5]
    assert loaded["c"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_random_state_comes_back():
    state = checkpoint.random_state()
    first = torch.rand(3)
    checkpoint.set_random_state(state)
    assert torch.equal(torch.rand(3), first)
