"""Requests out of bounds are refused before they wait in the queue, with the allowed values."""

from __future__ import annotations

from dataclasses import fields

import pytest

from lumos.cli import main
from lumos.demo.limits import Limits, TooLarge
from lumos.errors import UserError
from lumos.models.lumos1.settings import GenerationSettings
from lumos.pipeline.defaults import ClipDefaults
from lumos.pipeline.request import Request

OWN = ClipDefaults(5, 16, 24, 8, None), GenerationSettings(num_inference_steps=12)
LIMITS = Limits(max_prompt_length=20, max_steps=30, max_upload_mb=0.001).of_model(*OWN)
FITS = {
    "prompt": "x" * 20, "negative_prompt": "y" * 20, "num_frames": 9, "height": 24, "width": 24, "num_inference_steps": 30,
}  # fmt: skip


def test_open_limits_follow_the_model():
    assert (LIMITS.max_frames, LIMITS.max_side) == (9, 24)
    given = Limits(max_frames=33, max_side=64).of_model(*OWN)
    assert (given.max_frames, given.max_side) == (33, 64)


@pytest.mark.parametrize(("name", "own"), [("max_frames", 5), ("max_side", 24), ("max_steps", 12)])
def test_a_limit_below_the_model_default_is_an_error(name, own):
    assert getattr(Limits(**{name: own}).of_model(*OWN), name) == own
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {own - 1} is less than the model's own {own}"):
        Limits(**{name: own - 1}).of_model(*OWN)


def test_what_is_just_within_bounds_is_taken():
    LIMITS.check(Request.of(**FITS))
    LIMITS.check(Request.of("x"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "x" * 21}, "prompt has 21 characters; at most 20 are allowed"),
        ({"negative_prompt": "x" * 21}, "negative_prompt has 21 characters"),
        ({"num_frames": 13}, "num_frames 13 is not allowed here; give 1 to 9"),
        ({"num_frames": 0}, "give 1 to 9"),
        ({"height": 32}, "height 32 is not allowed here; give 1 to 24"),
        ({"width": 32}, "width 32 is not allowed here"),
        ({"later_steps": 31}, "later_steps 31 is not allowed here"),
        ({"num_inference_steps": 31}, "num_inference_steps 31 is not allowed here; give 1 to 30"),
    ],
)
def test_what_is_out_of_bounds_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        LIMITS.check(Request.of(**{**FITS, **change}))


@pytest.mark.parametrize("name", ["image", "video"])
def test_a_large_file_is_refused(name, tmp_path):
    (tmp_path / "small.png").write_bytes(bytes(1000))
    (tmp_path / "large.png").write_bytes(bytes(2000))
    LIMITS.check(Request.of("x", **{name: tmp_path / "small.png"}))
    with pytest.raises(TooLarge, match=r"large\.png has 0\.00191 MB; at most 0\.001 MB are allowed"):
        LIMITS.check(Request.of("x", **{name: tmp_path / "large.png"}))


def test_every_bound_is_a_flag_with_its_default(capsys):
    assert main(["demo", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for entry in fields(Limits):
        assert f"--{entry.name.replace('_', '-')} " in text
        assert " ".join(entry.metadata["help"].split()) in text


@pytest.mark.parametrize("name", [entry.name for entry in fields(Limits)])
def test_a_bound_below_one_is_an_error(name):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} 0 is not allowed"):
        Limits(**{name: 0})


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_bound_is_finite(value):
    with pytest.raises(UserError, match=r"--max-upload-mb (inf|nan) is not allowed; give a number above 0"):
        Limits(max_upload_mb=value)


def test_the_upload_budget_holds_at_least_one_upload():
    with pytest.raises(UserError, match="--keep-uploads-mb 5 holds not even one upload"):
        Limits(keep_uploads_mb=5)
