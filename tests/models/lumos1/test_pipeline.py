from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoConfig, AutoModel

from lumos import LumosConfig, LumosForVideoGeneration, LumosPipeline
from lumos.errors import UserError
from lumos.models.lumos1.request import prefix_ids
from lumos.pipeline.inputs import check_num_frames
from lumos.pipeline.request import Request
from lumos.video.frames import as_uint8, from_uint8, to_uint8


@pytest.fixture(scope="module")
def pipe(micro_folder):
    return LumosPipeline.from_pretrained(micro_folder, device="cpu")


def picture(seed=0, height=16, width=24):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def film(frames, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, 16, 24, 3), dtype=np.uint8)


def own_reconstruction(pipe, frames):
    codes = pipe.video_tokenizer.encode(from_uint8(frames)[None])
    return to_uint8(pipe.video_tokenizer.decode(codes)[0])


def test_text_to_video(pipe):
    result = pipe("a red circle moves left", seed=3)
    (clip,) = result.frames
    assert (clip.dtype, clip.shape) == (np.float32, (5, 16, 24, 3))
    assert result.seeds == [3]
    assert result.codes.shape == (1, 2, 2, 3)
    again = pipe("a red circle moves left", seed=3).frames[0]
    assert np.array_equal(clip, again)
    assert not np.array_equal(clip, pipe("a red circle moves left", seed=4).frames[0])


def test_every_size_and_setting_of_the_call(pipe):
    result = pipe(
        "x", num_frames=9, height=24, width=16, fps=4, num_inference_steps=3, guidance_scale=1.0, temperature=0.5, top_k=5,
        top_p=0.9, history_mask_ratio=0.3, mask_given_frames=True, seed=0,
    )  # fmt: skip
    assert result.frames[0].shape == (9, 24, 16, 3)
    assert result.settings["top_p"] == 0.9
    assert result.settings["num_inference_steps"] == 3


def test_text_to_image(pipe):
    result = pipe("a red circle", num_frames=1, seed=0)
    assert result.frames[0].shape == (1, 16, 24, 3)
    assert result.settings["fps"] == 1


def test_lists_make_one_clip_each_equal_to_single_calls(pipe):
    prompts = ["a red circle moves left", "x", "the digit 7 moves up"]
    together = pipe(prompts, seed=[5, 6, 7])
    assert together.seeds == [5, 6, 7]
    for prompt, seed, clip in zip(prompts, together.seeds, together.frames, strict=True):
        assert np.array_equal(pipe(prompt, seed=seed).frames[0], clip)
    assert pipe("x", seed=[1, 2]).seeds == [1, 2]
    assert pipe(["x", "y"], seed=8).seeds == [8, 9]


def test_image_to_video_keeps_the_first_frame(pipe):
    image = picture()
    clip = pipe("x", image=image, seed=1).frames[0]
    assert np.array_equal(as_uint8(clip[0], ndim=3), own_reconstruction(pipe, image[None])[0])
    both = pipe(["x", "y"], image=[image, picture(1)], seed=1).frames
    assert np.array_equal(both[0], clip)


def test_continuing_a_clip_keeps_its_last_frames(pipe):
    video = film(30)
    clip = pipe("x", video=video, num_frames=17, seed=1).frames[0]
    assert len(clip) == 17
    assert np.array_equal(as_uint8(clip[:9]), own_reconstruction(pipe, video[-9:]))
    short = pipe("x", video=film(6), num_frames=17, seed=1)
    assert short.settings["num_given_frames"] == 5
    one = pipe("x", video=video, num_given_frames=1, seed=1)
    assert np.array_equal(as_uint8(one.frames[0][0], ndim=3), own_reconstruction(pipe, video[-1:])[0])


def test_prompt_and_negative_prompt_matter(pipe):
    base = pipe("x", seed=1, guidance_scale=8.0).codes
    assert not torch.equal(base, pipe("a red circle moves left", seed=1, guidance_scale=8.0).codes)
    assert not torch.equal(base, pipe("x", negative_prompt="a small blue square", seed=1, guidance_scale=8.0).codes)


