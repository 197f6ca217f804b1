"""The call with the conventions of diffusers: names, outputs, generators, callbacks, moves."""

from __future__ import annotations

import inspect
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from lumos import LumosPipeline
from lumos.errors import RunError, UserError
from lumos.video.frames import as_uint8
from lumos.video.io import read_video, write_video


@pytest.fixture(scope="module")
def pipe(micro_folder):
    return LumosPipeline.from_pretrained(micro_folder, device="cpu")


@pytest.fixture(scope="module")
def clip(pipe):
    """The uint8 frames, to which all other output types must be equal."""
    return pipe("x", seed=1, output_type="uint8").frames[0]


def frames_that_export_to_video_writes(video_frames):
    """Return the frames that diffusers.utils.export_to_video (0.42.1) passes to its writer, by the type of the first frame."""
    if isinstance(video_frames[0], np.ndarray):
        return [(frame * 255).astype(np.uint8) for frame in video_frames]
    if isinstance(video_frames[0], Image.Image):
        return [np.array(frame) for frame in video_frames]
    return list(video_frames)


def test_argument_names_are_those_of_diffusers():
    names = inspect.signature(LumosPipeline.__call__).parameters
    assert {
        "prompt", "negative_prompt", "num_frames", "height", "width", "num_inference_steps", "guidance_scale", "image", "video",
        "num_videos_per_prompt", "generator", "output_type", "return_dict", "callback_on_step_end",
        "callback_on_step_end_tensor_inputs",
    } <= names.keys()  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"output_type": "np"}, {"output_type": "pil"}])
def test_export_to_video_gets_the_clip_exactly(pipe, clip, options):
    written = frames_that_export_to_video_writes(pipe("x", seed=1, **options).frames[0])
    assert all(frame.dtype == np.uint8 for frame in written)
    assert np.array_equal(np.stack(written), clip)


def test_every_level_survives_the_export():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    from lumos.pipeline.output import as_output_type

    floats = as_output_type([levels], "np")[0]
    assert np.array_equal(np.stack(frames_that_export_to_video_writes(floats)), levels)
    assert np.array_equal(as_uint8(floats), levels)


def test_shapes_and_ranges_of_the_output_types(pipe, clip):
    def call(kind):
        return pipe(["x", "x"], seed=[1, 2], output_type=kind).frames

    array = call("np")
    assert (array.shape, array.dtype) == ((2, 5, 16, 24, 3), np.float32)
    assert 0 <= array.min() < array.max() <= 1
    tensor = call("pt")
    assert torch.equal(tensor, torch.from_numpy(array).permute(0, 1, 4, 2, 3))
    pictures = call("pil")
    assert [len(p) for p in pictures] == [5, 5]
    assert pictures[0][0].size == (24, 16)
    assert isinstance(call("uint8"), list)
    latent = pipe("x", seed=1, output_type="latent")
    assert torch.equal(latent.frames, latent.codes)
    assert np.array_equal(pipe.decode_clip(latent.frames[0]), clip)


def test_latent_output_decodes_nothing(pipe, monkeypatch):
    monkeypatch.setattr(pipe.video_tokenizer, "decode_latent", lambda *_: pytest.fail("decoded"))
    assert pipe("x", seed=1, output_type="latent").frames.shape == (1, 2, 2, 3)


def test_the_output_is_a_tuple_too(pipe, clip):
    result = pipe("x", seed=1, output_type="uint8")
    assert result[0] is result.frames is result["frames"] is result.to_tuple()[0]
    (only,) = pipe("x", seed=1, output_type="uint8", return_dict=False)
    assert np.array_equal(only[0], clip)


def test_a_result_can_be_given_as_input(pipe, clip, tmp_path):
    floats = pipe("x", seed=1).frames[0]
    assert np.array_equal(as_uint8(pipe.reconstruct(floats)), pipe.reconstruct(clip))
    for name in ("image", "video"):
        given = {name: floats[0] if name == "image" else floats, "num_frames": 9, "seed": 2}
        same = {**given, name: as_uint8(given[name], ndim=given[name].ndim)}
        assert torch.equal(pipe("x", **given).codes, pipe("x", **same).codes)
    assert torch.equal(pipe("x", image=Image.fromarray(clip[0]), seed=2).codes, pipe("x", image=clip[0], seed=2).codes)


