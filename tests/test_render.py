"""`render`: clips with captions, as `ingest` takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lumos.cli import main
from lumos.evaluation.prompts import prompt_set
from lumos.video.io import read_video


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


@pytest.mark.parametrize(("option", "value", "error"), [("--count", "0", "--count 0"), ("--kind", "shape", "shape")])
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
