"""The pipeline of STIV: folders, parts that do not fit together, callbacks, and the record."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from micro_stiv import micro_config, micro_pipeline

from lumos import StivPipeline, VideoPipeline
from lumos.errors import UserError
from lumos.models.stiv.pipeline import StivPipeline as Direct
from lumos.pipeline.request import Request


def test_the_public_names_are_those_of_the_package():
    assert StivPipeline is Direct


@pytest.mark.slow
def test_options_are_listed_without_torch():
    program = (
        "import sys; from lumos.pipeline.options import all_options; assert 'solver' in all_options(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_saved_pipeline_makes_the_same_clip(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {
        "config.json", "model.safetensors", "pipeline.json", "text_tokenizer", "video_tokenizer",
    }  # fmt: skip
    again = VideoPipeline.from_pretrained(tmp_path / "copy", device="cpu")
    assert (again.settings, again.clip) == (pipe.settings, pipe.clip)
    assert torch.equal(again("x", seed=1).latents, pipe("x", seed=1).latents)


@pytest.mark.parametrize(("part", "said"), [
    ("config.json", "no config.json"), ("model.safetensors", "no weights"),
    ("text_tokenizer", "--text-tokenizer names another place"),
    ("video_tokenizer", "--video-tokenizer names another place"),
])  # fmt: skip
def test_missing_parts_are_named(stiv_folder, tmp_path, part, said):
    shutil.copytree(stiv_folder, tmp_path / "copy")
    place = tmp_path / "copy" / part
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    with pytest.raises((UserError, OSError), match=said):
        VideoPipeline.from_pretrained(tmp_path / "copy", device="cpu")


@pytest.mark.parametrize(("field", "value", "said"), [
    ("latent_channels", 4, "in another shape"), ("spatial_compression", 4, "expects spatial_compression 4, .* has 8"),
    ("text_vocab_size", 20, "in another shape"),
])  # fmt: skip
def test_parts_of_other_models_are_refused(stiv_folder, tmp_path, field, value, said):
    shutil.copytree(stiv_folder, tmp_path / "copy")
    config = tmp_path / "copy" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
    with pytest.raises(UserError, match=said):
        VideoPipeline.from_pretrained(tmp_path / "copy", device="cpu")


def test_a_wrong_option_in_the_folder_names_the_file(stiv_folder, tmp_path):
    shutil.copytree(stiv_folder, tmp_path / "copy")
    file = tmp_path / "copy" / "pipeline.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"solver": "rk4"}))
    with pytest.raises(UserError, match=r"pipeline.json: solver 'rk4' is not allowed"):
        VideoPipeline.from_pretrained(tmp_path / "copy", device="cpu")


def test_a_frozen_text_encoder_is_saved_with_the_model(clip_text, tmp_path):
    from lumos.models.stiv.text_encoder import FrozenTextEncoder

    usual = micro_pipeline()
    model = type(usual.model)(micro_config(text_encoder="folder"))
    pipe = StivPipeline(model, FrozenTextEncoder.from_pretrained(clip_text), usual.space, usual.settings, usual.clip)
    pipe.save_pretrained(tmp_path / "model")
    again = VideoPipeline.from_pretrained(tmp_path / "model", device="cpu")
    assert torch.equal(again("a red circle", seed=1).latents, pipe("a red circle", seed=1).latents)
    again.offload_device = torch.device("meta")  # a device that holds no numbers
    again.to(dtype="bfloat16")
    assert {(p.device.type, p.dtype) for p in again.text.model.parameters()} == {("cpu", torch.bfloat16)}  # not on that device yet
    wide = micro_config(text_encoder="folder", text_width=128)
    with pytest.raises(UserError, match="has width 64; the model needs text_width 128"):
        StivPipeline(type(usual.model)(wide), pipe.text, usual.space)
    type(usual.model)(wide).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="has width 64; the model needs text_width 128"):
        VideoPipeline.from_pretrained(tmp_path / "model", device="cpu")


def test_a_callback_sees_and_changes_the_latents(pipe, frames):
    seen = []

    def callback(pipe, step, places, tensors):
        seen.append((step, places))
        return {"latents": torch.zeros_like(tensors["latents"])}

    made = pipe("x", image=frames[0], seed=1, num_inference_steps=3, callback_on_step_end=callback)
    assert seen == [(0, 4), (1, 4), (2, 0)]
    assert torch.equal(made.latents[0, 0], pipe.encode_frames(frames[:1])[0])
    assert made.latents[0, 1:].abs().max() == 0


@pytest.mark.parametrize(("given", "said"), [
    (torch.zeros(1), "the callback gave latents torch.float32"), (torch.full((1, 5, 3, 2, 4), torch.nan), "not finite"), (3, "int"),
])  # fmt: skip
def test_wrong_latents_of_a_callback_are_refused(pipe, given, said):
    with pytest.raises(UserError, match=said):
        pipe("x", seed=1, callback_on_step_end=lambda *_: {"latents": given})


def test_an_interrupted_long_clip_ends_with_what_is_done(pipe):
    def callback(pipe, step, places, tensors):
        pipe._interrupt = step == 2  # in the middle of the third pass

    made = pipe("x", num_frames=14, num_inference_steps=1, seed=1, callback_on_step_end=callback)
    assert made.settings["num_frames"] == made.frames.shape[1] == 9


def test_reconstruct_gives_what_a_given_frame_becomes(pipe, frames):
    again = pipe.reconstruct(frames)
    assert again.shape == frames.shape
    assert (again[0] == pipe("x", image=frames[0], seed=1, output_type="uint8").frames[0][0]).all()


def test_temporal_patches_need_whole_tokens(frames):
    pipe = micro_pipeline(temporal_patch_size=2, trained_grid={"time": 3, "rows": 1, "columns": 2})
    assert pipe("x", num_frames=6, seed=1).frames.shape[1] == 6
    with pytest.raises(UserError, match="5 latents along time are no multiple of the patch of 2"):
        pipe.resolve(Request.of("x", num_frames=5))
    made = pipe("", video=frames[:5], interpolate=2, seed=1, output_type="uint8", keep_given_pixels=True)
    assert made.settings["sampler"]["pattern"] == "interpolation"
    assert np.array_equal(made.frames[0][::2], frames[:5])
    assert len(made.frames[0]) == 9


def test_bfloat16_makes_the_same_noise_and_float32_latents(stiv_folder, pipe):
    made = VideoPipeline.from_pretrained(stiv_folder, device="cpu", dtype=torch.bfloat16)("x", seed=1).latents
    assert made.dtype == torch.float32
    assert torch.allclose(made, pipe("x", seed=1).latents, atol=0.2)


def test_prompt_tokens_count_the_end_mark(pipe):
    assert pipe.prompt_tokens("", pipe.clip) == 1
    with pytest.raises(UserError, match="allowed: at most 63; shorten it"):
        pipe.prompt_tokens("circle " * 200, pipe.clip)