def test_steps_are_reported(pipe):
    seen = []
    pipe("x", seed=1, on_step=lambda *at: seen.append(at))
    assert seen == [(f, 2, s, 2) for f in range(2) for s in range(2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "   "}, "the prompt is empty"),
        ({"prompt": "a caf\ufffd"}, "U.FFFD, because characters were lost"),
        ({"prompt": "a", "negative_prompt": "b\0c"}, "U.0000, because characters were lost"),
        ({"prompt": "word " * 5000}, "this model reads at most 256"),
        ({"num_frames": 16}, "num_frames 16 is not allowed; it must be 1 \\+ a multiple of 4, for example 13 or 17"),
        ({"num_frames": 0}, "num_frames 0 is not allowed"),
        ({"height": 60}, "height 60 is not a multiple of 8; the nearest sizes are 56 and 64"),
        ({"width": -8}, "width -8 is not allowed; give a whole number of at least 1"),
        ({"fps": 0}, "fps 0 is not allowed"),
        ({"fps": 7.5}, "fps 7.5 is not allowed"),
        ({"num_inference_steps": 2.5}, "num_inference_steps 2.5 is not allowed; give a whole number"),
        ({"top_k": "x"}, "top_k 'x' is not allowed"),
        ({"seed": True}, "seed True is not allowed"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": ["a", "b"], "image": [None, picture()]}, "image is given for some clips and None for others"),
        ({"prompt": ["a", "b"], "video": [film(30), film(6)], "num_frames": 17}, "set num_given_frames"),
        ({"num_frames": 4001, "fps": 60}, "this model was made for at most 8192"),
        ({"fps": 300}, "fps 300 has no number token"),
        ({"seed": -1}, "seed -1 is not allowed"),
        ({"seed": [1, 2], "prompt": ["a", "b", "c"]}, "seed is a list of 2, but there are 3 clips"),
        ({"guidance_scale": 1.0, "negative_prompt": "y"}, "negative_prompt has no effect"),
        ({"image": picture(), "num_frames": 1}, "leaves nothing to generate"),
        ({"image": picture(), "video": film(5)}, "both image and video"),
        ({"image": picture()[..., :2]}, "give a path, uint8 or floats in \\[0, 1\\] as an array \\[H, W, 3\\] or a tensor"),
        ({"image": picture()[:0]}, "image uint8 \\[0, .*\\] cannot be read"),
        ({"video": film(5).astype(float)}, "video float64 .* give a path, uint8 or floats in .* as an array \\[T, H, W, 3\\]"),
        ({"video": film(5)[:, :, :0]}, "video uint8 .* cannot be read"),
        ({"video": 5}, "video of type int cannot be read"),
        ({"prompt": ["a", "b"], "negative_prompt": ["x", " "]}, "negative_prompt is given for some clips and None for others"),
        ({"video": film(5), "num_given_frames": 4, "num_frames": 9}, "num_given_frames 4 is not allowed"),
        ({"image": "no-such-file.png"}, "no-such-file.png"),
        ({"last_image": picture()}, "last_image cannot be kept: .* give the first frame as image"),
        ({"later_prompts": "y"}, "later_prompts is 'y'; give \\(first frame, prompt\\) pairs"),
        ({"later_prompts": [(5, "y", 3)]}, "later_prompts holds \\(5, 'y', 3\\)"),
        ({"later_prompts": [("5", "y")]}, "later_prompts holds \\('5', 'y'\\)"),
        ({"later_prompts": [(6, "y")], "num_frames": 9}, "the first frame of a later prompt 6 is not allowed; .* 5 or 9"),
        ({"later_prompts": [(9, "y")], "num_frames": 9}, "cannot begin at frame 9; give more than 0, .* less than num_frames 9"),
        ({"later_prompts": [(5, "y"), (5, "z")], "num_frames": 9}, "cannot begin at frame 5; give more than 5"),
        ({"later_prompts": [(5, "y")], "video": film(5), "num_given_frames": 5, "num_frames": 17}, "cannot begin at frame 5"),
        ({"later_prompts": [(5, " ")], "num_frames": 9}, "the prompt is empty"),
        ({"later_prompts": [(5, ["y", "z"])], "num_frames": 9}, "a list of 2, but there are 1 prompts"),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_work(pipe, monkeypatch, options, message):
    monkeypatch.setattr(pipe.model.model, "forward", lambda *a: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "x", "seed": 0, **options})


@given(st.integers(-5, 200), st.integers(1, 8))
def test_allowed_frame_counts(n, stride):
    if n >= 1 and (n - 1) % stride == 0:
        check_num_frames(n, stride)
    else:
        with pytest.raises(UserError):
            check_num_frames(n, stride)


