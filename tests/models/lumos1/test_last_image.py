"""Clips between a first and a last frame: requests, calls, command lines, and models without this training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lumos import LumosPipeline
from lumos.cli import main
from lumos.errors import UserError
from lumos.models.lumos1.engine import DecodingEngine
from lumos.models.lumos1.sequence import parse_layout, parse_sequence
from lumos.pipeline.notes import given_pictures
from lumos.pipeline.request import Request
from lumos.video.io import read_video, write_video


@pytest.fixture(scope="module")
def ends_folder(micro_folder, tmp_path_factory) -> Path:
    """The micro model, marked as trained on first and last frames; its codes and distributions differ between pictures."""
    pipe, folder = LumosPipeline.from_pretrained(micro_folder, device="cpu"), tmp_path_factory.mktemp("ends") / "model"
    pipe.model.config.patterns = ["none", "ends"]
    with torch.no_grad():
        pipe.model.lm_head.weight.mul_(30)
        pipe.video_tokenizer.quant_conv.conv3d.weight.mul_(100)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(ends_folder):
    return LumosPipeline.from_pretrained(ends_folder, device="cpu")


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=np.uint8)


ENDS = {"image": picture(1), "last_image": picture(2)}


def prefilled(pipe, monkeypatch, **options) -> list[list[torch.Tensor]]:
    """Return the rows of each prefill of a call."""
    seen, prefill = [], DecodingEngine.prefill
    with monkeypatch.context() as patch:
        patch.setattr(DecodingEngine, "prefill", lambda self, rows, *rest: seen.append(rows) or prefill(self, rows, *rest))
        pipe("a red circle", seed=1, **{"num_frames": 9, **options})
    return seen


def test_the_prefix_is_text_first_and_last(pipe, monkeypatch):
    """Both given frames are in both branches."""
    config = pipe.model.config
    ((conditional, unconditional),) = prefilled(pipe, monkeypatch, **ENDS)
    first, last = (pipe.encode_frames(frame[None])[0] for frame in ENDS.values())
    assert not torch.equal(first, last)
    tail = torch.tensor([config.video_end_token_id, config.sep_token_id])
    for row, has_text in ((conditional, True), (unconditional, False)):
        (layout,) = parse_layout(row[None], config)
        assert (layout.times, layout.length) == ((0, 2), layout.frames[1].end)
        whole = torch.cat([row[: layout.frames[0].end], *[row[layout.frames[0].end + 1 :]] * 2, tail])  # as a clip of 3 frames
        parsed = parse_sequence(whole, config)
        assert torch.equal(parsed.codes, torch.stack([first, last, last]))
        assert (parsed.text_ids is not None) == has_text


def test_masked_given_frames_are_both_masked(pipe, monkeypatch):
    """A given picture has 6 codes. A branch without given frames has the codes of both pictures masked."""
    mask = pipe.model.config.mask_token_id

    def masked(**options) -> list[int]:
        return [int((row == mask).sum()) for row in prefilled(pipe, monkeypatch, **ENDS, guidance_scale=4.0, **options)[0]]

    assert masked() == [0, 0]
    assert masked(image_guidance_scale=4.0) == [0, 12]
    assert masked(image_guidance_scale=2.0) == [0, 0, 12]


def clip_of(pipe, **given) -> np.ndarray:
    return pipe("a red circle", num_frames=9, seed=1, output_type="uint8", **given).frames[0]


def test_a_clip_begins_with_the_first_frame_and_has_its_length(pipe):
    result = pipe("a red circle", num_frames=9, seed=1, output_type="uint8", **ENDS)
    clip, (first, last) = result.frames[0], ENDS.values()
    assert clip.shape == (9, 16, 24, 3)
    assert torch.equal(result.codes[0, 0], pipe.encode_frames(first[None])[0])
    assert result.settings["num_given_frames"] == 2
    assert np.array_equal(clip_of(pipe, given_frames={0: first, 8: last}), clip)
    assert np.array_equal(clip_of(pipe, image=first, given_frames={8: last}), clip)
    assert not np.array_equal(clip_of(pipe, image=first), clip)
    assert not np.array_equal(clip_of(pipe, image=first, last_image=picture(3)), clip)


def test_a_clip_does_not_depend_on_its_batch_and_streams(pipe):
    lists = {"image": [picture(1), picture(3)], "last_image": [picture(2), picture(4)]}
    both = pipe(["a red circle", "x"], num_frames=9, seed=[1, 2], output_type="uint8", **lists).frames
    alone = clip_of(pipe, **ENDS)
    assert np.array_equal(both[0], alone)
    parts = [part[0] for part in pipe.stream("a red circle", num_frames=9, seed=1, **ENDS)]
    assert [len(part) for part in parts] == [1, 4, 4]
    assert np.array_equal(np.concatenate(parts), alone)


def test_later_prompts_keep_both_frames(pipe, monkeypatch):
    before, after = prefilled(pipe, monkeypatch, **ENDS, num_frames=13, later_prompts=[(5, "it jumps")])
    assert [parse_layout(rows[0][None], pipe.model.config)[0].times for rows in (before, after)] == [(0, 3), (0, 3, 1)]


@pytest.mark.parametrize(("options", "words"), [
    ({"last_image": picture()}, r"frames 8 are given; this model makes clips from their first 1 \+ 4 k frames, or from the first"),
    ({"image": picture(), "given_frames": {4: picture()}}, "frames 0, 4 are given; this model makes clips from"),
    ({"given_frames": {0: picture(), 1: picture()}}, "frames 0, 1 are given"),
    ({"video": np.stack([picture()] * 5), "last_image": picture()}, "frames 0, 1, 2, 3, 4, 8 are given"),
    (ENDS | {"history_frames": 1}, "history_frames 1 does not work with a given last frame, which every frame sees; leave one out"),
    (ENDS | {"given_frames": {8: picture()}}, "frame 8 is given twice"),
    (ENDS | {"num_frames": 1}, "num_frames 1 leaves nothing to generate after 2 given frames"),
    ({"given_frames": {0: picture()}, "later_prompts": [(1, "y")]}, "cannot begin at frame 1; give more than 1"),
    ({"given_frames": dict.fromkeys(range(5), picture()), "later_prompts": [(5, "y")]}, "frame 5; give more than 5"),
    (ENDS | {"later_prompts": [(1, "y")]}, "cannot begin at frame 1; give more than 1"),
    ({"given_frames": {}, "image_guidance_scale": 2.0}, r"image_guidance_scale 2\.0 needs a given frame"),
    ({"given_frames": [{}], "image_guidance_scale": 2.0}, r"image_guidance_scale 2\.0 needs a given frame"),
    (ENDS | {"interpolate": 2}, "interpolate is not possible with models of the generator lumos1"),
])  # fmt: skip
def test_frames_that_cannot_be_given(pipe, options, words):
    with pytest.raises(UserError, match=words):
        pipe.resolve(Request.of("x", **{"num_frames": 9, **options}))


def test_tokens_of_the_last_picture_count(pipe):
    config = pipe.model.config
    fits = pipe.resolve(Request.of("x", num_frames=9, image=picture())).conditional[0].shape[0] + 3 * 12
    config.max_position_embeddings, before = fits, config.max_position_embeddings
    try:
        pipe.resolve(Request.of("x", num_frames=9, image=picture()))
        with pytest.raises(UserError, match=f"the clip needs {fits + 13} tokens, this model was made for at most {fits}"):
            pipe.resolve(Request.of("x", num_frames=9, **ENDS))
    finally:
        config.max_position_embeddings = before


def test_a_last_frame_needs_a_token_for_its_time(pipe):
    """It is checked with the request, before any picture is encoded."""
    config = pipe.model.config
    count, config.number_token_count = config.number_token_count, 10
    try:
        assert pipe.resolve(Request.of("x", num_frames=37, **ENDS)).has_last
        with pytest.raises(UserError, match="the last latent frame 10 has no number token; allowed: up to 9"):
            pipe.resolve(Request.of("x", num_frames=41, **ENDS))
    finally:
        config.number_token_count = count


def test_both_given_pictures_are_checked(pipe):
    clip = np.stack([picture(n) for n in range(5)])
    for given, numbers in ((ENDS, [1, 2]), ({"image": picture(1)}, [1]), ({"video": clip, "num_given_frames": 5}, [0])):
        found = given_pictures(pipe.resolve(Request.of("x", num_frames=9, **given)))
        assert [n for frame in found for n in range(5) if np.array_equal(frame, picture(n))] == numbers


def test_other_models_say_what_they_said(micro_folder):
    plain = LumosPipeline.from_pretrained(micro_folder, device="cpu")
    assert plain.takes == ()
    with pytest.raises(UserError, match="last_image cannot be kept: this kind of model makes each frame from those before it"):
        plain.resolve(Request.of("x", **ENDS))
    with pytest.raises(UserError, match="given_frames cannot be kept: this kind of model makes each frame from those before it"):
        plain.resolve(Request.of("x", given_frames={0: picture()}))


def test_a_saved_model_knows_its_patterns(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "again")
    again = LumosPipeline.from_pretrained(tmp_path / "again", device="cpu")
    assert again.takes == ("last_image", "given_frames")
    assert np.array_equal(clip_of(again, **ENDS), clip_of(pipe, **ENDS))


def test_command_lines_and_lists(ends_folder, tmp_path):
    for name, image in ENDS.items():
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    ends = ["--image", str(tmp_path / "image.png"), "--last-image", str(tmp_path / "last_image.png")]
    common = ["--model", str(ends_folder), "--device", "cpu", "--num-frames", "9"]
    assert main(["generate", *common, *ends, "--prompt", "x", "--seed", "1", "--output", str(tmp_path / "clip.mp4")]) == 0
    assert len(read_video(tmp_path / "clip.mp4")[0]) == 9
    write_video(tmp_path / "begin.webp", picture()[None], 8)
    row = {"prompt": "x", "last_image": "last_image.png", "seed": 1}
    rows = [row | {"image": "image.png"}, row | {"video": "begin.webp", "num_given_frames": 1}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["generate", *common, "--prompts", str(tmp_path / "list.jsonl"), "--output-dir", str(tmp_path / "clips")]) == 0
    of_image, of_video = sorted((tmp_path / "clips").glob("*.mp4"))
    assert np.array_equal(read_video(of_image)[0], read_video(tmp_path / "clip.mp4")[0])
    assert len(read_video(of_video)[0]) == 9


def test_evaluation_with_given_ends(ends_folder, tmp_path, capsys):
    call = ["evaluate", "prompts", "--model", str(ends_folder), "--device", "cpu", "--count", "2", "--given", "ends"]
    assert main([*call, "--output", str(tmp_path / "scores.json")]) == 0
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["given"] == "ends"
    assert found["shares"]["one"]["given_frames"] == 0.0  # the last frame of random weights is another
    assert found["shares"]["one"]["psnr"] > 0
