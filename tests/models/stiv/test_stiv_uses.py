"""Every use of the model, as a user asks for it in Python and on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from micro_stiv import micro_pipeline
from PIL import Image

from lumos import VideoPipeline
from lumos.cli import main
from lumos.demo.limits import Limits
from lumos.demo.service import Service
from lumos.demo.worker import ClipJob
from lumos.errors import NotFinite, UserError
from lumos.pipeline.parts import parts_folder
from lumos.pipeline.request import Request
from lumos.video.io import read_video, write_video


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def record(path: str) -> dict:
    return json.loads(Path(f"{path}.json").read_text())


@pytest.fixture
def run(stiv_folder):
    """A function that runs `generate` with the micro model."""
    return lambda *arguments: main(["generate", "--model", str(stiv_folder), *arguments])


@pytest.fixture
def files(frames):
    """A clip of 6 frames at 8 fps, and two pictures."""
    write_video("clip.webp", frames, 8)
    Image.fromarray(frames[0]).save("first.png")
    Image.fromarray(frames[1]).save("last.png")


# ---- in Python

USES = {
    "text": ({}, "none", 5, set()),
    "image": ({"image": 0}, "first", 5, {0}),
    "prediction": ({"video": slice(None)}, "prediction", 5, {0, 1, 2, 3}),
    "in-between": ({"image": 0, "last_image": 1}, "ends", 5, {0, 4}),
    "interpolation": ({"video": slice(0, 3), "interpolate": 2}, "interpolation", 5, {0, 2, 4}),
    "views": ({"image": 0, "views": True}, "views", 7, {0}),
    "by number": ({"given_frames": {0: 0, 4: 1}}, "ends", 5, {0, 4}),
    "picture": ({"num_frames": 1}, "none", 1, set()),
}


@pytest.mark.parametrize("use", USES)
def test_given_latents_stay_bit_identical(pipe, frames, use):
    arguments, pattern, count, given = USES[use]
    taken = {name: frames[value] if isinstance(value, slice) or (name in ("image", "last_image")) else value
             for name, value in arguments.items()}  # fmt: skip
    if "given_frames" in taken:
        taken["given_frames"] = {n: frames[at] for n, at in taken["given_frames"].items()}
    prompt = "" if use in ("interpolation", "views") else "a red circle"
    made = pipe(prompt, seed=1, output_type="uint8", keep_given_pixels=True if given else None, **taken)
    assert made.settings["sampler"]["pattern"] == pattern
    assert made.frames[0].shape == (count, 16, 32, 3)
    resolved = pipe.resolve(pipe.request(prompt, {"seed": 1, **taken}))
    assert set(resolved.given[0]) == given
    for number, picture in resolved.given[0].items():
        assert torch.equal(made.latents[0, number], pipe.encode_frames(picture[None])[0])
        assert np.array_equal(made.frames[0][number], picture)


def test_views_have_the_published_options(pipe, frames):
    resolved = pipe.resolve(pipe.request("", {"image": frames[0], "views": True}))
    assert (resolved.sampling.guidance_scale, resolved.sampling.null_image) == (3.5, "zeros")
    resolved = pipe.resolve(pipe.request("", {"image": frames[0], "views": True, "guidance_scale": 2.0}))
    assert resolved.sampling.guidance_scale == 2


def test_given_frames_are_decoded_unless_pixels_are_kept(pipe, frames):
    usual = pipe("x", image=frames[0], seed=1, output_type="uint8").frames[0]
    assert np.array_equal(usual[:1], pipe.reconstruct(frames[:1]))
    assert not np.array_equal(usual[0], frames[0])


def test_a_long_clip_is_streamed_in_parts_of_the_call(pipe):
    streamed = [part[0] for part in pipe.stream("a red circle", num_frames=14, num_inference_steps=1, seed=3)]
    assert [len(part) for part in streamed] == [1, 4, 4, 4, 1]
    made = pipe("a red circle", num_frames=14, num_inference_steps=1, seed=3, output_type="uint8")
    assert np.array_equal(np.concatenate(streamed), made.frames[0])
    assert made.settings["sampler"]["pattern"] == "none + ends"
    assert made.settings["sampler"]["model_calls"] == 5
    assert made.settings["sampler"]["strides"] == [4, 1]


@pytest.mark.parametrize(("count", "told"), [(1, [1]), (5, [3]), (6, [12, 3])])
def test_the_record_has_the_strides_the_network_is_told(monkeypatch, count, told):
    pipe, strides = micro_pipeline(micro_stride=3), []
    forward = pipe.model.forward

    def watched(*inputs, micro, **more):
        strides.append(micro.stride[0].item())
        return forward(*inputs, micro=micro, **more)

    monkeypatch.setattr(pipe.model, "forward", watched)
    made = pipe("a red circle", num_frames=count, num_inference_steps=1, seed=0)
    assert list(dict.fromkeys(strides)) == told == made.settings["sampler"]["strides"]


def test_a_long_interpolation_shares_given_frames(pipe, frames):
    made = pipe("", video=frames, interpolate=2, seed=1, output_type="uint8", keep_given_pixels=True)
    assert np.array_equal(made.frames[0][::2], frames)
    assert (made.settings["fps"], made.settings["sampler"]["passes"], made.settings["sampler"]["strides"]) == (16, 3, [1])


@pytest.mark.parametrize("options", [
    {}, {"solver": "ab2", "guidance_renorm": "token"}, {"image_guidance_scale": 1.5, "null_image": "own", "solver": "heun"},
    {"guidance_interval": (0.2, 0.9), "block_reuse": 2, "shift": 2.0, "given_noise": 0.1},
])  # fmt: skip
def test_a_clip_does_not_depend_on_its_batch(pipe, frames, options):
    options = {"image": frames[0], "num_frames": 5, **options}
    alone = pipe("b", seed=5, **options).latents[0]
    assert torch.allclose(alone, pipe(["a long prompt", "b"], seed=[4, 5], **options).latents[1], atol=1e-4)


def test_a_longer_clip_of_one_pass_begins_with_the_same_noise():
    pipe = micro_pipeline()
    with torch.no_grad():  # the velocity is 0, so the result is the noise
        pipe.model.patch_out.weight.zero_()
        pipe.model.patch_out.bias.zero_()
    short, long = (pipe("x", seed=2, num_frames=count).latents for count in (3, 5))
    assert torch.equal(short, long[:, :3])


# ---- on the command line

@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "count", "pattern"), [
    (["--prompt", "a red circle"], 5, "none"),
    (["--prompt", "x", "--image", "first.png"], 5, "first"),
    (["--prompt", "x", "--video", "clip.webp"], 5, "prediction"),
    (["--prompt", "x", "--image", "first.png", "--last-image", "last.png"], 5, "ends"),
    (["--video", "clip.webp", "--interpolate", "2"], 11, "interpolation"),
    (["--image", "first.png", "--views"], 7, "views"),
    (["--prompt", "x", "--num-frames", "14"], 14, "none + ends"),
])  # fmt: skip
def test_generate_makes_each_use(run, files, arguments, count, pattern):
    assert run(*arguments, "--seed", "1", "--output", "out.mp4", "--num-inference-steps", "1") == 0
    assert read_video("out.mp4")[0].shape == (count, 16, 32, 3)
    told = record("out.mp4")
    assert told["settings"]["sampler"]["pattern"] == pattern
    assert {"solver", "null_image", "guidance_renorm", "guidance_scale"} <= told["settings"].keys()
    assert not parts_folder(Path("out.mp4")).exists()


def test_generate_makes_a_picture(run):
    assert run("--prompt", "x", "--num-frames", "1", "--seed", "1", "--output", "picture.png") == 0
    assert Image.open("picture.png").size == (32, 16)


def test_interpolation_doubles_the_rate_of_the_file(run, files):
    assert run("--video", "clip.webp", "--interpolate", "2", "--output", "out.mp4", "--seed", "1") == 0
    assert record("out.mp4")["settings"]["fps"] == 16
    assert read_video("out.mp4")[1] == 16


@pytest.mark.slow
def test_lists_have_all_uses(run, files):
    rows = [{"image": "first.png", "views": True}, {"video": "clip.webp", "interpolate": 2},
            {"prompt": "x", "image": "first.png", "last_image": "last.png", "keep_given_pixels": True}]  # fmt: skip
    Path("list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run("--prompts", "list.jsonl", "--output-dir", "clips", "--num-inference-steps", "1") == 0
    made = sorted(Path("clips").glob("*.mp4"))
    assert [len(read_video(path)[0]) for path in made] == [7, 11, 5]
    assert record(str(made[2]))["last_image"] == "last.png"


@pytest.mark.slow
def test_a_killed_run_continues_with_the_same_clip(run, pipe, monkeypatch, stiv_folder):
    arguments = ["--prompt", "x", "--num-frames", "14", "--seed", "1", "--num-inference-steps", "1"]
    assert run(*arguments, "--output", "whole.mp4") == 0
    calls, usual = [], type(pipe)._made

    def killed(self, encoded, number, *more):
        calls.append(number)
        if number == 2 and calls.count(2) == 1:
            raise KeyboardInterrupt
        return usual(self, encoded, number, *more)

    monkeypatch.setattr(type(pipe), "_made", killed)
    assert run(*arguments, "--output", "parts.mp4") == 1
    assert not Path("parts.mp4").exists()
    assert len(list(parts_folder(Path("parts.mp4")).glob("*.safetensors"))) == 2
    assert run(*arguments, "--output", "parts.mp4") == 0
    assert calls == [0, 1, 2, 2, 3, 4]
    assert np.array_equal(read_video("parts.mp4")[0], read_video("whole.mp4")[0])
    assert not parts_folder(Path("parts.mp4")).exists()


def test_parts_of_other_inputs_are_made_again(run, pipe, monkeypatch):
    own = parts_folder(Path("o.mp4"))
    own.mkdir()
    (own / "mine.safetensors").write_bytes(b"of the user")
    arguments = ["--prompt", "x", "--num-frames", "14", "--num-inference-steps", "1", "--output", "o.mp4"]
    calls, usual = [], type(pipe)._made

    def killed(self, encoded, number, *more):
        calls.append(number)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return usual(self, encoded, number, *more)

    monkeypatch.setattr(type(pipe), "_made", killed)
    assert run(*arguments, "--seed", "1") == 1
    assert run(*arguments, "--seed", "2") == 0
    assert calls == [0, 1, 0, 1, 2, 3, 4]
    assert [path.name for path in own.iterdir()] == ["mine.safetensors"]


def test_nan_weights_give_one_line_and_leave_nothing(stiv_folder, capsys, tmp_path):
    pipe = VideoPipeline.from_pretrained(stiv_folder, device="cpu")
    with torch.no_grad():
        pipe.model.patch_out.weight[0, 0] = torch.nan
    with pytest.raises(NotFinite, match="not finite") as caught:
        pipe(["a", "b"], seed=1)
    assert caught.value.clips == (0, 1)
    pipe.save_pretrained("broken")
    before = set(tmp_path.rglob("*"))
    for more in ([], ["--num-frames", "14"]):
        assert main(["generate", "--model", "broken", "--prompt", "x", "--seed", "1", "--output", "o.mp4", *more]) == 1
        *_, line = capsys.readouterr().err.strip().splitlines()
        assert line.strip().startswith("error: the model's numbers are not finite")
    assert set(tmp_path.rglob("*")) == before


# ---- refusals

@pytest.mark.parametrize(("arguments", "said"), [
    ({"image_guidance_scale": 1.5}, "image_guidance_scale 1.5 needs a given frame"),
    ({"interpolate": 2}, "interpolate needs video"),
    ({"video": slice(None), "interpolate": 3}, "interpolate 3 is not allowed; give 2"),
    ({"video": slice(0, 1), "interpolate": 2}, "interpolate needs a clip of 2 to"),
    ({"video": slice(None), "interpolate": 2, "num_frames": 9}, "6 frames become 11"),
    ({"video": slice(None), "interpolate": 2, "image": 0}, "image has no effect with interpolate"),
    ({"views": True}, "views needs image"),
    ({"image": 0, "views": True, "num_frames": 9}, "num_frames 9 is not allowed with views, which are 7"),
    ({"video": slice(None), "num_given_frames": 2}, r"frames 0, 1 of 5 .* no pattern .* prediction \(the first 4 frames\)"),
    ({"video": slice(0, 3)}, "video has 3 frames, 4 are needed; give a longer clip, or a lower num_given_frames"),
    ({"last_image": 0}, "frames 4 of 5 are given, which is no pattern"),
    ({"given_frames": dict.fromkeys(range(5), 0)}, "all 5 frames are given"),
    ({"given_frames": {5: 0}}, "given_frames has the frame 5; the frames of this clip are 0 to 4"),
    ({"given_frames": [1]}, "given_frames is 1; give a picture for each frame number"),
    ({"image": 0, "given_frames": {0: 0}}, "frame 0 is given twice"),
    ({"video": slice(None), "num_frames": 4}, "leaves nothing to generate after 4 given frames"),
    ({"image": 0, "last_image": 1, "num_frames": 2}, "num_frames 2 leaves nothing to generate after 2 given frames"),
    ({"height": 24}, "height 24 is not a multiple of 16"),
    ({"later_prompts": [(2, "y")]}, "later_prompts are not possible"),
    ({"negative_prompt": "y", "guidance_scale": 1.0}, "negative_prompt has no effect with guidance_scale 1"),
    ({"solver": "rk4"}, "solver 'rk4' is not allowed; give euler, midpoint, heun, ab2"),
    ({"solver": 3}, "solver 3 is not allowed"),
    ({"guidance_scale": 1.0, "guidance_interval": (0.1, 0.5)}, "guidance_interval .* has no effect with guidance_scale 1"),
    ({"null_image": "own", "guidance_interval": (0.1, 0.5)}, "null_image own needs guidance at every step"),
    ({"temperature": 1.0}, "temperature is no sampling option of stiv"),
    ({"num_frames": 30, "keyframe_stride": 7}, "keyframe_stride 7 is too large"),
])  # fmt: skip
def test_requests_that_cannot_be_made_say_why(pipe, frames, arguments, said):
    taken = {name: frames[value] if name in ("image", "last_image", "video") else value for name, value in arguments.items()}
    if isinstance(taken.get("given_frames"), dict):
        taken["given_frames"] = dict.fromkeys(taken["given_frames"], frames[0])
    prompt = "" if "interpolate" in arguments or "views" in arguments else "x"
    with pytest.raises(UserError, match=said):
        pipe.resolve(Request.of(prompt, **taken))


@pytest.mark.parametrize(("arguments", "pattern"), [
    ({"image": 0}, "first"), ({"image": 0, "last_image": 1}, "ends"), ({"video": slice(None)}, "prediction"),
    ({"video": slice(None), "interpolate": 2}, "interpolation"), ({"image": 0, "views": True}, "views"),
    ({"num_frames": 9}, "ends"),
])  # fmt: skip
def test_patterns_of_no_training_are_refused_with_those_it_was(frames, arguments, pattern):
    pipe = micro_pipeline(patterns=["none"])
    taken = {name: frames[value] if name in ("image", "last_image", "video") else value for name, value in arguments.items()}
    prompt = "" if pattern in ("interpolation", "views") else "x"
    said = rf"not trained on the pattern {pattern} \(.*\); it was trained on: none \(no frame\)"
    with pytest.raises(UserError, match=said):
        pipe.resolve(pipe.request(prompt, taken))


def test_a_default_of_image_guidance_leaves_text_alone(frames):
    pipe = micro_pipeline()
    pipe.settings = pipe.settings.changed(guidance_scale=1.0, image_guidance_scale=1.5, guidance_interval=(0.0, 0.5))
    for given, interval, scale in (({"image": frames[0]}, (0.0, 0.5), 1.5), ({}, (0.0, 1.0), None)):
        sampling = pipe.resolve(pipe.request("x", given)).sampling
        assert (sampling.guidance_interval, sampling.image_guidance_scale) == (interval, scale)


def test_causal_latents_take_the_beginning_only(frames):
    grid = {"time": 3, "rows": 1, "columns": 2}
    pipe = micro_pipeline(latents="causal", patterns=["none", "first", "prediction"], trained_grid=grid)
    made = pipe("x", video=frames, num_frames=9, seed=1)
    assert made.frames.shape == (1, 9, 16, 32, 3)
    assert (made.settings["num_given_frames"], made.settings["sampler"]["pattern"]) == (5, "prediction")
    assert torch.equal(made.latents[0, :2], pipe.encode_frames(frames[-5:]))
    for arguments in ({"video": frames, "interpolate": 2}, {"image": frames[0], "last_image": frames[1]}):
        name = list(arguments)[-1]
        with pytest.raises(UserError, match=f"{name} needs latents of single frames"):
            pipe.resolve(pipe.request("" if name == "interpolate" else "x", arguments))
    with pytest.raises(UserError, match="num_frames 13 is more than the 9 that this model makes at once"):
        pipe.resolve(pipe.request("x", {"num_frames": 13}))
    with pytest.raises(UserError, match="num_frames 8 is not allowed"):
        pipe.resolve(pipe.request("x", {"num_frames": 8}))
    pipe = micro_pipeline(latents="causal", patterns=["prediction"], trained_grid=grid)
    with pytest.raises(UserError, match=r"was trained on: prediction \(the first 5 frames\)"):
        pipe.resolve(pipe.request("x", {"image": frames[0]}))


def test_lumos1_refuses_the_uses_of_stiv(micro_folder, frames, capsys):
    pipe = VideoPipeline.from_pretrained(micro_folder, device="cpu")
    for name, value in (("interpolate", 2), ("views", True)):
        with pytest.raises(UserError, match=f"{name} is not possible with models of the generator lumos1"):
            pipe.resolve(pipe.request("x", {name: value}))


def test_generate_needs_words_except_where_pictures_say_all(run, capsys):
    assert run("--output", "o.mp4") == 2
    assert "one of the arguments --prompt --prompts is required" in capsys.readouterr().err
    assert run("--prompt", "", "--output", "o.mp4") == 2
    assert "the prompt is empty" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_the_demo_guides_by_a_given_picture(pipe, files, frames, tmp_path):
    service = Service(pipe, tmp_path / "root", Limits(), lambda prompt, seed: {"prompt": prompt, "seed": seed, "model": "micro"})
    options = {"image_guidance_scale": 1.5, "keep_given_pixels": True, "num_inference_steps": 1}
    job = ClipJob(Request.of("x", image=tmp_path / "first.png", seed=1, **options), owner="me")
    service.make(job)
    service.worker.close()
    assert np.array_equal(job.frames[0], frames[0])


@pytest.fixture
def client(pipe, tmp_path):
    fastapi = pytest.importorskip("fastapi", reason="the API needs the extra [demo]")
    from fastapi.testclient import TestClient

    from lumos.demo.api import add_api
    from lumos.demo.middleware import Middleware

    service = Service(pipe, tmp_path / "root", Limits(), lambda prompt, seed: {"prompt": prompt, "seed": seed})
    app = fastapi.FastAPI()
    add_api(app, service)
    yield TestClient(Middleware(app, service.store, service.limits), raise_server_exceptions=False)
    service.worker.close()


@pytest.mark.parametrize(("data", "names", "count", "pattern"), [
    ({"prompt": "x"}, {"image": "first.png", "last_image": "last.png"}, 5, "ends"),
    ({"interpolate": "2"}, {"video": "short.webp"}, 5, "interpolation"),
    ({"views": "true"}, {"image": "first.png"}, 7, "views"),
    ({"prompt": "x", "solver": "ab2", "keep_given_pixels": "true"}, {"video": "clip.webp"}, 5, "prediction"),
])  # fmt: skip
def test_the_api_makes_each_use(client, files, frames, data, names, count, pattern):
    write_video("short.webp", frames[:3], 8)
    uploads = {field: (name, Path(name).read_bytes()) for field, name in names.items()}
    answer = client.post("/api/generate", data={"seed": "1", "num_inference_steps": "1", **data}, files=uploads)
    assert answer.status_code == 200, answer.text
    made = client.get(f"/api/{answer.headers['x-lumos-record']}").json()
    assert (made["settings"]["num_frames"], made["settings"]["sampler"]["pattern"]) == (count, pattern)
    assert {field: made[field] for field in names} == names
    chosen = {name: {"true": True}.get(value, value) for name, value in data.items() if name in ("solver", "keep_given_pixels")}
    assert chosen.items() <= made["settings"].items()


@pytest.mark.parametrize(("data", "names", "said"), [
    ({"interpolate": "2"}, {"video": "long.webp"}, "at most 5 frames here"),
    ({"interpolate": "3"}, {"video": "short.webp"}, "give 2"),
    ({"views": "perhaps"}, {"image": "first.png"}, "give true or false"), ({"views": "true"}, {}, "views needs image"),
    ({"interpolate": "2"}, {}, "interpolate needs video"), ({"seed": "1"}, {"image": "first.png"}, "prompt is missing"),
    ({"views": "true", "prompt": "x"}, {"image": "first.png"}, "leave the prompt"),
    ({"prompt": "x"}, {"last_image": "last.png"}, "is no pattern of this model"),
])  # fmt: skip
def test_a_wrong_use_of_the_api_says_why(client, files, frames, data, names, said):
    write_video("long.webp", np.concatenate([frames] * 2), 8)
    write_video("short.webp", frames[:3], 8)
    uploads = {field: (name, Path(name).read_bytes()) for field, name in names.items()}
    answer = client.post("/api/generate", data=data, files=uploads)
    assert answer.status_code == 400
    assert said in answer.json()["error"]