def test_round_trip_of_folders(pipe, micro_folder, tmp_path):
    pipe.save_pretrained(tmp_path / "copy")
    assert not list((tmp_path / "copy").rglob("*.bin"))
    again = LumosPipeline.from_pretrained(tmp_path / "copy", device="cpu")
    assert np.array_equal(pipe("x", seed=1).frames[0], again("x", seed=1).frames[0])
    assert again.settings == pipe.settings
    assert again.clip == pipe.clip


def test_auto_classes_know_the_model(micro_folder):
    assert isinstance(AutoConfig.from_pretrained(micro_folder), LumosConfig)
    model = AutoModel.from_pretrained(micro_folder)
    assert isinstance(model, LumosForVideoGeneration)
    half = LumosForVideoGeneration.from_pretrained(micro_folder, dtype=torch.bfloat16, device_map="cpu")
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.lm_head.weight, model.lm_head.weight.bfloat16())


def test_parts_that_do_not_belong_together(micro_folder, tmp_path):
    from tokenizer import VideoTokenizer, VideoTokenizerConfig

    other = VideoTokenizer(
        VideoTokenizerConfig(
            channels=8, channels_mult=(1, 2), num_res_blocks=1, spatial_compression=8, temporal_compression=4, embedding_dim=3,
            levels=(5, 5, 5),
        )
    )  # fmt: skip
    other.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="expects codes 64, the video tokenizer has 125"):
        LumosPipeline.from_pretrained(micro_folder, video_tokenizer=tmp_path, device="cpu")


