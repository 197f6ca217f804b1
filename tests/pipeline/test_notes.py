"""Notes on requests that can be met but whose clips may be poor."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from lumos import VideoPipeline
from lumos.cli import main
from lumos.data.seeding import VALIDATION_SEED
from lumos.data.synthetic.sampling import SyntheticScenes
from lumos.data.trained_on import TrainedOn, read_trained_on
from lumos.pipeline.defaults import ClipDefaults
from lumos.pipeline.notes import picture_note, psnr, size_note
from lumos.pipeline.request import Request
from lumos.video.io import write_video

KNOWN = TrainedOn.of(["a red circle moves left"], {"shapes": ["circle"]})


@pytest.fixture(scope="module")
def known_folder(micro_folder: Path, tmp_path_factory) -> Path:
    """The micro model with a record of its training data."""
    folder = tmp_path_factory.mktemp("known") / "micro"
    pipe = VideoPipeline.from_pretrained(micro_folder, device="cpu")
    pipe.trained_on = KNOWN
    pipe.save_pretrained(folder)
    return folder


def notes_of(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


def test_unknown_words_get_one_note_and_known_ones_none(known_folder: Path, micro_folder: Path):
    pipe = VideoPipeline.from_pretrained(known_folder, device="cpu")
    assert pipe.trained_on == KNOWN
    assert notes_of(lambda: pipe.resolve(Request.of("A red circle moves left"))) == []
    (note,) = notes_of(lambda: pipe.resolve(Request.of(["a purple circle", "a purple hexagon"])))
    assert "'purple', 'hexagon'" in note
    (note,) = notes_of(lambda: pipe.resolve(Request.of("a red circle", later_prompts=[(1, "it jumps")])))
    assert "'it', 'jumps'" in note
    silent = VideoPipeline.from_pretrained(micro_folder, device="cpu")
    assert notes_of(lambda: silent.resolve(Request.of("a purple hexagon"))) == []


def test_the_note_is_on_stderr_and_in_the_record(known_folder: Path, tmp_path: Path, capsys):
    out = tmp_path / "out.mp4"
    assert main(["generate", "--model", str(known_folder), "--prompt", "a purple circle", "--output", str(out)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(said) == 1
    assert json.loads(Path(f"{out}.json").read_text())["notes"] == [said[0].removeprefix("note: ")]
    prompts = tmp_path / "list.txt"
    prompts.write_text("a red circle\na purple circle\n")
    assert main(["generate", "--model", str(known_folder), "--prompts", str(prompts), "--output-dir", str(tmp_path / "o")]) == 0
    assert capsys.readouterr().err.count("'purple'") == 1
    records = [json.loads(file.read_text()) for file in sorted((tmp_path / "o").glob("*.json"))]
    assert [len(record["notes"]) for record in records] == [0, 1]


@pytest.mark.parametrize(
    ("size", "usual", "is_far"),
    [
        ((128, 128), (128, 128, None), False),
        ((160, 128), (128, 128, None), False),
        ((256, 256), (128, 128, None), True),
        ((64, 64), (128, 128, None), True),
        ((64, 256), (128, 128, None), True),
        ((1008, 288), (384, 672, 528), False),
        ((1024, 1024), (384, 672, 528), True),
    ],
)
def test_sizes_far_from_the_training_are_said(size, usual, is_far):
    note = size_note(ClipDefaults(5, *size, 8, None), ClipDefaults(5, *usual[:2], 8, usual[2]))
    assert (note is not None) == is_far
    assert note is None or f"{size[1]} x {size[0]}" in note


def test_a_picture_unlike_those_of_training_gets_a_note():
    picture = np.full((8, 8, 3), 100, np.uint8)
    shifted = {2: 42.1, 20: 22.1}  # error of each value -> PSNR in dB
    for error, expected in shifted.items():
        assert psnr(picture, picture + np.uint8(error)) == pytest.approx(expected, abs=0.05)
        note = picture_note([picture], 30.0, lambda frames, error=error: frames + np.uint8(error))
        assert (note is not None) == (error == 20)
    assert picture_note([], 30.0, lambda frames: frames) is None
    assert picture_note([picture], 23.0, lambda frames: frames + np.uint8(20)) is None  # less than the margin below


@pytest.mark.slow
def test_photographs_get_a_note_and_pictures_of_scenes_do_not(repo: Path):
    data = pytest.importorskip("skimage.data")
    pipe = VideoPipeline.from_pretrained(repo / "checkpoints" / "lumos-tiny", device="cpu")
    scenes = SyntheticScenes(kinds=("shapes", "digits", "sprites"), seed=VALIDATION_SEED + 1, num_frames=1, height=128, width=128)

    def said(picture: np.ndarray) -> list[str]:
        return notes_of(lambda: pipe.check_pictures(pipe.resolve(Request.of("a red circle moves left", image=picture))))

    assert [said(scenes[index][0][0]) for index in range(24)] == [[]] * 24
    for photograph in (data.astronaut(), data.coffee(), data.chelsea()):
        (note,) = said(photograph)
        assert "another kind" in note


def test_info_shows_what_a_model_is(known_folder: Path, micro_folder: Path, capsys):
    assert main(["info", str(known_folder)]) == 0
    text = capsys.readouterr().out
    assert "lumos1" in text
    assert "shapes      circle" in text
    assert main(["info", str(known_folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trained_on"]["words"] == sorted(KNOWN.words)
    assert found["clip"]["num_frames"] == 5
    pipe = VideoPipeline.from_pretrained(known_folder, device="cpu")
    assert found["parameters"] == sum(p.numel() for p in pipe.model.parameters())
    assert main(["info", str(micro_folder)]) == 0
    assert "not known" in capsys.readouterr().out
    assert main(["info", "nowhere"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_model_folder_without_weights_is_refused(known_folder: Path, tmp_path: Path, capsys):
    """As a download that broke off leaves it."""
    shutil.copytree(known_folder, tmp_path / "half", ignore=shutil.ignore_patterns("model*.safetensors"))
    write_video(tmp_path / "a.mp4", np.zeros((9, 16, 16, 3), np.uint8), 8)
    for words in (["info"], ["finetune", str(tmp_path / "a.mp4"), "--caption", "x", "--out", str(tmp_path / "out"), "--model"]):
        assert main([*words, str(tmp_path / "half")]) == 2
        assert "half has no weights: there is no *.safetensors in it; download or copy" in capsys.readouterr().err


def test_a_folder_of_other_data_is_not_described(known_folder: Path, capsys):
    assert main(["info", str(known_folder), "--write-trained-on"]) == 2
    assert "training.json" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lumos-tiny", "stiv-tiny"])
def test_the_shipped_models_say_what_the_command_writes(repo: Path, name: str):
    from lumos.commands.info import trained_on_scenes

    stored = read_trained_on(repo / "checkpoints" / name)
    found = trained_on_scenes(repo / "checkpoints" / name)
    assert (stored.words, stored.lists) == (found.words, found.lists)
    assert stored.picture_psnr == pytest.approx(found.picture_psnr, abs=0.2)


def test_old_lists_do_not_stay_in_a_folder(known_folder: Path, tmp_path: Path):
    pipe = VideoPipeline.from_pretrained(known_folder, device="cpu")
    pipe.save_pretrained(tmp_path / "m")
    assert read_trained_on(tmp_path / "m") == KNOWN
    pipe.trained_on = None
    pipe.save_pretrained(tmp_path / "m")
    assert read_trained_on(tmp_path / "m") is None
