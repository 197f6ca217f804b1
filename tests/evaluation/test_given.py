"""`evaluate prompts --given` and `evaluate views`: given frames, measurements and refusals."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from micro_stiv import micro_pipeline

from lumos.cli import main
from lumos.errors import UserError
from lumos.evaluation.given import GIVEN, blended, given_numbers, is_kept, made_quality
from lumos.models.stiv.patterns import given_frames


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stiv")
    micro_pipeline().save_pretrained(folder)
    return folder


def clip(*levels: int) -> np.ndarray:
    return np.stack([np.full((8, 8, 3), level, np.uint8) for level in levels])


@pytest.mark.parametrize("pattern", GIVEN)
def test_patterns_are_those_that_stiv_trains_on(pattern):
    assert set(given_numbers(pattern, 17)) == given_frames(pattern, 17, "per_frame")


def test_prediction_from_causal_latents_gives_whole_ones():
    assert given_numbers("prediction", 17, 4) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("pattern", "frames", "said"), [
    ("middle", 17, "allowed: first, prediction, ends, interpolation"), ("ends", 1, "too short"), ("ends", 2, "too short"),
    ("prediction", 4, "too short"), ("interpolation", 16, "16 is even"), ("interpolation", 1, "too short"),
    ("first", 1, "too short"),
])  # fmt: skip
def test_patterns_that_do_not_fit_are_refused(pattern, frames, said):
    with pytest.raises(UserError, match=said):
        given_numbers(pattern, frames)


def test_blends_are_linear_between_given_frames():
    assert blended(clip(9, 10, 90, 30, 7), [1, 3])[:, 0, 0, 0].tolist() == [10, 10, 20, 30, 30]
    assert np.array_equal(blended(clip(1, 5, 3), [0, 1, 2]), clip(1, 5, 3))


def test_quality_counts_only_frames_that_are_made():
    truth = [clip(0, 10, 20, 30, 40)]
    made = [clip(255, 10, 255, 30, 255)]
    assert made_quality(made, truth, [0, 2, 4], truth) == {"psnr": 100.0, "psnr_blend": 100.0, "psnr_reconstruction": 100.0}
    off = [clip(0, 20, 20, 40, 40)]
    assert made_quality(off, truth, [0, 2, 4], off)["psnr_reconstruction"] == pytest.approx(20 * np.log10(255 / 10), abs=1e-3)


def test_a_clip_that_stands_still_does_not_outweigh_the_others():
    still, moving = clip(5, 5, 5), clip(0, 90, 0)
    found = made_quality([still + 6, moving], [still, moving], [0, 2], [still, moving])
    assert found["psnr"] == pytest.approx(20 * np.log10(255 / 6) + 10 * np.log10(2), abs=1e-3)
    assert found["psnr_blend"] == pytest.approx(20 * np.log10(255 / 90) + 10 * np.log10(2), abs=1e-3)


def test_a_given_picture_is_kept_or_not():
    picture = np.full((8, 8, 3), 100, np.uint8)
    assert is_kept(picture + 2, picture)
    assert not is_kept(picture - 3, picture)


@pytest.mark.parametrize("pattern", ["prediction", "ends", "interpolation"])
def test_prompts_are_judged_with_given_frames(folder, tmp_path, capsys, pattern):
    file = tmp_path / "r.json"
    call = ["evaluate", "prompts", "--model", str(folder), "--count", "2", "--given", pattern, "--output", str(file)]
    assert main([*call, "--image-to-video"]) == 2
    assert main(call) == 0, capsys.readouterr().err
    written = json.loads(file.read_text())
    assert (written["given"], written["image_to_video"]) == (pattern, False)
    assert written["shares"]["one"]["given_frames"] == 1.0
    found = written["shares"]["one"]
    assert found["psnr"] < found["psnr_blend"] == pytest.approx(30, abs=20)
    assert 0 < found["psnr_reconstruction"] < 100


def test_lumos1_says_which_frames_it_does_not_take(micro_folder, capsys):
    assert main(["evaluate", "prompts", "--model", str(micro_folder), "--count", "1", "--given", "ends"]) == 2
    assert "given_frames" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("verb", ["prompts", "views"])
@pytest.mark.parametrize("options", [[], ["--reference", "reconstruction"]])
def test_the_bar_counts_clips(folder, monkeypatch, verb, options):
    bars = []

    def bar(**given):
        if given.get("unit") == "clip":
            bars.append(given["total"])
        return SimpleNamespace(update=bars.append)

    monkeypatch.setattr("lumos.progress.progress_bar", lambda **given: nullcontext(bar(**given)))
    kind = "one" if verb == "prompts" else "solids"
    assert main(["evaluate", verb, "--model", str(folder), "--count", "2", "--kinds", kind, *options]) == 0
    assert bars[0] == sum(bars[1:]) == 2


def test_views_are_measured_beside_copies(folder, tmp_path, capsys):
    file, sheet = tmp_path / "r.json", tmp_path / "sheet.png"
    call = ["evaluate", "views", "--model", str(folder), "--count", "2", "--output", str(file)]
    assert main([*call, "--sheet", str(sheet)]) == 0, capsys.readouterr().err
    summary = json.loads(file.read_text())
    assert (summary["settings"]["guidance_scale"], summary["settings"]["null_image"]) == (3.5, "zeros")  # those of the clips
    quality = summary["quality"]
    assert quality.keys() == {"solids", "held_out_solids"}
    assert sheet.stat().st_size > 1000
    assert main([*call, "--reference", "reconstruction"]) == 0
    again = json.loads(file.read_text())["quality"]
    assert again["solids"]["copy"] == quality["solids"]["copy"]
    assert again["solids"]["generated"] != quality["solids"]["generated"]


@pytest.mark.parametrize(("wrong", "said"), [
    (["--kinds", "cubes"], "'cubes' is unknown"), (["--kinds", "solids", "solids"], "named twice"),
    (["--sheet-solids", "2"], "no effect without --sheet"), (["--count", "0"], "--count 0"),
    (["--reference", "reconstruction", "--solver", "ab2"], "--solver has no effect"),
])  # fmt: skip
def test_wrong_options_of_views_are_refused(folder, capsys, wrong, said):
    assert main(["evaluate", "views", "--model", str(folder), *wrong]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_model_without_views_is_refused(micro_folder, capsys):
    assert main(["evaluate", "views", "--model", str(micro_folder), "--count", "1"]) == 2
    assert "views" in capsys.readouterr().err.splitlines()[-1]