def test_pipeline_json_is_checked(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    (tmp_path / "pipeline.json").write_text(json.dumps({"stepz": 3}))
    with pytest.raises(UserError, match="unknown setting stepz; allowed: num_inference_steps"):
        LumosPipeline.from_pretrained(tmp_path, device="cpu")
    (tmp_path / "pipeline.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        LumosPipeline.from_pretrained(tmp_path, device="cpu")
    for other in ("[]", '""', "null", "3"):
        (tmp_path / "pipeline.json").write_text(other)
        with pytest.raises(UserError, match="must hold a JSON object of settings"):
            LumosPipeline.from_pretrained(tmp_path, device="cpu")
    with pytest.raises(UserError, match="device 'gpu9' is unknown"):
        LumosPipeline.from_pretrained(tmp_path, device="gpu9")


def test_options_without_effect_are_said(pipe):
    with pytest.warns(UserWarning, match="mask_given_frames=True has no effect on a clip without image or video"):
        pipe("x", mask_given_frames=True, seed=1)
    with pytest.warns(UserWarning, match=r"fps=8, history_mask_ratio=0\.7 has no effect on a picture"):
        assert pipe("x", num_frames=1, fps=8, history_mask_ratio=0.7, seed=1).settings["fps"] == 1


def branches_of(pipe, monkeypatch, **options) -> list[tuple[int, int]]:
    """Return (rows, masked codes before the first new frame) of each prefill."""
    from lumos.models.lumos1.engine import DecodingEngine

    seen, prefill, mask = [], DecodingEngine.prefill, pipe.model.config.mask_token_id
    with monkeypatch.context() as patch:
        patch.setattr(DecodingEngine, "prefill", lambda self, rows, *rest: seen.append(
            (len(rows), int(sum((row == mask).sum() for row in rows)))) or prefill(self, rows, *rest))  # fmt: skip
        pipe("x", seed=1, num_frames=9, **options)
    return seen


def test_image_guidance_adds_the_branch_that_it_needs(pipe, monkeypatch):
    """A given picture has 6 codes."""
    given = {"image": picture(), "guidance_scale": 4.0}
    assert branches_of(pipe, monkeypatch, **given) == [(2, 0)]
    assert branches_of(pipe, monkeypatch, image_guidance_scale=1.0, **given) == [(2, 0)]
    assert branches_of(pipe, monkeypatch, image_guidance_scale=4.0, **given) == [(2, 6)]
    assert branches_of(pipe, monkeypatch, image_guidance_scale=2.0, **given) == [(3, 6)]
    assert branches_of(pipe, monkeypatch, image_guidance_scale=2.0, **given | {"guidance_scale": 1.0}) == [(3, 6)]


def test_image_guidance_needs_a_given_frame(pipe, monkeypatch):
    with pytest.raises(UserError, match=r"image_guidance_scale 2\.0 needs a given frame; give an image, or leave it out"):
        pipe("x", image_guidance_scale=2.0, seed=1)
    plain = pipe("x", seed=1, guidance_scale=4.0).frames[0]
    with monkeypatch.context() as patch:
        patch.setattr(pipe, "settings", pipe.settings.changed(image_guidance_scale=2.0))  # the model's default
        result = pipe("x", seed=1, guidance_scale=4.0)
    assert np.array_equal(result.frames[0], plain)
    assert result.settings["image_guidance_scale"] is None


def test_negative_prompts_may_be_a_list(pipe):
    both = pipe(["x", "x"], negative_prompt=["a", "b"], seed=[1, 1], guidance_scale=9.0)
    alone = pipe("x", negative_prompt="b", seed=1, guidance_scale=9.0)
    assert np.array_equal(both.frames[1], alone.frames[0])
    assert pipe("x", seed=np.int64(3)).seeds == [3]


def test_pictures_that_ask_for_different_sizes(pipe, monkeypatch):
    from dataclasses import replace

    monkeypatch.setattr(pipe, "clip", replace(pipe.clip, target_size=32))
    with pytest.raises(UserError, match="ask for different sizes"):
        pipe(["a", "b"], image=[picture(0, 16, 40), picture(0, 40, 16)])
    tall = pipe("a", image=picture(0, 40, 16), seed=1).frames[0]
    assert tall.shape[1] > tall.shape[2]


def test_a_text_tokenizer_that_uses_the_models_own_ids(micro_folder, tmp_path):
    from tokenizer import TextTokenizer

    TextTokenizer.train(["a red circle", "a blue square"], 400, reserved_symbols=["<a>", "<b>"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="they do not belong together"):
        LumosPipeline.from_pretrained(micro_folder, text_tokenizer=tmp_path, device="cpu")


def test_a_missing_tokenizer_says_which_option_names_one(pipe, tmp_path):
    pipe.model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--text-tokenizer names another place"):
        LumosPipeline.from_pretrained(tmp_path, device="cpu")
    pipe.text_tokenizer.save_pretrained(tmp_path / "text_tokenizer")
    with pytest.raises(UserError, match=r"no video tokenizer in .* --video-tokenizer names another place"):
        LumosPipeline.from_pretrained(tmp_path, device="cpu")


def test_a_bounded_history_makes_clips_of_any_length(micro_folder):
    """A model made for 60 tokens makes clips of ten times its default length; a note says where it extrapolates."""
    pipe = LumosPipeline.from_pretrained(micro_folder, device="cpu")
    pipe.model.config.max_position_embeddings = 60
    with pytest.raises(UserError, match=r"this model was made for at most 60; .* or bound what a frame sees with history_frames"):
        pipe("x", num_frames=49, seed=0)
    with pytest.warns(UserWarning, match=r"positions go up to .*, this model was made for 60"):
        result = pipe("x", num_frames=49, history_frames=1, seed=0)
    assert result.codes.shape == (1, 13, 2, 3)
    assert result.settings["history_frames"] == 1
    assert result.settings["num_frames"] == 49
    with pytest.raises(UserError, match="or lower history_frames 9"):
        pipe("x", num_frames=49, history_frames=9, seed=0)
    with pytest.warns(UserWarning, match="history_frames=1 has no effect on a clip of 2 latent frames"):
        pipe("x", history_frames=1, seed=0)
    with pytest.warns(UserWarning, match="later_steps=1 has no effect"):
        pipe("x", num_frames=1, later_steps=1, seed=0)
    prefix = prefix_ids("x", pipe.clip, pipe.model.config, pipe.text_tokenizer)
    pipe.model.config.max_position_embeddings = 8192
    ready = pipe.encode(pipe.resolve(Request.of("x", num_frames=49, history_frames=1)))
    assert torch.equal(ready.conditional[0], prefix)
    assert not torch.equal(pipe.encode(pipe.resolve(Request.of("x", num_frames=49))).conditional[0], prefix)


def test_a_too_long_negative_prompt_is_refused(micro_folder):
    pipe = LumosPipeline.from_pretrained(micro_folder, device="cpu")
    pipe.model.config.max_position_embeddings = 60
    pipe.resolve(Request.of("x", num_frames=5, negative_prompt="y"))
    with pytest.raises(UserError, match="this model was made for at most 60"):
        pipe.resolve(Request.of("x", num_frames=5, negative_prompt="word " * 30))


def test_alpha_and_rotation_of_a_picture_are_as_in_a_file(micro_folder, tmp_path):
    pipe = LumosPipeline.from_pretrained(micro_folder)
    clear = Image.new("RGBA", (24, 16), (0, 0, 0, 0))
    turned = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 16, 3), dtype=np.uint8))
    turned.getexif()[0x0112] = 6
    for name, picture in (("clear.png", clear), ("turned.png", turned)):
        picture.save(tmp_path / name, exif=picture.getexif())
        given = [pipe.resolve(Request.of("x", image=image)).given[0][0] for image in (picture, tmp_path / name)]
        assert np.array_equal(*given)
    assert (pipe.resolve(Request.of("x", image=clear)).given[0][0] == 255).all()