@pytest.mark.parametrize("output_type", ["np", "pt", "pil", "uint8"])
def test_every_output_type_goes_back_in(pipe, clip, tmp_path, output_type):
    """Outputs of one call are inputs of the next: as video, alone and in a list, as image, and in a file."""
    frames = pipe("x", seed=1, output_type=output_type).frames[0]
    wanted = pipe("x", video=clip, num_frames=9, seed=2).codes
    assert torch.equal(pipe("x", video=frames, num_frames=9, seed=2).codes, wanted)
    assert torch.equal(pipe("x", video=[frames, frames], num_frames=9, seed=[2, 3]).codes[:1], wanted)
    assert torch.equal(pipe("x", image=frames[0], seed=2).codes, pipe("x", image=clip[0], seed=2).codes)
    for suffix in (".webp", ".mp4"):
        written = write_video(tmp_path / f"a{suffix}", frames, 8)
        assert written.read_bytes() == write_video(tmp_path / f"b{suffix}", clip, 8).read_bytes()
    assert np.array_equal(read_video(tmp_path / "a.webp")[0], clip)


def test_numpys_numbers_are_numbers(pipe):
    plain = {"num_frames": 9, "num_inference_steps": 3, "guidance_scale": 2.0, "fps": 4, "seed": 5}
    theirs = {name: np.float32(value) if isinstance(value, float) else np.int32(value) for name, value in plain.items()}
    result = pipe("x", **theirs)
    assert torch.equal(result.codes, pipe("x", **plain).codes)
    json.dumps(result.settings)


def test_clips_per_prompt(pipe):
    result = pipe(["x", "a red circle"], num_videos_per_prompt=2, negative_prompt=["a", "b"], guidance_scale=9.0, seed=5)
    assert result.seeds == [5, 6, 7, 8]
    assert len(result.frames) == 4
    third = pipe("a red circle", negative_prompt="b", guidance_scale=9.0, seed=7)
    assert torch.equal(result.codes[2], third.codes[0])
    assert pipe("x", num_videos_per_prompt=3, seed=[4, 5, 9]).seeds == [4, 5, 9]
    with pytest.raises(UserError, match="num_videos_per_prompt 0 is not allowed"):
        pipe("x", num_videos_per_prompt=0)


def test_generators(pipe):
    def made(seed):
        return torch.Generator().manual_seed(seed)

    first = pipe("x", generator=made(3))
    assert torch.equal(first.codes, pipe("x", generator=made(3)).codes)
    assert torch.equal(first.codes, pipe("x", seed=first.seeds).codes)
    moving = made(3)
    two = [pipe("x", generator=moving).seeds[0] for _ in range(2)]
    assert two[0] != two[1]
    assert two == pipe(["x", "x"], generator=made(3)).seeds
    assert pipe(["x", "x"], generator=[made(3), made(3)]).seeds == [two[0], two[0]]
    with pytest.raises(UserError, match="generator is a list of 2, but there are 3 clips"):
        pipe(["x", "y", "z"], generator=[made(1), made(2)])
    with pytest.raises(UserError, match="both seed and generator"):
        pipe("x", generator=made(1), seed=1)
    with pytest.raises(UserError, match="generator is 5; give a torch"):
        pipe("x", generator=5)


def test_callback_sees_the_frame_fill_up(pipe):
    seen = []

    def callback(given, step, left, tensors):
        assert given is pipe
        assert (tensors["codes"] < 0).sum() == 2 * left
        seen.append((step, left, tensors["codes"].clone(), tensors["history"]))
        return {}

    image = np.zeros((16, 24, 3), np.uint8)
    result = pipe(["x", "y"], image=image, num_frames=9, seed=1, num_inference_steps=3, callback_on_step_end=callback,
                  callback_on_step_end_tensor_inputs=["codes", "history"])  # fmt: skip
    assert [s[0] for s in seen] == list(range(pipe.num_timesteps)) == list(range(6))
    assert [s[1] == 0 for s in seen] == [False, False, True] * 2
    for frame, at in ((1, 2), (2, 5)):
        assert torch.equal(seen[at][2], result.codes[:, frame])
        assert torch.equal(seen[at][3], result.codes[:, :frame])
    plain = pipe(["x", "y"], image=image, num_frames=9, seed=1, num_inference_steps=3)
    assert torch.equal(plain.codes, result.codes)


def test_callback_may_change_codes(pipe):
    def zero(pipe, step, left, tensors):
        return {"codes": torch.where(tensors["codes"] < 0, -1, 7)}

    assert (pipe("x", seed=1, callback_on_step_end=zero).codes == 7).all()

    def only_last(pipe, step, left, tensors):
        return {"codes": torch.full_like(tensors["codes"], 9)} if step == pipe.num_timesteps - 1 else None

    codes = pipe("x", seed=1, callback_on_step_end=only_last).codes
    assert torch.equal(codes[:, 0], pipe("x", seed=1).codes[:, 0])
    assert (codes[:, 1] == 9).all()


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (lambda c: torch.zeros_like(c), "codes that cannot be used"),
        (lambda c: torch.where(c < 0, c, 64), "0 to 63 where a code is decided"),
        (lambda c: c[:, :1], r"give whole numbers \[1, 2, 3\]"),
        (lambda c: c.float(), r"codes torch\.float32"),
        (lambda c: 3, "codes int"),
    ],
)
def test_invalid_codes_of_a_callback_are_refused(pipe, codes, message):
    with pytest.raises(UserError, match=message):
        pipe("x", seed=1, callback_on_step_end=lambda p, s, t, kwargs: {"codes": codes(kwargs["codes"])})


