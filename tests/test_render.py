"""`render`: clips with captions, as `ingest` takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lumos.cli import main
from lumos.evaluation.prompts import prompt_set
from lumos.evaluation.views import solid_set
from lumos.video.io import read_video
from lumos.video.reading import read_image


def test_clips_come_with_their_captions(tmp_path: Path, capsys):
    out = tmp_path / "clips"
    command = ["render", "--kind", "held_out", "--count", "3", "--seed", "5", "--num-frames", "5", "--out", str(out)]
    assert main(command) == 0
    wanted = list(prompt_set("held_out", 3, 5, num_frames=5, height=64, width=64, fps=8))
    assert [path.read_text().strip() for path in sorted(out.glob("*.txt"))] == [caption for caption, *_ in wanted]
    for path, (_, frames, _) in zip(sorted(out.glob("*.mp4")), wanted, strict=True):
        clip, fps = read_video(path)
        assert (clip.shape, fps) == ((5, 64, 64, 3), 8)
        assert np.abs(clip.astype(int) - frames).mean() < 6
    assert main(command) == 2
    assert "clips exists already" in capsys.readouterr().err


def test_a_clip_of_a_solid_is_its_views(tmp_path: Path):
    out = tmp_path / "clips"
    sheet = tmp_path / "sheet.png"
    command = ["render", "--kind", "held_out_solids", "--count", "2", "--seed", "5", "--out", str(out), "--sheet", str(sheet)]
    assert main(command) == 0
    assert read_image(sheet).shape[1] >= 7 * 96
    for number, (_, frames, _) in enumerate(solid_set("held_out_solids", 2, 5)):
        clip, _ = read_video(out / f"{number:05d}.mp4")
        assert clip.shape == (7, 64, 64, 3)
        assert np.abs(clip.astype(int) - frames).mean() < 6
        assert (out / f"{number:05d}.txt").read_text() == "\n"


def test_more_views_than_a_solid_has_are_refused(tmp_path: Path, capsys):
    assert main(["render", "--kind", "solids", "--num-frames", "8", "--out", str(tmp_path / "clips")]) == 2
    assert "a solid has 7 views" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [("--count", "0", "--count 0"), ("--kind", "shape", "shape"), ("--sheet", "x.jpg", "x.jpg must end in .png")],
)
def test_what_cannot_be_drawn(tmp_path: Path, capsys, option: str, value: str, error: str):
    assert main(["render", "--out", str(tmp_path / "clips"), option, value]) == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "clips").exists()


def test_fewer_scenes_than_were_asked_for_are_an_error(tmp_path: Path, monkeypatch, capsys):
    whole = prompt_set
    monkeypatch.setattr("lumos.evaluation.prompts.prompt_set", lambda kind, count, *a, **k: whole(kind, count - 1, *a, **k))
    assert main(["render", "--out", str(tmp_path / "clips"), "--count", "3", "--num-frames", "1"]) == 1
    assert "3 clips must be written, but there are 2 mp4 files" in capsys.readouterr().err
    assert not (tmp_path / "clips").exists()