def test_a_later_prompt_needs_words(micro_folder):
    with pytest.raises(UserError, match="the prompt is None"):
        LumosPipeline.from_pretrained(micro_folder)("x", later_prompts=[(5, None)], num_frames=9)


def test_prompts_over_time(pipe):
    """A later prompt acts as the prompt of a clip that continues the earlier frames; lists have one for each clip."""
    first = pipe("a red circle moves left", num_frames=17, seed=1)
    clip = pipe("a red circle moves left", later_prompts=[(9, "the digit 7 moves up")], num_frames=17, seed=1, guidance_scale=9.0)
    plain = pipe("a red circle moves left", num_frames=17, seed=1, guidance_scale=9.0)
    assert torch.equal(clip.codes[:, :3], plain.codes[:, :3])
    assert not torch.equal(clip.codes[:, 3:], plain.codes[:, 3:])
    both = pipe(["a red circle moves left", "x"], later_prompts=[(9, ["the digit 7 moves up", "x"])], num_frames=17, seed=[1, 1],
                guidance_scale=9.0)  # fmt: skip
    assert torch.equal(both.codes[0], clip.codes[0])
    assert torch.equal(both.codes[1], pipe("x", num_frames=17, seed=1, guidance_scale=9.0).codes[0])
    again = pipe("a red circle moves left", later_prompts=[(9, "a red circle moves left")], num_frames=17, seed=1)
    assert torch.equal(again.codes, first.codes)


@pytest.mark.parametrize("thinning", [False, True])
def test_later_prompts_keep_earlier_frames_in_a_bounded_history(pipe, thinning):
    options = {"video": film(9), "num_given_frames": 9, "num_frames": 49, "history_frames": 2, "seed": 1, "guidance_scale": 9.0}
    options["history_thinning"] = thinning
    plain = pipe("x", **options).codes
    codes = pipe("x", later_prompts=[(13, "the digit 7 moves up"), (33, "x")], **options).codes
    assert torch.equal(codes[:, :4], plain[:, :4])
    assert not torch.equal(codes[:, 4:9], plain[:, 4:9])


def test_thinning_changes_no_frame_before_it_drops_one(pipe):
    options = {"num_frames": 33, "history_frames": 2, "seed": 1, "history_mask_ratio": 0.0, "guidance_scale": 9.0}
    window, thinned = pipe("x", **options), pipe("x", history_thinning=True, **options)
    assert torch.equal(window.codes[:, :5], thinned.codes[:, :5])
    assert not torch.equal(window.codes[:, 5:], thinned.codes[:, 5:])
    assert thinned.settings["history_thinning"] is True


def test_steps_of_later_frames_are_reported(pipe):
    seen = []
    pipe("x", seed=1, num_frames=9, num_inference_steps=3, later_steps=1, on_step=lambda *at: seen.append(at))
    assert seen == [(0, 3, 0, 3), (0, 3, 1, 3), (0, 3, 2, 3), (1, 3, 0, 1), (2, 3, 0, 1)]
    assert pipe.num_timesteps == 5


def test_int8_weights_make_clips_and_are_not_saved(micro_folder, tmp_path):
    pytest.importorskip("torchao")
    pipe = LumosPipeline.from_pretrained(micro_folder, device="cpu", int8=True)
    assert pipe("x", seed=0).codes.shape == (1, 2, 2, 3)
    with pytest.raises(UserError, match="int8 weights is not saved"):
        pipe.save_pretrained(tmp_path / "saved")