def test_interrupting(pipe):
    def at(last):
        def callback(pipe, step, left, tensors):
            pipe._interrupt = step == last
            return tensors

        return callback

    whole = pipe("x", num_frames=13, seed=1)
    steps = whole.settings["num_inference_steps"]
    part = pipe("x", num_frames=13, seed=1, callback_on_step_end=at(2 * steps))
    assert part.frames.shape[1] == part.settings["num_frames"] == 5
    assert torch.equal(part.codes, whole.codes[:, :2])
    kept = pipe("x", num_frames=13, seed=1, callback_on_step_end=at(2 * steps - 1))  # a frame that is just done counts
    assert torch.equal(kept.codes, whole.codes[:, :2])
    with pytest.raises(RunError, match="before its first latent frame was done"):
        pipe("x", seed=1, callback_on_step_end=at(0))
    assert torch.equal(pipe("x", num_frames=13, seed=1).codes, whole.codes)


def test_calls_of_several_threads_do_not_stop_each_other(pipe):
    whole, both = pipe("x", num_frames=13, seed=1), threading.Barrier(2)

    def call(stops: bool):
        def callback(pipe, step, left, tensors):
            if step == 0:
                both.wait(timeout=60)  # both calls run now
            pipe._interrupt = stops and step == 2 * whole.settings["num_inference_steps"]

        return pipe("x", num_frames=13, seed=1, callback_on_step_end=callback).codes

    with ThreadPoolExecutor(2) as pool:
        part, other = pool.map(call, (True, False))
    assert torch.equal(other, whole.codes)
    assert torch.equal(part, whole.codes[:, :2])


def test_another_thread_may_stop_a_call(pipe):
    def callback(pipe, step, left, tensors):
        if step == 4:
            stop = threading.Thread(target=lambda: setattr(pipe, "_interrupt", True))
            stop.start()
            stop.join()

    whole = pipe("x", num_frames=13, seed=1)
    part = pipe("x", num_frames=13, seed=1, callback_on_step_end=callback)
    assert part.codes.shape[1] < whole.codes.shape[1]
    assert torch.equal(part.codes, whole.codes[:, : part.codes.shape[1]])


def test_invalid_callbacks_are_refused(pipe):
    with pytest.raises(UserError, match="callback_on_step_end is 5; give a function"):
        pipe("x", callback_on_step_end=5)
    with pytest.raises(UserError, match=r"is the text 'codes'; give a list of names, as \['codes'\]"):
        pipe("x", callback_on_step_end=lambda *a: None, callback_on_step_end_tensor_inputs="codes")
    with pytest.raises(UserError, match="the callback gave True; give nothing, or a dict"):
        pipe("x", callback_on_step_end=lambda *a: True)


def test_wrong_names_are_refused_before_any_work(pipe, monkeypatch):
    monkeypatch.setattr(pipe.model.model, "forward", lambda *a: pytest.fail("the model ran"))
    with pytest.raises(UserError, match="output_type 'gif' is unknown; allowed: np, pil, pt, uint8, latent"):
        pipe("x", output_type="gif")
    with pytest.raises(UserError, match=r"\['latents'\] are not offered; allowed: codes, history"):
        pipe("x", callback_on_step_end=lambda *a: {}, callback_on_step_end_tensor_inputs=["latents"])


def test_to_moves_and_casts_all_parts(micro_folder):
    pipe = LumosPipeline.from_pretrained(micro_folder, device="cpu")
    assert pipe.to("cpu") is pipe
    assert pipe.to(torch.bfloat16).dtype == torch.bfloat16
    assert next(pipe.video_tokenizer.parameters()).dtype == torch.bfloat16
    assert pipe.to("cpu", torch.float32).dtype == torch.float32
    assert pipe.to(device="cpu", dtype=torch.bfloat16).device == torch.device("cpu")
    assert pipe("x", seed=1).frames.shape == (1, 5, 16, 24, 3)
    with pytest.raises(UserError, match="device 'tpu' is unknown"):
        pipe.to("tpu")
